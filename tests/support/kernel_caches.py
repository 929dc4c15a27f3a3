"""Caches on kernels and in plain PyTorch, filled alike."""

from __future__ import annotations

import torch

from support.device import DEVICE
from thrift_attn.cache import PagedThriftCache
from thrift_attn.config import ThriftConfig

PROMOTES_FEW = ThriftConfig.for_cache(budget=0.05)
"""Without the floor of the default, which promotes every block of short sequences."""


def make(backend, *, batch=1, pages=24, heads=2, dim=64, config=PROMOTES_FEW, dtype=torch.float16):
    cache = PagedThriftCache(
        batch=batch, kv_heads=heads, head_dim=dim, num_pages=pages, config=config, dtype=dtype, device=DEVICE
    )
    assert cache.backend == "triton"
    cache.backend = backend
    return cache


def both(**options):
    return make("triton", **options), make("reference", **options)


def tokens(count, *, batch=1, heads=2, dim=64, dtype=torch.float16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    bias = 4 * torch.randn(dim, generator=gen)
    k = torch.randn(batch, heads, count, dim, generator=gen) + bias
    v = torch.randn(batch, heads, count, dim, generator=gen)
    v[:, :, 0] *= 30  # which a mistake about the first token shows
    return k.to(dtype).to(DEVICE), v.to(dtype).to(DEVICE)


def query(count=1, *, batch=1, heads=4, dim=64, dtype=torch.float16):
    return torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(9)).to(dtype).to(DEVICE)


def check(kernels, plain, q, **options):
    """Attention agrees to the rounding of P and of the output to 16 bits."""
    out, lse = kernels.attend(q, return_lse=True, **options)
    want, want_lse = plain.attend(q, return_lse=True, **options)
    assert not out.isnan().any()
    assert (out.float() - want.float()).norm() <= 2e-3 * want.float().norm() + 1e-6
    finite = want_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert not finite.any() or (lse - want_lse)[finite].abs().max() < 3e-3
