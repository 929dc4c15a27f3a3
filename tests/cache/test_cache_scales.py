"""Powers of two inside a cache: each sequence's own, from its first block, and gone from everything that leaves it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thrift_attn import ThriftConfig, attention, top_k
from thrift_attn.cache.paged import PagedThriftCache
from thrift_attn.cache.state import load_state_dict, state_dict

HEADS, DIM = 2, 32


def tokens(count: int, batch: int = 1, dtype: torch.dtype = torch.float16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """K with outlier channels and tiny V."""
    draw = torch.Generator().manual_seed(1000 * seed + count)
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


def scales(cache: PagedThriftCache, seq: int = 0) -> tuple[Tensor, Tensor]:
    """Copies of the scales of one sequence."""
    k_scale, v_scale = cache.per_sequence.k_channel_scale, cache.per_sequence.v_head_scale
    assert k_scale is not None
    assert v_scale is not None
    return k_scale[seq].clone(), v_scale[seq].clone()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_what_is_kept_in_16_bits_is_what_was_appended(count: int, dtype: torch.dtype) -> None:
    """The newest blocks and pages of the copy, bit for bit, however small V is."""
    cache, (k, v) = make(dtype=dtype, promoted_storage="16bit"), tokens(count, dtype=dtype)
    cache.append(k, v)
    for power in scales(cache):
        assert torch.equal(power.log2(), power.log2().round())
    assert same(cache.read(0), (k[0], v[0]))
    assert same(cache.widen(), (k, v))


def test_a_cache_computes_what_attention_computes() -> None:
    """In exact arithmetic but for the scales, which attention takes from all blocks and a cache from the first."""
    config = ThriftConfig.for_cache(budget=top_k(2), smooth="none")
    cache, (k, v) = make(dtype=torch.float32, budget=config.budget, smooth="none"), tokens(256, dtype=torch.float32)
    cache.append(k, v)
    q = torch.randn(1, 2 * HEADS, 3, DIM)
    want, want_lse = attention(q, k, v, config=config, return_lse=True)
    got, lse = cache.attend(q, return_lse=True)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("storage", ["nested", "nested8", "16bit"])
def test_scales_bring_pages_nearer(storage) -> None:
    """With outlier channels and tiny V, what the 4-bit planes say is nearer with scales than without."""
    k, v = tokens(256, dtype=torch.float32)
    q = torch.randn(1, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(1)) / 30
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    error = {}
    for smooth in ("channel", "none"):
        cache = make(dtype=torch.float32, smooth=smooth, promoted_storage=storage, budget=top_k(0))
        cache.append(k, v)
        error[smooth] = float((cache.attend(q) - exact).norm() / exact.norm())
    assert error["channel"] < 0.9 * error["none"]


def test_a_sequence_takes_its_own_with_its_first_block() -> None:
    """Whatever its neighbours hold, and however its tokens come in."""
    small, large = tokens(150), tuple(50 * x for x in tokens(150, seed=1))
    k, v = (torch.cat(pair) for pair in zip(small, large, strict=True))
    cache, ones = make(batch=2), scales(make())
    cache.append(k[:, :, :63], v[:, :, :63])
    assert same(scales(cache, 0), ones)
    assert same(scales(cache, 1), ones)
    cache.append(k[:, :, 63:], v[:, :, 63:], lengths=[0, 87])
    assert same(scales(cache, 0), ones)
    cache.append(k[:, :, 63:], v[:, :, 63:], lengths=[87, 0])
    for seq, one in enumerate((small, large)):
        alone = make()
        alone.append(*one)
        assert same(scales(cache, seq), scales(alone))
        assert same(cache.read(seq), alone.read(0))
    assert not same(scales(cache, 0), scales(cache, 1))


def test_one_strange_first_token_decides_nothing() -> None:
    """The attention sink is left out of the sample."""
    cache, other, (k, v) = make(), make(), tokens(100)
    cache.append(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 0], v[:, :, 0] = 20 * k[:, :, 1], 0
    other.append(k, v)
    assert same(scales(cache), scales(other))


@pytest.mark.parametrize("sink", ["exact", "none"])
@pytest.mark.parametrize("base", ["nvfp4", "mxfp4"])
def test_a_huge_first_token_stays_within_the_pages(base, sink) -> None:
    """Its block is read to the precision of its largest element, and later ones as if scales had come from themselves.

    Two roundings to 4 bits (1/4, then 1/8 at most) leave 1/32 of the largest element of a group.
    """
    (k, v), first = tokens(192, dtype=torch.float32), torch.randn(2, HEADS, DIM, generator=torch.manual_seed(5))
    k[:, :, 0], v[:, :, 0] = 3e4 * first[0], 100 * first[1]
    cache = make(dtype=torch.float32, base_format=base, sink_token=sink)
    cache.append(k, v)
    for got, want in zip(cache.read(0), (k[0], v[0]), strict=True):
        largest = want[:, :64].abs().amax((1, 2), keepdim=True)
        assert ((got[:, :64] - want[:, :64]).abs() <= 2 * largest / 32).all()
    if sink == "exact":
        assert torch.equal(cache.read(0)[0][:, 0], k[0, :, 0])
        assert (cache.read(0)[1] - v[0]).abs().max() <= v[:, :, 1:].abs().max() / 32


def test_a_freed_sequence_forgets_and_a_fork_inherits() -> None:
    """Also where its first block was taken back: what comes then decides."""
    cache, (k, v), (k2, v2) = make(batch=2), tokens(100), tokens(100, seed=2)
    k2, v2 = 20 * k2, 20 * v2
    alone = make()
    alone.append(k2, v2)
    for forget in (lambda: cache.free(0), lambda: cache.truncate(0, 0)):
        cache.free(0)
        cache.append(k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), lengths=[100, 0])
        cache.fork(0, 1)
        assert same(scales(cache, 1), scales(cache, 0))
        before = cache.read(1)
        forget()
        cache.append(k2.repeat(2, 1, 1, 1), v2.repeat(2, 1, 1, 1), lengths=[100, 0])
        assert same(scales(cache, 0), scales(alone))
        assert same(cache.read(0), alone.read(0))
        assert same(cache.read(1), before)


def test_beam_search_moves_them() -> None:
    cache, (k, v) = make(batch=2), tokens(100, batch=2)
    k[1], v[1] = 30 * k[1], 30 * v[1]
    cache.append(k, v)
    old = [cache.read(seq) for seq in range(2)]
    cache.select([1, 0])
    assert same(cache.read(0), old[1])
    other = cache.branch()
    cache.select([1, 1, 0])
    assert same(cache.read(0), old[0])
    assert same(cache.read(2), old[1])
    assert same(other.read(0), old[1])


def test_taking_back_tokens_keeps_them_exact() -> None:
    cache, (k, v) = make(), tokens(150)
    cache.append(k, v)
    cache.truncate(0, 100)
    for got, want in zip(cache.read(0), (k[0], v[0]), strict=True):
        assert torch.equal(got[:, 64:100], want[:, 64:100])


def test_scales_are_saved_with_what_they_belong_to() -> None:
    cache, (k, v) = make(), tokens(150)
    cache.append(k, v)
    saved = state_dict(cache)
    again, plain = make(), make(smooth="none")
    for target in (again, plain):
        load_state_dict(target, saved)
        assert same(target.read(0), cache.read(0))
    plain = make(smooth="none")
    plain.append(k, v)
    assert plain.per_sequence.k_channel_scale is None
    old = make()
    load_state_dict(old, state_dict(plain))
    assert same(old.read(0), plain.read(0))
    for wrong in (0.0, 3.0, -2.0, float("nan"), 2.0**70):
        broken = state_dict(cache) | {"v_head_scale": torch.full((1, HEADS), wrong)}
        with pytest.raises(ValueError, match="v_head_scale must hold powers of two"):
            load_state_dict(make(), broken)


@pytest.mark.parametrize("size", [1e-7, 1.0, 2e3])
def test_float16_stays_finite(size) -> None:
    """K s and V g never meet in 16 bits."""
    cache, (k, v) = make(), tokens(200, dtype=torch.float32)
    k, v = ((size * x).clamp(-6e4, 6e4).half() for x in (k, v))
    cache.append(k, v)
    out = cache.attend(torch.randn(1, 2 * HEADS, 2, DIM).half())
    assert out.isfinite().all()
    for got, want in zip(cache.read(0), (k[0], v[0]), strict=True):
        assert (got.float() - want.float()).norm() <= 0.02 * want.float().norm() + 1e-7
