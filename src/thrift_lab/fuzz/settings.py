"""What one episode of a fuzz is about: sizes, dtype and options of a cache, and the tokens that are put into it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from thrift_attn import ThriftConfig
from thrift_attn.cache import PagedThriftCache
from thrift_attn.config import BLOCK
from thrift_attn.dispatch import interpreted
from thrift_attn.reference import residents

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOKEN_KINDS = ("plain", "outliers", "loud first", "small", "zero", "not finite")
"""Kinds of tokens: normal numbers; channels of K 30 times larger and far from 0; a first token 100 times larger; a thousandth;
zeros; a NaN and an infinity among them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes and options of the caches of one episode.

    Args:
        dtype: a key of `DTYPES`.
        head_dim: D.
        kv_heads: KV heads.
        group: query heads of a KV head.
        batch: sequences at first.
        num_pages: pages of the pool.
        max_pages: most pages of a sequence.
        max_tokens: most tokens of a sequence, or None.
        floor: blocks up to which all of a sequence keep their residual, where ``residual_share`` is below 1.
        options: of `ThriftConfig.for_cache`.
        device: where the caches live.
    """

    dtype: str
    head_dim: int
    kv_heads: int
    group: int
    batch: int
    num_pages: int
    max_pages: int
    max_tokens: int | None
    options: dict[str, Any]
    floor: int = residents.FLOOR
    device: str = "cpu"

    @classmethod
    def draw(cls, rng: random.Random, device: str = "cpu") -> Setting:
        """Draw a setting."""
        kernels = device != "cpu" or interpreted()
        dtypes = ("bfloat16", "float16") if device != "cpu" else ("float16",) if kernels else tuple(DTYPES)
        head_dim = rng.choice((64, 64, 64, 80, 128))
        center = rng.choice(("all", "block", "none"))
        base_format = rng.choice(("nvfp4", "nvfp4", "mxfp4")) if head_dim % 32 == 0 else "nvfp4"
        share = rng.choice((1.0, 1.0, 0.3, 0.15, 0.0))
        max_pages = rng.randint(2, 8) if share == 1 else rng.randint(4, 14)
        budgets = (1.0, 1.0, 0.0, 0.3, "top_k(1)", "top_k(2)", "max(5%, 2)")
        batch = rng.randint(1, 3)
        return cls(
            dtype=rng.choice(dtypes),
            head_dim=head_dim,
            kv_heads=rng.randint(1, 2),
            group=rng.choice((1, 2, 4)),
            batch=batch,
            num_pages=rng.randint(max_pages, 2 + batch * max_pages),
            max_pages=max_pages,
            max_tokens=rng.choice((None, None, max_pages * BLOCK - rng.randint(0, 70))),
            options={
                "base_format": base_format,
                "promoted_storage": rng.choice(("16bit", "16bit", "nested", "nested8")),
                "center": center,
                "sink_token": "none" if center == "none" else rng.choice(("exact", "exact", "none")),
                "smooth": rng.choice(("channel", "none")),
                "scales": rng.choice(("best", "max")),
                "budget": rng.choice(budgets if share == 1 else budgets[1:]),
                "force_first": rng.choice((0, 0, 1)),
                "force_last": rng.choice((1, 1, 0, 2)),
                "residual_share": share,
            },
            floor=rng.choice((2, 4)),
            device=device,
        )

    @property
    def config(self) -> ThriftConfig:
        """What the caches store and compute."""
        return ThriftConfig.for_cache(**self.options)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of K, V and Q."""
        return DTYPES[self.dtype]

    @property
    def every_block(self) -> bool:
        """Whether the budget promotes every block."""
        return self.config.budget.kind == "fraction" and self.config.budget.value == 1

    @contextmanager
    def _floor(self) -> Iterator[None]:
        """Let the floor of residents be that of the setting: few blocks reach evictions."""
        before, residents.FLOOR = residents.FLOOR, self.floor
        try:
            yield
        finally:
            residents.FLOOR = before

    def make(
        self, batch: int, num_pages: int | None = None, *, limited: bool = True, whole: bool = False
    ) -> PagedThriftCache:
        """Make an empty cache.

        Args:
            batch: sequences.
            num_pages: pages of its pool; those of the setting by default.
            limited: whether ``max_tokens`` and ``max_pages`` hold.
            whole: whether all blocks keep their residual, whatever the setting says.
        """
        pages = self.num_pages if num_pages is None else num_pages
        with self._floor():
            return PagedThriftCache(
                batch=batch,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                num_pages=pages,
                max_pages=self.max_pages if limited else pages,
                max_tokens=self.max_tokens if limited else None,
                config=self.config.with_(residual_share=1.0) if whole else self.config,
                dtype=self.torch_dtype,
                device=self.device,
            )

    def tokens(self, batch: int, count: int, seed: int, kind: str) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, Hkv, count, D]`` of one of `TOKEN_KINDS`."""
        draw = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(batch, self.kv_heads, count, self.head_dim, generator=draw) for _ in "kv")
        if kind == "outliers":
            size = torch.ones(self.head_dim)
            size[torch.randperm(self.head_dim, generator=draw)[:3]] = 30
            k = (k + 2 * torch.randn(self.head_dim, generator=draw)) * size
        elif kind == "loud first":
            k[:, :, :1] *= 100
            v[:, :, :1] *= 100
        elif kind == "small":
            k, v = k * 1e-3, v * 1e-3
        elif kind == "zero":
            k, v = torch.zeros_like(k), torch.zeros_like(v)
        elif kind == "not finite" and count:
            k[:, :, int(torch.randint(count, (1,), generator=draw))] = torch.nan
            v[:, :, int(torch.randint(count, (1,), generator=draw)), 0] = torch.inf
        return k.to(self.device, self.torch_dtype), v.to(self.device, self.torch_dtype)

    def queries(self, batch: int, count: int, seed: int) -> Tensor:
        """Queries ``[batch, Hq, count, D]``."""
        draw = torch.Generator().manual_seed(seed)
        q = 1.5 * torch.randn(batch, self.kv_heads * self.group, count, self.head_dim, generator=draw)
        return q.to(self.device, self.torch_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)
