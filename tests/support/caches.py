"""Small caches in plain PyTorch and tokens for them."""

from __future__ import annotations

import torch

from thrift_attn.cache import PagedThriftCache
from thrift_attn.config import ThriftConfig

HIGH = ("16bit", "nested", "nested8")


PROMOTES_FEW = ThriftConfig.for_cache(budget=0.05)
"""Without the floor of the default, which promotes every block of short sequences."""


def make(batch=1, pages=32, dim=64, heads=2, config=PROMOTES_FEW, **options):
    return PagedThriftCache(
        batch=batch,
        kv_heads=heads,
        head_dim=dim,
        num_pages=pages,
        config=config,
        dtype=torch.float32,
        device="cpu",
        **options,
    )


def tokens(count, *, batch=1, heads=2, dim=64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, count, dim, generator=gen) for _ in "kv")


def query(count=1, *, batch=1, heads=4, dim=64):
    return torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(9))


def state(cache, row):
    return (cache.tokens(row), *cache.read(row))


def same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))
