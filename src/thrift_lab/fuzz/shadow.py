"""What a sequence of a cache should hold, as plain tensors, and what follows: a fresh cache, and attention in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from thrift_attn.cache import PagedThriftCache
from thrift_attn.config import BLOCK
from thrift_attn.reference import attention as reference
from thrift_lab.fuzz.settings import Setting


@dataclass(frozen=True, eq=False)
class Sequence:
    """All tokens of one sequence; a change makes another one.

    Args:
        setting: of the episode.
        k: ``[Hkv, T, D]``.
        v: likewise.
        kept: the block that each half of the ring still holds in 16 bits, or -1: to it a sequence is cut without loss.
        shared: whether it has ever shared complete blocks with another sequence.
    """

    setting: Setting
    k: Tensor
    v: Tensor
    kept: tuple[int, int] = (-1, -1)
    shared: bool = False
    _twin: list[PagedThriftCache] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def empty(cls, setting: Setting) -> Sequence:
        """A sequence without tokens."""
        none = setting.tokens(1, 0, 0, "plain")[0][0]
        return cls(setting, none, none)

    @property
    def tokens(self) -> int:
        """T."""
        return self.k.shape[1]

    @property
    def finite(self) -> bool:
        """Whether there is no NaN and no infinity among K and V."""
        return bool(self.k.isfinite().all() and self.v.isfinite().all())

    def grown(self, k: Tensor, v: Tensor) -> Sequence:
        """The sequence with new tokens ``[Hkv, n, D]`` at its end."""
        if not k.shape[1]:
            return self
        kept = list(self.kept)
        for block in range(self.tokens // BLOCK, (self.tokens + k.shape[1] - 1) // BLOCK + 1):
            kept[block % 2] = block
        k, v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        return Sequence(self.setting, k, v, (kept[0], kept[1]), self.shared)

    def copied(self) -> Sequence:
        """The sequence when it shares its blocks with another."""
        if self.shared or self.tokens < BLOCK:
            return self
        other = replace(self, shared=True)
        other._twin.extend(self._twin)
        return other

    def cut(self, tokens: int, held: tuple[Tensor, Tensor] | None = None) -> Sequence:
        """The first tokens of the sequence.

        Where the block of the new end is not kept in 16 bits any more, what is left of it is what its page decodes to.

        Args:
            tokens: how many.
            held: K and V ``[Hkv, T, D]`` as the cache reads them, where not all blocks keep their residual.
        """
        block = tokens // BLOCK
        k, v, kept = self.k[:, :tokens], self.v[:, :tokens], list(self.kept)
        if tokens % BLOCK and kept[block % 2] != block:
            read = self.twin().read(0) if held is None else held
            start = block * BLOCK
            k, v = (torch.cat([x[:, :start], y[:, start:tokens]], 1) for x, y in zip((k, v), read, strict=True))
            kept[block % 2] = block
        kept = [held if held * BLOCK < tokens else -1 for held in kept]
        if tokens == self.tokens and torch.equal(k, self.k) and torch.equal(v, self.v):
            return replace(self, kept=(kept[0], kept[1]))
        return Sequence(self.setting, k, v, (kept[0], kept[1]), self.shared and tokens >= BLOCK)

    def twin(self) -> PagedThriftCache:
        """A fresh cache of one sequence that has got all tokens at once, and keeps all residuals."""
        if not self._twin:
            made = self.setting.make(1, max(1, self.tokens // BLOCK), limited=False, whole=True)
            if self.tokens:
                made.append(self.k[None], self.v[None])
            self._twin.append(made)
        return self._twin[0]


def resident_blocks(cache: PagedThriftCache, seq: int) -> Tensor:
    """Which complete blocks of a sequence keep their residual, bool ``[n, Hkv]``."""
    pages = cache.table.pages(seq)
    if cache.residual_slots is None:
        return torch.ones(len(pages), cache.kv_heads, dtype=torch.bool, device=cache.device)
    return cache.residual_slots.of_pages(pages) >= 0


def picture(cache: PagedThriftCache, seq: int, resident: Tensor | None = None) -> list[Tensor]:
    """Every bit that a cache holds of one sequence and that attention may look at, whatever its pages are numbered.

    Args:
        cache: the cache.
        seq: the sequence.
        resident: bool ``[n, Hkv]``, the blocks whose residual is looked at; by default those that have one.
    """
    tokens, pages = cache.tokens(seq), cache.table.pages(seq)
    resident = resident_blocks(cache, seq) if resident is None else resident
    if cache.residual_slots is None:
        high = cache.pool.high[pages]
    else:
        slots = cache.residual_slots.of_pages(pages)
        high = cache.pool.high[slots.clamp(min=0), torch.arange(cache.kv_heads, device=slots.device)]
    high = torch.where(resident[..., None], high, torch.zeros_like(high))
    found = [torch.tensor([tokens]), cache.pool.base[pages], cache.pool.k_block_mean[pages], high, resident]
    if tokens % BLOCK:
        found.append(cache._tail_of(seq, tokens // BLOCK)[:, :, : tokens % BLOCK].clone())
    of_seq = cache.per_sequence
    if tokens >= BLOCK and cache.numerics.exact_sink:
        found += [of_seq.block0_mean[seq].clone(), of_seq.sink_value[seq].clone()]
    if tokens >= BLOCK:
        found += [x[seq].clone() for x in (of_seq.k_channel_scale, of_seq.v_head_scale) if x is not None]
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two pictures are equal bit for bit; NaNs are equal."""
    return len(one) == len(other) and all(map(_same, one, other))


def as_fresh(cache: PagedThriftCache, seq: int, sequence: Sequence) -> bool:
    """Whether a sequence of a cache looks as in a fresh cache, but for the residuals that it has not kept."""
    if cache.tokens(seq) != sequence.tokens:
        return False
    resident = resident_blocks(cache, seq)
    return same(picture(cache, seq), picture(sequence.twin(), 0, resident))


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.is_floating_point():
        return bool(((x == y) | (x.isnan() & y.isnan())).all())
    return torch.equal(x, y)


def attend_some(cache: PagedThriftCache, q: Tensor, resident: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attention over a cache of one sequence as if it had kept the residuals of some blocks only.

    Args:
        cache: which has kept all.
        q: ``[Hq, Tq, D]``.
        resident: bool ``[n, Hkv]``, the complete blocks whose residual is there.
        options: ``scale``, ``window``, ``softcap``, each of which may be missing or None.

    Returns:
        Output ``[Hq, Tq, D]`` and LSE ``[Hq, Tq]``.
    """
    planes, tokens = cache._planes(0), cache.tokens(0)
    can = torch.nn.functional.pad(resident.T, (0, planes.k_block_mean.shape[1] - len(resident)))  # [Hkv, N]
    whole = can.repeat_interleave(BLOCK, 1)  # [Hkv, N * 64]
    whole[:, tokens // BLOCK * BLOCK :] = True  # the incomplete block
    assert planes.low_k is not None
    assert planes.low_v is not None
    mean = planes.k_block_mean.repeat_interleave(BLOCK, 1) if cache.numerics.centred else torch.zeros(())
    low_v = planes.low_v.clone()
    if planes.block0_mean is not None:
        low_v[:, 0] = planes.high_v[:, 0]  # an exact first token is that wherever it is
    planes = replace(
        planes,
        high_k=torch.where(whole[..., None], planes.high_k, planes.low_k + mean),
        high_v=torch.where(whole[..., None], planes.high_v, low_v),
        resident=can,
    )
    mask = reference.Mask(q.shape[1], tokens, True, options.get("window"))
    scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    out, lse, _ = reference.attend_planes(q, planes, cache.numerics, mask, scale, options.get("softcap"))
    return out.to(q.dtype), lse


def dense(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the newest tokens over all, in float64.

    Args:
        q: ``[Hq, Tq, D]``.
        k: ``[Hkv, T, D]``.
        v: likewise.
        options: ``scale``, ``window``, ``softcap``, each of which may be missing or None.

    Returns:
        Output ``[Hq, Tq, D]``, LSE ``[Hq, Tq]``, and for each query the largest sum of absolute products of a logit, which
        bounds its rounding.
    """
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scale, window, softcap = (options.get(name) for name in ("scale", "window", "softcap"))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    at = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device)
    hidden = key > at
    if window is not None:
        hidden |= key <= at - window
    logits = q @ k.mT * scale
    size = (q.abs() @ k.abs().mT * scale).masked_fill(hidden, 0).amax(-1)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v, logits.logsumexp(-1), size
