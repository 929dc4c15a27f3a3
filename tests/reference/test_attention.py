"""Laws of the reference, checked against a plain float64 softmax that shares no code with it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thrift_attn import Stats, ThriftConfig, attention, fraction, merge, top_k
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference import attention as reference
from thrift_attn.reference.formats import FORMATS
from thrift_attn.reference.quantize import block_means, roundtrip

ODD = [1, 63, 64, 65, 1000]
CONFIGS = {
    "default": ThriftConfig(base_format="nvfp4"),
    "paper": ThriftConfig.paper(),
    "16bit": ThriftConfig(base_format="nvfp4", compute="16bit"),
    "no sink": ThriftConfig(base_format="nvfp4", sink_token="none", force_first=1),
    "nested": ThriftConfig(base_format="nvfp4", promoted_storage="nested"),
    "nested8": ThriftConfig(base_format="nvfp4", promoted_storage="nested8", compute="16bit"),
    "mxfp4": ThriftConfig(base_format="mxfp4"),
    "fp8": ThriftConfig(base_format="fp8"),
    "quest": ThriftConfig(base_format="nvfp4", score="quest"),
    "oracle": ThriftConfig(base_format="nvfp4", score="oracle"),
    "sparse": ThriftConfig.sparse("oracle"),
}
CONFIGS = {
    name: config.with_(budget=fraction(0.05)) for name, config in CONFIGS.items()
}  # no floor: sequences are short


def qkv(tq, tk, *, b=1, hq=4, hkv=2, d=64, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((b, hq, tq, d), (b, hkv, tk, d), (b, hkv, tk, d))
    return tuple(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)


def visibility(tq, tk, causal, window):
    q, k = torch.arange(tq)[:, None] + (tk - tq if causal else 0), torch.arange(tk)
    see = (k <= q) if causal else torch.ones(tq, tk, dtype=torch.bool)
    return see & (k > q - window) if window else see


def plain(q, k, v, *, causal=True, scale=None, window=None, softcap=None):
    """Softmax attention in float64, the definition."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visibility(q.shape[2], k.shape[2], causal, window), -torch.inf)
    lse = logits.logsumexp(-1)
    p = torch.where(lse[..., None] == -torch.inf, 0, (logits - lse[..., None]).exp())
    return p @ v, lse


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


EXACT = {
    "causal": {},
    "full": {"causal": False},
    "scaled": {"scale": 0.3},
    "window": {"window": 70},
    "cap": {"softcap": 3.0},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("tk", ODD)
def test_budget_one_is_dense(tk, options):
    q, k, v = qkv(tk, tk)
    out, lse = attention(q, k, v, config=ThriftConfig(budget=fraction(1)), return_lse=True, **options)
    want, want_lse = plain(q, k, v, **options)
    assert relative(out, want) < 1e-6
    assert relative(lse, want_lse) < 1e-6


def test_budget_one_in_float64_is_dense_to_float64():
    q, k, v = qkv(200, 200, dtype=torch.float64)
    out, lse = attention(q, k, v, config=ThriftConfig(budget=fraction(1)), return_lse=True)
    want, want_lse = plain(q, k, v)
    assert lse.dtype == torch.float64
    assert relative(out, want) < 1e-14
    assert relative(lse, want_lse) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_lose_only_the_rounding_of_the_output(dtype):
    q, k, v = qkv(130, 130, dtype=dtype)
    out = attention(q, k, v, config=ThriftConfig(budget=fraction(1)))
    assert out.dtype == dtype
    assert relative(out, plain(q, k, v)[0]) < torch.finfo(dtype).eps


def emulate(q, k, v, *, fmt_name, center, math_, best, less_mean=False, rounded=False, sink=False):
    """The low path at budget 0, with ``sink`` the exact first token, from the definitions head by head, in float64."""
    fmt = FORMATS[fmt_name]
    out = torch.zeros_like(q, dtype=torch.float64)
    group, tokens = q.shape[1] // k.shape[1], k.shape[2]
    pad = -tokens % 64
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kh, vh, qh = k[b, h // group], v[b, h // group], q[b, h]
            mean = (
                block_means(kh).repeat_interleave(64, 0)[:tokens].double() if center else torch.zeros_like(kh).double()
            )
            if sink:
                mean[:64] = kh[0].double()
                vh = vh.clone()
                vh[0] = 0
            khat = roundtrip((kh.double() - mean).float(), fmt, best=best).double()
            vhat = roundtrip(torch.nn.functional.pad(vh, (0, 0, 0, pad)).float(), fmt, -2, best=best)[:tokens].double()
            of_call = qh.mean(0, keepdim=True) if less_mean else torch.zeros_like(qh[:1])
            qhat = roundtrip((qh - of_call).float(), fmt, best=best).double() if math_ == "fp4" else qh.double()
            logits = (qhat @ khat.T + qh.double() @ mean.T) / math.sqrt(q.shape[-1])
            logits += of_call.double() @ (kh.double() - mean).T / math.sqrt(q.shape[-1])
            logits = logits.masked_fill(~visibility(q.shape[2], tokens, True, None), -torch.inf)
            p = (logits - logits.amax(-1, keepdim=True)).exp()
            p_sink = p[:, :1] * sink
            p = torch.cat([p[:, :1] - p_sink, p[:, 1:]], 1)
            phat = p
            if math_ == "fp4":
                padded = torch.nn.functional.pad(p, (0, pad)) * fmt.p_factor
                phat = (roundtrip(padded.float(), fmt).double() / fmt.p_factor)[:, :tokens]
            total = p_sink + (phat if rounded else p).sum(-1, keepdim=True)
            out[b, h] = (phat @ vhat + p_sink * v[b, h // group, :1].double()) / total
    return out


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(
    ("center", "sink"), [("all", "exact"), ("all", "none"), ("block", "exact"), ("none", "none")], ids="-".join
)
@pytest.mark.parametrize("math_", ["fp4", "16bit"])
@pytest.mark.parametrize(("tokens", "scales", "total"), [(65, "best", "rounded"), (200, "max", "exact")])
def test_budget_zero_is_pure_low_precision(fmt, center, sink, math_, tokens, scales, total):
    q, k, v = qkv(tokens, tokens)
    form = {
        "base_format": fmt,
        "center": center,
        "sink_token": sink,
        "compute": math_,
        "scales": scales,
        "normalize": total,
    }
    config = ThriftConfig(smooth="none", budget=fraction(0), **form)
    out, stats = attention(q, k, v, config=config, return_stats=True)
    fp4 = math_ == "fp4"
    want = emulate(
        q, k, v, fmt_name=fmt, center=center != "none", math_=math_, best=scales == "best",
        less_mean=fp4 and center == "all", rounded=fp4 and total == "rounded",
        sink=sink == "exact",
    )  # fmt: skip
    # A rounding tie of P may fall either way in float32: that moves single codes, not the whole.
    assert relative(out, want) < 2e-3
    assert stats.promoted == 0
    assert (stats.high_mass == 0) == (sink == "none")  # what the first token has is in high precision


def test_paper_form_does_not_depend_on_what_is_not_in_it():
    q, k, v = qkv(300, 300)
    base = attention(q, k, v, config=ThriftConfig.paper())
    plainly = ThriftConfig(
        center="none", sink_token="none", scales="max", normalize="exact", force_first=0, force_last=0, budget=0.05
    )
    assert torch.equal(base, attention(q, k, v, config=plainly))
    assert not torch.equal(base, attention(q, k, v, config=ThriftConfig(budget=0.05)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tq", [17, 64, 65, 200])  # fewer are decode, where a KV head's queries share one list
def test_gqa_equals_expanded_heads(name, tq):
    q, k, v = qkv(tq, 300, hq=6)
    config = CONFIGS[name]
    out = attention(q, k, v, config=config)
    expanded = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), config=config)
    torch.testing.assert_close(out, expanded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_list_per_kv_head_in_decode(name):
    q, k, v = qkv(3, 700, hq=6)
    config = CONFIGS[name].with_(budget=top_k(4))
    mask = reference.Mask(3, 700, True, None)
    planes = reference.build_planes(k[0], v[0], PrefillNumerics.resolve(config))
    promoted, _ = reference._Sequence(q[0], planes, PrefillNumerics.resolve(config), mask, 0.125, None).select()
    assert promoted.shape == (6, 1, 11)
    assert torch.equal(promoted[0], promoted[1])
    assert torch.equal(promoted[3], promoted[5])
    assert (promoted.sum(-1) == 4).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_equals_unpadded(name):
    lengths = [100, 1, 64, 257]
    q, k, v = qkv(130, 257, b=4)
    for row, length in enumerate(lengths):
        k[row, :, length:] = math.nan
        v[row, :, length:] = math.nan
    batch, lse = attention(q, k, v, config=CONFIGS[name], kv_lengths=torch.tensor(lengths), return_lse=True)
    assert not batch.isnan().any()
    for row, length in enumerate(lengths):
        seen = min(130, length)  # queries before position 0 see nothing
        own = [x[row : row + 1] for x in (q[:, :, 130 - seen :], k[:, :, :length], v[:, :, :length])]
        if seen > 16:  # shorter calls count as decode by themselves
            alone, alone_lse = attention(*own, config=CONFIGS[name], return_lse=True)
            torch.testing.assert_close(batch[row : row + 1, :, 130 - seen :], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse[row : row + 1, :, 130 - seen :], alone_lse, rtol=1e-5, atol=1e-5)
        assert not batch[row, :, : 130 - seen].any()
        assert (lse[row, :, : 130 - seen] == -math.inf).all()


@pytest.mark.parametrize("name", ["default", "paper", "nested", "mxfp4", "quest", "16bit"])
@pytest.mark.parametrize("cut", [64, 128, 192])
def test_chunked_prefill_equals_whole(name, cut):
    # Chunks cut at block boundaries see the same query blocks and, with top_k, the same number of promoted blocks.
    # A mean query is taken from the call, so that law is for K centring alone.
    config = CONFIGS[name].with_(budget=top_k(2))
    config = config.with_(center="block") if config.center == "all" else config
    q, k, v = qkv(300, 300)
    whole = attention(q, k, v, config=config)
    first = attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], config=config)
    second = attention(q[:, :, cut:], k, v, config=config)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-4, atol=1e-5)


def test_query_blocks_are_cut_at_absolute_positions():
    # A chunk that starts inside a block agrees with the whole from its first block boundary on.
    config = ThriftConfig(budget=top_k(2), center="block")
    q, k, v = qkv(300, 300)
    whole = attention(q, k, v, config=config)
    chunk = attention(q[:, :, 100:], k, v, config=config)
    torch.testing.assert_close(chunk[:, :, 28:], whole[:, :, 128:], rtol=1e-4, atol=1e-5)


def test_a_mean_query_of_a_chunk_costs_nothing():
    q, k, v = qkv(300, 300)
    q = q + 2
    config = ThriftConfig(budget=top_k(2))
    parts = [
        attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], config=config) for a, b in ((0, 100), (100, 130), (130, 300))
    ]
    exact = plain(q, k, v)[0]
    assert relative(torch.cat(parts, 2), exact) < 1.1 * relative(attention(q, k, v, config=config), exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunk_size_does_not_matter(name, monkeypatch):
    q, k, v = qkv(500, 500)
    whole, lse, stats = attention(q, k, v, config=CONFIGS[name], return_lse=True, return_stats=True)
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", 1)
    small, small_lse, small_stats = attention(q, k, v, config=CONFIGS[name], return_lse=True, return_stats=True)
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small_lse, lse, rtol=1e-5, atol=1e-5)
    assert small_stats.promoted == stats.promoted
    assert small_stats.high_mass == pytest.approx(stats.high_mass, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_merging_is_order_free_and_split_equals_whole(order, cuts):
    q, k, v = qkv(20, 60, dtype=torch.float64)
    config = ThriftConfig(budget=fraction(1))
    ends = [0, *sorted(cuts), 60]
    outs, lses = [], []
    for start, stop in itertools.pairwise(ends):
        if start == stop:  # an empty part
            outs.append(torch.zeros_like(q))
            lses.append(torch.full(q.shape[:3], -math.inf, dtype=q.dtype))
        else:
            part = attention(q, k[:, :, start:stop], v[:, :, start:stop], config=config, causal=False, return_lse=True)
            outs.append(part[0])
            lses.append(part[1])
    want = attention(q, k, v, config=config, causal=False, return_lse=True)
    out, lse = merge([outs[i] for i in order], [lses[i] for i in order])
    assert relative(out, want[0]) < 1e-14
    assert relative(lse, want[1]) < 1e-14


def test_merging_nothing_is_refused_and_merging_empty_parts_is_empty():
    with pytest.raises(ValueError, match="at least one"):
        merge([], [])
    empty = torch.full((2, 3), -math.inf)
    out, lse = merge([torch.zeros(2, 3, 8)] * 2, [empty] * 2)
    assert not out.any()
    assert torch.equal(lse, empty)


@pytest.mark.parametrize("name", ["default", "paper", "nested", "16bit", "fp8", "mxfp4"])
def test_more_budget_is_less_error(name):
    q, k, v = qkv(512, 512)
    q = q * 3  # peaked attention, where promotion matters
    want = plain(q, k, v)[0]
    config = CONFIGS[name].with_(score="oracle")
    errors = [relative(attention(q, k, v, config=config.with_(budget=fraction(f))), want) for f in (0, 0.1, 0.5, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]


def test_error_budget_of_the_low_path():
    # Each nvfp4 rounding is uniform in a spacing: for Gaussian data about 0.095 relative error, so the logits of std 1
    # carry sqrt(2) * 0.095 of noise, and P and V each 0.095 again. Uniform attention averages V errors and signal alike.
    q, k, v = qkv(512, 512, hq=2)
    bound = {"fp4": 0.2, "16bit": 0.14}
    for math_, limit in bound.items():
        out = attention(q, k, v, config=ThriftConfig(budget=fraction(0), compute=math_))
        assert relative(out, plain(q, k, v)[0]) < limit


def test_centring_rescues_a_large_channel_bias():
    q, k, v = qkv(512, 512)
    k = k + 40 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    want = plain(q, k, v)[0]
    plainly = relative(attention(q, k, v, config=ThriftConfig.paper(budget=fraction(0))), want)
    centred = relative(attention(q, k, v, config=ThriftConfig(budget=fraction(0))), want)
    assert centred < 0.25 < 0.8 < plainly


@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.3, 1])
@pytest.mark.parametrize("tokens", [64, 1000, 4096])
def test_stats_report_asked_and_achieved_share(share, tokens):
    q, k, v = qkv(tokens, tokens, hq=1, hkv=1, d=16)
    config = ThriftConfig(budget=fraction(share), compute="16bit")
    _, stats = attention(q, k, v, config=config, return_stats=True)
    blocks = -(-tokens // 64)
    assert stats.visible == blocks * (blocks + 1) // 2
    assert stats.asked_share == pytest.approx(share)
    assert abs(stats.promoted - share * stats.visible) <= 0.5 + 1e-6
    assert 0 <= stats.high_mass <= 1 + 1e-6
    assert (stats + stats).share == stats.share
    assert Stats().share == Stats().high_mass == Stats().asked_share == 0


def test_window_hides_blocks_from_the_budget():
    q, k, v = qkv(640, 640, hq=1, hkv=1)
    _, stats = attention(q, k, v, window=64, return_stats=True)
    assert stats.visible == 10 + 9  # the diagonal block and, but for the first row, the one before


def test_a_fault_in_the_input_stays_visible():
    q, k, v = qkv(128, 128)
    k[0, 0, 5, 3] = math.nan
    out = attention(q, k, v)
    assert out[0, :2, 64:].isnan().any()
    assert out[0, 2:].isfinite().all()


@pytest.mark.parametrize("d", [16, 32, 80, 96, 128, 256])
def test_head_dims(d):
    q, k, v = qkv(70, 70, d=d)
    low = "nvfp4" if d % 32 else "mxfp4"
    assert (
        relative(attention(q, k, v, config=ThriftConfig(base_format=low, budget=fraction(1))), plain(q, k, v)[0]) < 1e-6
    )
    assert relative(attention(q, k, v, config=ThriftConfig(base_format=low, budget=0.05)), plain(q, k, v)[0]) < 0.4


def test_memory_grows_with_the_length_and_not_with_its_square():
    import resource

    q, k, v = qkv(17, 32_768, hq=2, hkv=1)
    attention(q, k, v)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    q, k, v = qkv(8192, 8192, hq=2, hkv=1)
    attention(q, k, v, config=ThriftConfig(budget=fraction(0.01)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 600 * 1024  # one [2, 8192, 8192] float32 tensor alone is 512 MiB, and the method makes about ten
