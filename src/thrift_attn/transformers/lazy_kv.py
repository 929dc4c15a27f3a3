"""Tensors that stand for the pages of a layer: how attention reaches them through the code of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from thrift_attn.config import DECODE_ROWS
from thrift_attn.interface import attention
from thrift_attn.stats import Stats

if TYPE_CHECKING:
    from thrift_attn.transformers.thrift_cache import ThriftLayer


@dataclass
class Padding:
    """New tokens of which some are padding.

    Args:
        start: slot of the first one.
        is_token: bool ``[B, T]`` on the device.
        counts: tokens of each row.
    """

    start: int
    is_token: Tensor
    counts: list[int]

    def left(self) -> Tensor:
        """int64 ``[B, T]``: the tokens of a row in order, then its padding."""
        return self.is_token.int().argsort(dim=1, descending=True, stable=True)

    def right(self) -> Tensor:
        """int64 ``[B, T]``: the padding of a row, then its tokens in order."""
        return self.is_token.int().argsort(dim=1, stable=True)


class Step:
    """The new tokens of one layer: what `Cached` K and V of one forward share.

    Args:
        layer: where they go.
        k: ``[B, Hkv, T, D]``.
        v: likewise.
    """

    def __init__(self, layer: ThriftLayer, k: Tensor, v: Tensor):
        self.layer, self.k, self.v = layer, k, v
        self.held = layer.slots  # before the new tokens
        self._done = False
        self._full: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        query: Tensor,
        tokens: Tensor | None,
        *,
        scale: float | None,
        softcap: float | None,
        backend: str,
        counted: bool,
    ) -> tuple[Tensor, Stats] | None:
        """Attention of the new tokens over all that the layer holds, which they now belong to.

        Args:
            query: ``[B, Hq, T, D]``.
            tokens: bool ``[B, slots]``, True at tokens, or None if all new slots are tokens.
            scale: of the logits.
            softcap: of the logits.
            backend: for `thrift_attn.attention`.
            counted: whether to count what more than 16 new tokens promote; for fewer it is known on the host.

        Returns:
            The output ``[B, Hq, T, D]``, 0 at padding, and what was promoted. None, and nothing done, if ``tokens`` hides
            tokens that the layer holds, which only a mask can express, or on a second call.

        Raises:
            ValueError: ``tokens`` shows padding as tokens, or a sequence would be longer than the cache allows.
            RuntimeError: the pages are exhausted; nothing has been written.
        """
        layer, paged, count = self.layer, self.layer.paged, self.k.shape[2]
        if query.shape[2] != count:
            raise ValueError(f"the new tokens have {count} keys and {query.shape[2]} queries")
        if self._done or (tokens is not None and not layer.holds(tokens, self.held)):
            return None
        padding = layer.owner.padding_of(tokens, self.held, count)
        new = [count] * query.shape[0] if padding is None else padding.counts
        before = [layer.tokens(row) for row in range(paged.batch)]
        totals = [old + n for old, n in zip(before, new, strict=True)]
        paged.table.reserve(totals)  # nothing is half done without room
        options: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if padding is None and count <= DECODE_ROWS and any(before):
            self._append(None)
            return paged.attend(query, **options), layer.decode_stats(query.shape[1])
        options |= {"config": layer.owner.prefill_on(query.device, max(totals)), "backend": backend}
        k, v = self.k, self.v
        if padding is not None:
            query = gather(query, padding.right())
            k, v = (gather(x, padding.left()) for x in (k, v))
        if any(before):
            k, v = self._behind(k, v, before)
        if padding is not None or len(set(totals)) > 1:
            options["kv_lengths"] = torch.tensor(totals, device=query.device).clamp(min=1)
        out, stats = with_stats(query, k, v, counted, **options)
        self._append(padding)
        if padding is not None:
            out = gather(out, padding.right().argsort(dim=1))
            out = out.masked_fill(~padding.is_token[:, None, :, None], 0)
        return out, stats

    def full(self, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """K and V of all slots ``[B, Hkv, S, D]`` in 16 bits, 0 at padding; the new tokens now belong to the layer."""
        if self._full is None:
            padding = self.layer.owner.padding_of(tokens, self.held, self.k.shape[2])
            if self._done or self.held:
                k, v = (_spread(x, self.layer.slot_map()) for x in self.layer.paged.widen())
                self._full = (k, v) if self._done else (torch.cat([k, self.k], 2), torch.cat([v, self.v], 2))
            else:
                self._full = self.k, self.v
            self._append(padding)
        return self._full

    def _behind(self, k: Tensor, v: Tensor, before: list[int]) -> tuple[Tensor, Tensor]:
        """New K and V behind the tokens that each row holds."""
        count = k.shape[2]
        wide = self.layer.paged.widen(room=count)
        at = torch.tensor(before, device=k.device)[:, None] + torch.arange(count, device=k.device)
        index = at[:, None, :, None].expand_as(k)
        return wide[0].scatter_(2, index, k), wide[1].scatter_(2, index, v)

    def _append(self, padding: Padding | None) -> None:
        if not self._done:
            self.layer.append(self.k, self.v, padding)
            self._done = True


class Cached(torch.Tensor):
    """K or V of a layer of a `ThriftCache`, widened to 16 bits only when an operation looks at it."""

    step: Step
    which: int

    @staticmethod
    def __new__(cls, step: Step, which: int) -> Cached:
        """``which`` is 0 for K and 1 for V."""
        new = step.k
        shape = (*new.shape[:2], step.held + new.shape[2], new.shape[3])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        self.step, self.which = step, which
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Cached({'KV'[self.which]} {list(self.shape)}, {self.dtype})"

    def widened(self) -> Tensor:
        """The numbers ``[B, Hkv, S, D]``."""
        return self.step.full()[self.which]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Cached, Cached.widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def with_stats(q: Tensor, k: Tensor, v: Tensor, counted: bool, **options: Any) -> tuple[Tensor, Stats]:
    """`thrift_attn.attention` with its statistics, or with empty ones if they are not to be counted."""
    if counted:
        return attention(q, k, v, return_stats=True, **options)
    return attention(q, k, v, **options), Stats()


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of ``[B, H, T, D]`` in the order ``[B, T]``."""
    return x.gather(2, index[:, None, :, None].expand_as(x))


def _spread(x: Tensor, is_token: Tensor | None) -> Tensor:
    """Tokens ``[B, H, longest, D]`` put into their slots ``[B, S]``, 0 elsewhere; None: slots are tokens."""
    if is_token is None:
        return x
    at = (is_token.int().cumsum(1) - 1).clamp(min=0)[:, None, :, None]
    x = x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))
    return x.masked_fill(~is_token[:, None, :, None], 0)
