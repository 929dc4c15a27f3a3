"""Powers of two inside a cache: taken once, shared, and gone from everything that leaves it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thrift_attn import ThriftConfig, attention, top_k
from thrift_attn.cache.cache_scales import CacheLevels
from thrift_attn.cache.paged import PagedThriftCache
from thrift_attn.cache.state import dump, restore

HEADS, DIM = 2, 32


def tokens(count: int, batch: int = 1, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """K with outlier channels and tiny V."""
    draw = torch.Generator().manual_seed(count)
    k, v = (torch.randn(batch, HEADS, count, DIM, generator=draw) for _ in range(2))
    size = torch.ones(DIM)
    size[[3, 20]] = 30
    return (k * size).to(dtype), (1e-3 * v).to(dtype)


def make(batch: int = 1, dtype: torch.dtype = torch.float16, **changes) -> PagedThriftCache:
    return PagedThriftCache(
        batch=batch,
        kv_heads=HEADS,
        head_dim=DIM,
        num_pages=16,
        config=ThriftConfig.for_cache(**{"budget": 0.05, **changes}),
        dtype=dtype,
        device="cpu",
    )


def levels_of(cache: PagedThriftCache) -> CacheLevels:
    assert cache.levels is not None
    return cache.levels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_what_is_read_is_what_was_appended(count: int, dtype: torch.dtype) -> None:
    """The newest blocks bit for bit; pages of the copy as well."""
    cache, (k, v) = make(dtype=dtype, promoted_storage="16bit"), tokens(count, dtype=dtype)
    cache.append(k, v)
    found = levels_of(cache)
    assert found.taken
    for power, inverse in ((found.keys, found.of_queries), (found.values, found.of_outputs)):
        assert torch.equal(power.flatten() * inverse.flatten(), torch.ones_like(power.flatten()))
        assert torch.equal(power.log2(), power.log2().round())
    # float16 rounds what falls below 2^-14 inside; times the largest inverse that is:
    lost = 2**-25 * float(found.of_queries.max()) if dtype == torch.float16 else 0
    for got, want in zip((*cache.read(0), *(x[0] for x in cache.widen())), (k[0], v[0]) * 2, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=lost)


def test_a_cache_computes_what_attention_computes() -> None:
    """All tokens in one piece: the same powers of two on both sides."""
    count, config = 256, ThriftConfig.for_cache(budget=top_k(2))
    cache, (k, v) = make(dtype=torch.float32, budget=config.budget), tokens(count, dtype=torch.float32)
    cache.append(k, v)
    q = torch.randn(1, 2 * HEADS, 3, DIM)
    want, want_lse = attention(q, k, v, config=config, return_lse=True)
    got, lse = cache.attend(q, return_lse=True)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_the_first_tokens_decide_for_all_that_share_pages() -> None:
    cache = make(batch=2)
    other = cache.branch()
    k, v = tokens(100, batch=2)
    cache.append(k, v, lengths=[0, 70])
    first = levels_of(cache).keys.clone()
    alone = make()
    alone.append(k[1:, :, :70], v[1:, :, :70])
    assert torch.equal(first, levels_of(alone).keys)
    other.append(50 * k, 50 * v)
    cache.append(50 * k, 50 * v)
    assert torch.equal(levels_of(other).keys, first)
    assert torch.equal(levels_of(cache).keys, first)
    cache.fork(1, 0)
    for got, want in zip(cache.read(0), cache.read(1), strict=True):
        assert torch.equal(got, want)


def test_taking_back_tokens_keeps_them_exact() -> None:
    cache, (k, v) = make(), tokens(150)
    cache.append(k, v)
    cache.truncate(0, 100)
    for got, want in zip(cache.read(0), (k[0], v[0]), strict=True):
        assert torch.equal(got[:, 64:100], want[:, 64:100])


def test_levels_are_saved_with_what_they_belong_to() -> None:
    cache, (k, v) = make(), tokens(150)
    cache.append(k, v)
    saved = dump(cache)
    again, plain = make(), make(smooth="none")
    for target in (again, plain):
        restore(target, saved)
        for got, want in zip(target.read(0), cache.read(0), strict=True):
            assert torch.equal(got, want)
    plain = make(smooth="none")
    plain.append(k, v)
    assert plain.levels is None
    old = make()
    restore(old, dump(plain))
    for got, want in zip(old.read(0), plain.read(0), strict=True):
        assert torch.equal(got, want)


def test_float16_holds_every_power_and_its_inverse() -> None:
    cache = make()
    cache.append(*(1e-7 * x for x in tokens(80)))
    for x in levels_of(cache).tensors:
        assert bool((x > 0).all() & x.isfinite().all())
