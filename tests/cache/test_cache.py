"""The paged cache in plain PyTorch: bookkeeping, storage and attention over pages."""

import math

import pytest
import torch

from support.caches import HIGH, make, query, same, state, tokens
from thrift_attn import ThriftConfig, attention, fraction, top_k
from thrift_attn.cache import PagedThriftCache
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.formats import RESIDUALS
from thrift_attn.reference.pages import Pool, read_blocks, write_blocks
from thrift_attn.reference.quantize import block_means, roundtrip


@pytest.mark.parametrize("high", HIGH)
@pytest.mark.parametrize("low", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("centred", [True, False])
def test_pages_decode_to_what_the_formats_define(high, low, centred):
    from thrift_attn.reference.formats import FORMATS

    k, v = (x.squeeze(0).unflatten(1, (3, 64)).transpose(0, 1) for x in tokens(192))  # [n, Hkv, 64, D]
    pool = Pool.empty(5, 2, 64, high, torch.float32, torch.device("cpu"))
    pages = torch.tensor([4, 0, 2])
    center, sink = ("block", "exact") if centred else ("none", "none")
    config = ThriftConfig.for_cache(base_format=low, promoted_storage=high, center=center, sink_token=sink)
    numerics = DecodeNumerics.resolve(config)
    write_blocks(pool, pages, k, v, numerics=numerics)
    read = read_blocks(pool, pages, numerics=numerics)
    mean = block_means(k)
    delta = k - mean if centred else k
    assert torch.equal(read.k_block_mean, mean[..., 0, :])
    low_k, low_v = roundtrip(delta, FORMATS[low], best=True), roundtrip(v, FORMATS[low], -2, best=True)
    assert torch.equal(read.low_k, low_k)
    assert torch.equal(read.low_v, low_v)
    if high == "16bit":
        assert torch.equal(read.high_k, k)
        assert torch.equal(read.high_v, v)
    else:
        fine = roundtrip(v - low_v, RESIDUALS[high], -2, best=True)
        assert torch.equal(read.high_v, low_v + fine)
        assert (read.high_k - k).norm() < 0.02 * k.norm()
    assert not pool.base[1].any()  # other pages are left alone


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_bytes_per_token(dim):
    sixteen = 2 * 2 * dim * 2  # K and V, two heads, two bytes
    ratio = {
        high: make(pages=1, dim=dim, config=ThriftConfig.for_cache(promoted_storage=high)).bytes_per_token()
        for high in HIGH
    }
    # float32 in these tests doubles the 16-bit parts: c_b always, and the copy.
    centre = 2 * dim * 4 / 64
    assert (ratio["nested"] - centre / 2) / sixteen <= (0.58 if dim % 32 == 0 else 0.61)
    assert (ratio["nested8"] - centre / 2) / sixteen <= (0.83 if dim % 32 == 0 else 0.88)
    assert ratio["nested"] < ratio["nested8"] < ratio["16bit"]


def test_bytes_per_token_of_the_default_at_128():
    cache = PagedThriftCache(batch=1, kv_heads=8, head_dim=128, num_pages=4, dtype=torch.bfloat16, device="cpu")
    assert cache.bytes_per_token() == 8 * 128 * 2 * (4.5 + 4.5) / 8 + 8 * 128 * 2 / 64
    assert cache.bytes_per_token() <= 0.58 * 8 * 128 * 2 * 2


@pytest.mark.parametrize("high", HIGH)
@pytest.mark.parametrize("steps", [[200], [1] * 70, [63, 1, 1, 64, 65], [64, 64], [130, 62, 7], [5, 300]])
def test_split_appends_equal_one(high, steps):
    count = sum(steps)
    k, v = tokens(count)
    config = ThriftConfig.for_cache(budget=0.05, promoted_storage=high)
    whole, parts = make(config=config), make(config=config)
    whole.append(k, v)
    start = 0
    for n in steps:
        parts.append(k[:, :, start : start + n], v[:, :, start : start + n])
        start += n
    assert same(state(whole, 0), state(parts, 0))
    assert torch.equal(whole.attend(query()), parts.attend(query()))
    tail = count % 64
    if tail:
        assert torch.equal(parts.read(0)[0][:, -tail:], k[0, :, -tail:])


@pytest.mark.parametrize("high", HIGH)
@pytest.mark.parametrize(("length", "tq"), [(1, 1), (63, 1), (64, 5), (65, 5), (1000, 1), (1000, 5)])
def test_paged_equals_contiguous(high, length, tq):
    # With whole blocks the pages hold what the reference computes; an incomplete block is exact in the cache.
    k, v = tokens(length)
    config = ThriftConfig.for_cache(promoted_storage=high, budget=top_k(3))
    cache = make(config=config)
    cache.append(k, v)
    q = query(tq)
    got, lse = cache.attend(q, return_lse=True)
    want, want_lse = attention(q, k, v, config=config, return_lse=True)
    if length % 64 == 0:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    exact, exact_lse = attention(q, k, v, config=ThriftConfig(budget=fraction(1)), return_lse=True)
    assert (got - exact).norm() <= 1.05 * (want - exact).norm() + 1e-5
    assert (lse - exact_lse).abs().max() < 0.1


def test_window_and_softcap_reach_the_attention():
    k, v = tokens(640)
    cache = make(config=ThriftConfig.for_cache(budget=fraction(1), promoted_storage="16bit"))
    cache.append(k, v)
    for options in ({"window": 100}, {"softcap": 2.0}, {"scale": 0.5}):
        want = attention(query(), k, v, config=ThriftConfig(budget=fraction(1)), **options)
        torch.testing.assert_close(cache.attend(query(), **options), want, rtol=1e-5, atol=1e-5)


def test_ragged_batches_equal_rows_alone():
    lengths = [0, 1, 64, 199]
    k, v = tokens(199, batch=4)
    cache = make(batch=4)
    cache.append(k, v, lengths=lengths)
    assert cache.lengths.tolist() == lengths
    q = query(batch=4)
    out, lse = cache.attend(q, return_lse=True)
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()
    for seq in range(1, 4):
        alone = make()
        alone.append(k[seq : seq + 1, :, : lengths[seq]], v[seq : seq + 1, :, : lengths[seq]])
        torch.testing.assert_close(out[seq : seq + 1], alone.attend(q[seq : seq + 1]), rtol=1e-5, atol=1e-6)


def test_a_freed_page_shows_nothing_of_its_past():
    cache = make(batch=2, pages=4)
    k, v = tokens(256, batch=2)
    cache.append(k * math.nan, v * math.nan, lengths=[256, 0])
    assert cache.attend(query(batch=2))[0].isnan().all()
    cache.free(0)
    assert cache.table.free_pages == 4
    cache.append(k, v, lengths=[0, 200])
    fresh = make(pages=4)
    fresh.append(k[1:, :, :200], v[1:, :, :200])
    q = query(batch=2)
    assert torch.equal(cache.attend(q)[1:], fresh.attend(q[1:]))


def test_exhaustion_is_told_before_anything_is_written():
    cache = make(batch=2, pages=3)
    k, v = tokens(130, batch=2)
    cache.append(k, v, lengths=[130, 10])
    before = [state(cache, seq) for seq in range(2)]
    with pytest.raises(RuntimeError, match="exhausted: 2 more pages are needed and 1 of 3 are free"):
        cache.append(k, v, lengths=[0, 130])
    assert all(same(state(cache, seq), before[seq]) for seq in range(2))
    with pytest.raises(ValueError, match="more than its 1 pages of 64 tokens hold"):
        make(max_pages=1).append(*tokens(128))
    cache.free(0)
    cache.append(k, v, lengths=[0, 130])
    assert cache.tokens(1) == 140


def test_fork_shares_complete_blocks_and_copies_on_write():
    cache = make(batch=2, pages=8)
    k, v = tokens(400, batch=2)
    cache.append(k, v, lengths=[150, 70])
    cache.fork(0, 1)
    assert cache.table.free_pages == 6  # two complete blocks, held twice
    assert same(state(cache, 0), state(cache, 1))
    before = state(cache, 0)
    cache.append(k[:, :, 150:], v[:, :, 150:], lengths=[0, 100])
    assert same(state(cache, 0), before)
    cache.free(0)
    alone = make()
    alone.append(k[:1, :, :150], v[:1, :, :150])
    alone.append(k[1:, :, 150:250], v[1:, :, 150:250])
    assert same(state(cache, 1), state(alone, 0))
    cache.free(1)
    assert cache.table.free_pages == 8


@pytest.mark.parametrize("high", HIGH)
@pytest.mark.parametrize(
    ("length", "keep"), [(130, 126), (130, 65), (190, 128), (128, 100), (64, 63), (100, 0), (77, 77)]
)
def test_taking_back_new_tokens_is_lossless(high, length, keep):
    k, v = tokens(300)
    config = ThriftConfig.for_cache(budget=0.05, promoted_storage=high)
    cache, want = make(config=config), make(config=config)
    cache.append(k[:, :, :length], v[:, :, :length])
    cache.truncate(0, keep)
    want.append(k[:, :, :keep], v[:, :, :keep])
    assert same(state(cache, 0), state(want, 0))
    assert cache.table.free_pages == want.table.free_pages
    for one in (cache, want):  # and it goes on from there
        one.append(k[:, :, keep : keep + 90], v[:, :, keep : keep + 90])
    assert same(state(cache, 0), state(want, 0))
    assert torch.equal(cache.attend(query()), want.attend(query()))


@pytest.mark.parametrize("high", ["nested", "nested8"])
@pytest.mark.parametrize(("steps", "keep"), [([128], 50), ([320], 200), ([64, 64], 50), ([30, 290], 200), ([330], 260)])
def test_both_of_the_two_newest_blocks_stay_exact(high, steps, keep):
    """However many blocks an append has brought."""
    k, v = tokens(sum(steps))
    cache, want = (make(config=ThriftConfig.for_cache(promoted_storage=high)) for _ in range(2))
    for stop, count in zip(torch.tensor(steps).cumsum(0).tolist(), steps, strict=True):
        cache.append(k[:, :, stop - count : stop], v[:, :, stop - count : stop])
    cache.truncate(0, keep)
    want.append(k[:, :, :keep], v[:, :, :keep])
    assert same(state(cache, 0), state(want, 0))


def test_truncating_far_back_reads_the_page():
    k, v = tokens(640)
    cache = make()
    cache.append(k, v)
    cache.truncate(0, 100)
    got = cache.read(0)[0]
    assert got.shape[1] == 100
    assert (got - k[0, :, :100]).norm() < 0.02 * k[0, :, :100].norm()
    cache.append(k[:, :, 100:640], v[:, :, 100:640])
    assert cache.tokens(0) == 640


def test_truncating_a_shared_prefix_leaves_the_other_alone():
    k, v = tokens(640)
    cache = make(batch=2, pages=20)
    cache.append(k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), lengths=[640, 0])
    cache.fork(0, 1)
    before = state(cache, 0)
    cache.truncate(1, 70)
    cache.append(*tokens(200, batch=2, seed=4), lengths=[0, 200])
    assert same(state(cache, 0), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"pages": 0}, ValueError, "num_pages must be at least 1"),
        ({"dim": 72}, ValueError, "multiple of 16, got 72"),
        ({"config": ThriftConfig()}, NotImplementedError, "compute='16bit'"),
        ({"config": ThriftConfig.for_cache(score="oracle")}, NotImplementedError, "score='mean'"),
        ({"config": ThriftConfig.for_cache(base_format="fp8")}, NotImplementedError, "base_format='nvfp4' or 'mxfp4'"),
        ({"config": ThriftConfig.for_cache(base_format="mxfp4"), "dim": 80}, ValueError, "multiple of 32"),
    ],
)
def test_what_the_cache_does_not_serve(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda cache, k: cache.append(k, k, lengths=[1.5]), TypeError, r"a length must be a whole number, got 1\.5"),
        (lambda cache, k: cache.append(k.tolist(), k), TypeError, "k must be a tensor, got list"),
        (lambda cache, k: cache.truncate(0, 0.5), TypeError, r"tokens must be a whole number, got 0\.5"),
        (lambda cache, k: cache.free(0.5), TypeError, r"seq must be a whole number, got 0\.5"),
        (lambda cache, k: cache.select([0.5]), TypeError, r"seq must be a whole number, got 0\.5"),
        (lambda cache, k: cache.reserve(0.5), TypeError, r"tokens must be a whole number, got 0\.5"),
        (lambda cache, k: cache.reserve(-1), ValueError, "tokens must be at least 0"),
        (lambda cache, k: cache.reserve([1, 1]), ValueError, "one number or one for each of 1 sequences"),
    ],
)
def test_what_is_no_number_of_tokens_or_rows_is_refused_and_changes_nothing(call, error, message):
    cache = make()
    k, v = tokens(70)
    cache.append(k, v)
    before = state(cache, 0)
    with pytest.raises(error, match=message):
        call(cache, k)
    assert cache.is_intact
    assert same(state(cache, 0), before)


def test_bad_input_changes_nothing():
    cache = make()
    k, v = tokens(70)
    cache.append(k, v)
    before = state(cache, 0)
    bad = [
        (lambda: cache.append(k[0], v[0]), ValueError, "4 dimensions"),
        (lambda: cache.append(k.half(), v.half()), TypeError, "dtype of the cache, torch.float32, got torch.float16"),
        (lambda: cache.append(k, v[:, :, :3]), ValueError, "k and v must have shape"),
        (lambda: cache.append(k, v, lengths=[71]), ValueError, "numbers from 0 to 70"),
        (lambda: cache.append(k, v, lengths=[1, 1]), ValueError, "1 numbers"),
        (lambda: cache.attend(query(17)), ValueError, "1 to 16 new tokens, got 17"),
        (lambda: cache.attend(query(heads=3)), ValueError, "a multiple of 2"),
        (lambda: cache.attend(query(), scale=math.nan), ValueError, "scale"),
        (lambda: cache.attend(query(), window=0), ValueError, "window"),
        (lambda: cache.attend(query(), softcap=-1), ValueError, "softcap"),
        (lambda: cache.truncate(0, 71), ValueError, "cannot keep 71"),
        (lambda: cache.truncate(1, 0), ValueError, "seq must be from 0 to 0"),
        (lambda: cache.fork(0, 0), ValueError, "must differ"),
        (lambda: cache.free(-1), ValueError, "seq must be"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
    assert same(state(cache, 0), before)


def test_dtypes():
    with pytest.raises(TypeError, match=r"float16 or bfloat16, got torch\.float64"):
        PagedThriftCache(batch=1, kv_heads=1, head_dim=64, num_pages=1, dtype=torch.float64, device="cpu")


def test_blocks_without_a_page_are_below_zero():
    """Kernels write nothing for them: after a release, a repeated row and a branch, too."""
    cache = make(batch=2)
    cache.append(*tokens(130, batch=2))
    cache.reserve(64)

    def without(held):
        table = held.table.table
        return [(pages >= 0).sum().item() for pages in table], [len(owned) for owned in held.table._owned]

    assert without(cache) == ([3, 3], [3, 3])
    assert without(cache.branch()) == ([2, 2], [2, 2])
    cache.truncate(0, 70)
    assert without(cache) == ([1, 3], [1, 3])
    cache.select([1, 1])
    assert without(cache) == ([3, 2], [3, 2])
    cache.free(0)
    assert without(cache) == ([0, 2], [0, 2])


@pytest.mark.parametrize("back", [0, 64])
def test_truncate_forgets_what_it_took_back(back):
    cache = PagedThriftCache(batch=1, kv_heads=1, head_dim=32, num_pages=8, dtype=torch.float32, device="cpu")
    old, new = torch.randn(2, 1, 1, 128, 32)
    cache.append(old[:, :, : back + 10], old[:, :, : back + 10])
    cache.truncate(0, back)
    cache.append(new, new)
    cache.truncate(0, back + 8)
    assert (cache.read(0)[0][:, back:] - new[0, :, :8]).abs().max() < 0.5


def test_max_tokens_is_the_limit_of_a_sequence():
    cache = PagedThriftCache(
        batch=1, kv_heads=1, head_dim=16, num_pages=8, max_tokens=100, dtype=torch.float32, device="cpu"
    )
    x = torch.randn(1, 1, 101, 16)
    with pytest.raises(ValueError, match="would have 101 tokens, and may have 100"):
        cache.append(x, x)
    cache.append(x[:, :, :100], x[:, :, :100])
    with pytest.raises(ValueError, match="would have 101 tokens, and may have 100"):
        cache.reserve(1)
    with pytest.raises(ValueError, match="max_pages must be at least 1, got 0"):
        PagedThriftCache(batch=1, kv_heads=1, head_dim=16, num_pages=8, max_pages=0, dtype=torch.float32, device="cpu")
