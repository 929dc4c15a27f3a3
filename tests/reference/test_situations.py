"""Calls that other attention libraries have got wrong: right numbers, or an error that says what to do."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from thrift_attn import Budget, ThriftConfig, attention, attention_varlen, floored, fraction, top_k
from thrift_attn.cache import PagedThriftCache
from thrift_attn.reference.budget import promote

EXACT = ThriftConfig(budget=1.0)


def qkv(queries=200, keys=200, dim=32, dtype=torch.float32, heads=(4, 2)):
    draw = torch.Generator().manual_seed(queries + keys + dim)
    shapes = (heads[0], queries), (heads[1], keys), (heads[1], keys)
    return tuple(torch.randn(1, *shape, dim, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)


def dense(q, k, v, window=None, causal=False, scale=None):
    """float64 softmax over |p - j| < window, p the right-aligned position."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).mT * (scale or q.shape[-1] ** -0.5)
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    logits = logits.masked_fill(hidden, -math.inf)
    lse = logits.logsumexp(-1)
    p = (logits - lse[..., None]).exp().masked_fill(hidden, 0)
    return p @ v.repeat_interleave(group, 1), lse


def error(got, want) -> float:
    return float((got.double() - want).norm() / want.norm())


# -- without a causal mask -------------------------------------------------------------------------------------------


def test_without_a_causal_mask_the_forced_block_is_the_querys_own():
    torch.manual_seed(0)
    base = torch.randn(1, 4, 40, 64).repeat_interleave(32, 2)
    q, k = (base * 1.2 + torch.randn(1, 4, 1280, 64) * 0.7 for _ in "qk")
    v = torch.randn(1, 4, 1280, 64)
    want, _ = dense(q, k, v)
    errors = [
        error(attention(q, k, v, config=ThriftConfig(force_last=n, budget=0.05), causal=False), want) for n in (1, 0)
    ]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(("queries", "keys"), [(384, 384), (100, 384), (3, 384), (384, 100)])
def test_local_is_near_whatever_the_mask(queries, keys):
    """With one block each, what is near the query is exact: its own block is of the position of the row's last query."""
    q, k, v = qkv(queries, keys)
    sparse = ThriftConfig.sparse("local", budget=top_k(1), force_first=0, force_last=0)
    out = attention(q, k, v, config=sparse, causal=False)
    rows = [slice(0, queries)] if queries <= 16 else [slice(s, s + 64) for s in range(0, queries, 64)]
    for row in rows:
        last = range(queries)[row][-1] + keys - queries
        own = min(max(last, 0), keys - 1) // 64 * 64
        want, _ = dense(q[:, :, row], k[:, :, own : own + 64], v[:, :, own : own + 64])
        assert error(out[:, :, row], want) < 1e-5


def test_forced_near_blocks_come_nearest_first():
    scores = torch.tensor([[[0.0, 2.0, 0.0, 3.0, 9.0, 0.0]]])
    visible = torch.ones(1, 6, dtype=torch.bool)

    def chosen(count, last):
        near = promote(scores, visible, torch.tensor([count]), last=last, own=torch.tensor([2]))
        return near[0, 0].nonzero().flatten().tolist()

    assert chosen(1, 1) == [2]
    assert chosen(2, 1) == [2, 4]
    assert chosen(2, 2) == [1, 2]
    assert chosen(3, 2) == [1, 2, 4]
    assert chosen(3, 3) == [1, 2, 3]
    assert chosen(4, 3) == [1, 2, 3, 4]
    assert chosen(5, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("window", [1, 40, 64, 1000, 2**31 - 1])
@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (70, 200), (200, 70), (5, 200)])
def test_a_window_without_a_causal_mask_is_symmetric(window, queries, keys):
    q, k, v = qkv(queries, keys)
    out, lse, stats = attention(q, k, v, config=EXACT, causal=False, window=window, return_lse=True, return_stats=True)
    want, want_lse = dense(q, k, v, window)
    assert error(out, want) < 1e-6
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert stats.rows == int((want_lse > -math.inf).sum())
    assert stats.promoted == stats.visible
    rough = attention(q, k, v, causal=False, window=window)
    assert rough.isfinite().all()
    assert error(rough, want) < 0.3


def test_a_symmetric_window_sees_what_torch_sees():
    q, k, v = qkv(150, 150)
    distance = torch.arange(150)[:, None] - torch.arange(150)
    bias = torch.where(distance.abs() < 30, 0.0, -math.inf)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, config=EXACT, causal=False, window=30), want, rtol=1e-4, atol=1e-5)


# -- packed sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [[0, 40, 80], [10, 40, 100], [10, 10, 90], [50, 50, 50]])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_outside_of_all_sequences_are_zero(starts, causal):
    junk = [torch.full((100, 4, 32), math.nan) for _ in range(20)]
    del junk
    q, k, v = torch.randn(100, 4, 32), torch.randn(100, 2, 32), torch.randn(100, 2, 32)
    cu = torch.tensor(starts, dtype=torch.int32)
    out, lse = attention_varlen(q, k, v, cu, cu, 80, 80, causal=causal, return_lse=True)
    outside = torch.ones(100, dtype=torch.bool)
    outside[starts[0] : starts[-1]] = False
    assert (out[outside] == 0).all()
    assert (lse[:, outside] == -math.inf).all()
    assert (lse[:, ~outside] > -math.inf).all()


@pytest.mark.parametrize(
    ("starts", "longest", "words"),
    [
        ([0, 40, 120], 80, r"cu_seqlens_q must not decrease and lie in \[0, 100\], got \[0, 40, 120\]"),
        ([0, 60, 40, 100], 60, "cu_seqlens_q must not decrease"),
        ([-1, 60, 100], 61, "cu_seqlens_q must not decrease"),
        ([0, 40, 100], 20, "max_seqlen_q must be at least the longest sequence of cu_seqlens_q, 60, got 20"),
    ],
)
def test_bad_starts_are_named(starts, longest, words):
    q, k = torch.randn(100, 4, 32), torch.randn(100, 2, 32)
    cu = torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(ValueError, match=words):
        attention_varlen(q, k, k, cu, cu, longest, longest)
    good = torch.tensor([0, *[50] * (len(starts) - 2), 100])
    with pytest.raises(ValueError, match=words.replace("len_q", "len_k").replace("lens_q", "lens_k")):
        attention_varlen(q, k, k, good, cu, 100, longest)


# -- head dims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", ["nvfp4", "mxfp4", "fp8"])
@pytest.mark.parametrize("dim", [8, 20, 40, 72, 100])
def test_other_head_dims_are_filled_up_with_zeros(low, dim):
    q, k, v = qkv(dim=dim)
    full = dim + -dim % (32 if low == "mxfp4" else 16)
    wide = (torch.nn.functional.pad(x, (0, full - dim)) for x in (q, k, v))
    config = ThriftConfig(base_format=low, budget=0.05)
    out, lse = attention(q, k, v, config=config, return_lse=True)
    want, want_lse = attention(*wide, config=config, scale=dim**-0.5, return_lse=True)
    assert out.shape == q.shape
    assert torch.equal(out, want[..., :dim])
    assert torch.equal(lse, want_lse)
    assert not want[..., dim:].any()
    exact = attention(q, k, v, config=EXACT.with_(base_format=low))
    assert error(exact, dense(q, k, v, causal=True)[0]) < 1e-6
    cu = torch.tensor([0, 200])
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    got = attention_varlen(*packed, cu, cu, 200, 200, config=config)
    assert torch.equal(got.transpose(0, 1)[None], out)


# -- options ---------------------------------------------------------------------------------------------------------


def test_no_config_is_the_default():
    q, k, v = qkv()
    assert torch.equal(attention(q, k, v, config=None), attention(q, k, v, config=ThriftConfig()))
    cu = torch.tensor([0, 200])
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    assert attention_varlen(*packed, cu, cu, 200, 200, config=None).isfinite().all()


@pytest.mark.parametrize("given_", [0.05, "5%", "0.05", fraction(0.05)], ids=str)
def test_a_budget_is_taken_as_a_share_or_as_text(given_):
    want = ThriftConfig(budget=fraction(0.05))
    assert ThriftConfig(budget=given_) == want
    assert ThriftConfig().with_(budget=given_) == want
    assert ThriftConfig.paper(budget=given_).budget == want.budget
    assert ThriftConfig.for_cache(budget=given_).budget == want.budget
    assert Budget.of(given_) == want.budget


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.floats(0, 1).map(fraction),
        st.integers(0, 2**31 - 1).map(top_k),
        st.builds(floored, st.floats(0, 1), st.integers(1, 2**31 - 1)),
        st.just(Budget.paper_rule()),
    )
)
def test_the_text_of_a_budget_keeps_its_value(budget):
    assert Budget.parse(str(budget)) == budget
    assert Budget.of(str(budget)) == budget


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000))
def test_percent_are_as_exact_as_shares(hundredths):
    assert Budget.parse(f"{hundredths / 100}%").value == float(f"{hundredths / 100}e-2")


# -- gradients, autocast, default dtype ------------------------------------------------------------------------------


def _calls():
    q, k, v = qkv(20, 20)
    cu = torch.tensor([0, 20])
    cache = PagedThriftCache(batch=1, kv_heads=2, head_dim=32, num_pages=2, dtype=torch.float32, device="cpu")
    cache.append(k, v)
    return {
        "attention": lambda x: attention(x, k, v),
        "varlen": lambda x: attention_varlen(
            x[0].mT.transpose(0, 2).mT, *(y[0].transpose(0, 1) for y in (k, v)), cu, cu, 20, 20
        ),
        "cache": lambda x: cache.attend(x[:, :, :1]),
        "append": lambda x: cache.append(x[:, :2, :1], x[:, :2, :1]),
    }, q


@pytest.mark.parametrize("call", ["attention", "varlen", "cache", "append"])
def test_gradients_are_refused_everywhere_in_the_same_words(call):
    calls, q = _calls()
    run = calls[call]
    with pytest.raises(NotImplementedError, match="inference only"):
        run(q.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="inference only"):
        run(forward_ad.make_dual(q, torch.ones_like(q)))
    with forward_ad.dual_level():
        run(q)
    with torch.no_grad():
        run(q.clone().requires_grad_())
    with torch.inference_mode():
        run(q.clone())
    run(q.clone().requires_grad_().detach())


def test_autocast_gives_what_its_dtype_gives():
    q, k, v = qkv(dtype=torch.float32)
    want, want_lse = attention(*(x.bfloat16() for x in (q, k, v)), return_lse=True)
    for inputs in ((q, k, v), (q, k, v.bfloat16())):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, lse = attention(*inputs, return_lse=True)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    cu = torch.tensor([0, 200])
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_varlen(*packed, cu, cu, 200, 200).transpose(0, 1)[None], want)
        assert attention(*(x.double() for x in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default):
    q, k, v = qkv(dtype=torch.float32)
    configs = [
        ThriftConfig(budget=0.05),
        ThriftConfig(budget=0.05, base_format="fp8"),
        ThriftConfig(budget=0.05, score="quest"),
        ThriftConfig(budget=0.05, score="oracle"),
    ]
    want = [attention(q, k, v, config=config) for config in configs]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = [attention(q, k, v, config=config) for config in configs]
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("lse", [False, True])
def test_rows_of_fewer_keys_than_queries_see_all_their_keys_without_a_causal_mask(lse):
    """Whoever computes the row: the reference, or exact attention because the sequence is short."""
    q, k, v = (x.expand(2, -1, -1, -1) for x in qkv(100, 130))
    short = ThriftConfig(exact_below=10**6)
    found = attention(q, k, v, config=short, causal=False, kv_lengths=torch.tensor([40, 130]), return_lse=lse)
    out = found[0] if lse else found
    for row, keys in enumerate((40, 130)):
        alone, _ = dense(q[row : row + 1], k[row : row + 1, :, :keys], v[row : row + 1, :, :keys])
        torch.testing.assert_close(out[row : row + 1].double(), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"causal": "no"}, TypeError, "causal must be True or False, got 'no'"),
        ({"causal": None}, TypeError, "causal must be True or False, got None"),
        ({"return_lse": "yes"}, TypeError, "return_lse must be True or False"),
        ({"return_stats": 2}, TypeError, "return_stats must be True or False"),
        ({"scale": 10**400}, ValueError, "scale must be a normal float32"),
    ],
)
def test_options_of_another_kind_are_named(options, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv(), **options)


def test_numbers_of_any_kind_count_as_the_same():
    same = attention(*qkv(), scale=0.125, softcap=30.0)
    assert torch.equal(attention(*qkv(), scale=Fraction(1, 8), softcap=Fraction(30)), same)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.to_sparse(), TypeError, "dense tensor, got layout torch.sparse_coo"),
        (lambda x: torch.nested.nested_tensor([x[0], x[0, :, :5]]), TypeError, "dense tensor, got a nested tensor"),
        (
            lambda x: x.to("meta"),
            NotImplementedError,
            "must hold numbers, on a cpu or cuda device, got tensors on meta",
        ),
    ],
)
def test_tensors_without_numbers_at_strides_are_named(change, error, message):
    with pytest.raises(error, match=message):
        attention(*map(change, qkv()))
