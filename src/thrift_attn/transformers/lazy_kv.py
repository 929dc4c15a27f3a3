"""Tensors that stand for the K and V of a layer: how attention reaches pages through the code of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from thrift_attn.cache import PagedThriftCache


@dataclass(eq=False)
class PendingKV:
    """The new K and V of one layer in one forward.

    Args:
        layer: where they go, a `thrift_attn.transformers.thrift_layer.ThriftLayer`.
        k: ``[B, Hkv, T, D]``.
        v: likewise.
        held: slots of the layer before them.
        written: whether they are in the pages by now.
        widened: K and V of all slots, once an operation has asked for them.
    """

    layer: Any
    k: Tensor
    v: Tensor
    held: int
    written: bool = False
    widened: tuple[Tensor, Tensor] | None = None

    @property
    def count(self) -> int:
        """New slots."""
        return self.k.shape[2]

    def handles(self) -> tuple[Cached, Cached]:
        """What a model gets for K and V."""
        return Cached(self, 0), Cached(self, 1)


class Cached(torch.Tensor):
    """K or V of a layer of a `ThriftCache`, widened to 16 bits only when an operation looks at it."""

    pending: PendingKV
    which: int

    @staticmethod
    def __new__(cls, pending: PendingKV, which: int) -> Cached:
        """``which`` is 0 for K and 1 for V."""
        new = (pending.k, pending.v)[which]
        shape = (*new.shape[:2], pending.held + new.shape[2], new.shape[3])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        self.pending, self.which = pending, which
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Cached({'KV'[self.which]} {list(self.shape)}, {self.dtype})"

    def widened(self) -> Tensor:
        """The numbers ``[B, Hkv, S, D]``."""
        return self.pending.layer.full(self.pending)[self.which]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Cached, Cached.widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def pending_of(key: Tensor, value: Tensor) -> PendingKV | None:
    """The new K and V that both tensors stand for; None if a model has put others in the place of one of them."""
    if isinstance(key, Cached) and isinstance(value, Cached) and key.pending is value.pending:
        return key.pending if (key.which, value.which) == (0, 1) else None
    return None


def widened(x: Tensor) -> Tensor:
    """The numbers of a tensor that may be `Cached`."""
    return x.widened() if isinstance(x, Cached) else x


def made_for(pages: PagedThriftCache, k: Tensor) -> bool:
    """Whether pages were made for tokens like K ``[B, Hkv, T, D]``."""
    batch, heads, _, dim = k.shape
    made = (pages.batch, pages.kv_heads, pages.head_dim, pages.dtype, pages.device)
    return made == (batch, heads, dim, k.dtype, k.device)
