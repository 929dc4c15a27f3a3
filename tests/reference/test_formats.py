"""Bytes and values of the number formats, enumerated."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thrift_attn import ThriftConfig, attention, fraction
from thrift_attn.reference.formats import E2M1_VALUES, FORMATS, RESIDUALS
from thrift_attn.reference.quantize import (
    Quantised,
    block_means,
    decode_scales,
    dequantise,
    pack_e2m1,
    quantise,
    residual,
    round_e2m1,
    roundtrip,
    unpack_e2m1,
)

NVFP4, MXFP4, FP8 = FORMATS["nvfp4"], FORMATS["mxfp4"], FORMATS["fp8"]
ALL_CODES = torch.arange(16, dtype=torch.uint8)
SIGNED_VALUES = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])


def e4m3_value(byte: int) -> float:
    """The e4m3 definition, from the bits (OCP FP8): no infinities, S.1111.111 is NaN."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7)
    return -magnitude if sign else magnitude


def test_every_e2m1_code_times_every_e4m3_scale():
    for byte in range(127):  # positive scales; 127 is NaN
        got = dequantise(Quantised(ALL_CODES, torch.tensor([byte], dtype=torch.uint8)), NVFP4)
        want = [v * e4m3_value(byte) for v in SIGNED_VALUES.tolist()]
        assert got.tolist() == want
    got = dequantise(Quantised(ALL_CODES, torch.tensor([127], dtype=torch.uint8)), NVFP4)
    assert got.isnan().all()


def test_every_e2m1_code_times_every_e8m0_scale():
    scales = torch.arange(256, dtype=torch.uint8)
    values = decode_scales(scales, MXFP4)
    assert values[255].isnan()
    # 2^(e - 127); the table holds every power exactly, the smallest as a subnormal.
    assert values[:255].tolist() == [math.ldexp(1.0, e - 127) for e in range(255)]
    codes = ALL_CODES.repeat(2)
    for byte in (0, 1, 100, 127, 200, 252):
        got = dequantise(Quantised(codes, torch.tensor([byte], dtype=torch.uint8)), MXFP4)
        assert got[:16].tolist() == [v * math.ldexp(1.0, byte - 127) for v in SIGNED_VALUES.tolist()]


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FORMATS["e4m3g16"]], ids=lambda f: f.name)
def test_values_the_format_holds_survive(fmt):
    # A group that holds the top of its scale encodes exactly what it can represent.
    values = SIGNED_VALUES.repeat(fmt.group // 16 + 1)[: fmt.group]
    for scale in (2.0**-6, 0.5, 1.0, 4.0, 64.0):
        assert torch.equal(roundtrip(values * scale, fmt), values * scale)


def test_rounding_ties_go_to_even_and_saturate():
    midpoints = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    above = {
        0.2501: 0.5,
        0.7499: 0.5,
        1.2501: 1.5,
        1.7499: 1.5,
        2.5001: 3.0,
        3.4999: 3.0,
        5.0001: 6.0,
        7.0: 6.0,
        1e30: 6.0,
    }
    for x, want in {**midpoints, **above}.items():
        assert round_e2m1(torch.tensor([x, -x])).tolist() == [want, -want]


def test_rounding_equals_the_nearest_value_everywhere():
    x = torch.linspace(-7, 7, 50_001)
    distance = (x[:, None] - SIGNED_VALUES).abs()
    assert torch.equal((round_e2m1(x) - x).abs(), distance.amin(-1))


def test_scale_is_the_rounded_group_maximum_over_six():
    # Every e4m3 scale is hit by a group whose maximum is six times it.
    scales = torch.tensor([e4m3_value(b) for b in range(127)])
    x = torch.zeros(127, 16)
    x[:, 3] = -6 * scales
    assert quantise(x, NVFP4).scales.squeeze(-1).tolist() == list(range(127))
    # Halfway between two scales: ties to even.
    x[:, 3] = 6 * (scales + torch.cat([scales[1:], scales[-1:]])) / 2
    got = quantise(x, NVFP4).scales.squeeze(-1).int()
    assert got[:126].tolist() == [b + (b & 1) for b in range(126)]


def test_scales_saturate_and_tiny_groups_are_zero():
    x = torch.zeros(3, 16)
    x[0, 0], x[1, 0], x[2, 0] = 1e6, 2688.0, 2**-10 * 6 * 0.99
    q = quantise(x, NVFP4)
    assert decode_scales(q.scales, NVFP4).squeeze(-1).tolist() == [448.0, 448.0, 0.0]
    assert dequantise(q, NVFP4)[:, 0].tolist() == [2688.0, 2688.0, 0.0]


def test_mx_scale_is_the_floor_of_the_exponent_minus_two():
    x = torch.zeros(6, 32)
    x[:, 5] = torch.tensor([1.0, 1.99, 2.0, 7.9, 8.0, 2.0**-126])
    assert quantise(x, MXFP4).scales.squeeze(-1).tolist() == [125, 125, 126, 127, 128, 0]
    assert roundtrip(x, MXFP4)[3, 5] == 6.0  # 7.9 / 1 saturates


@pytest.mark.parametrize("name", FORMATS)
def test_zero_groups_decode_to_zero(name):
    x = torch.zeros(64, 32)
    assert torch.equal(roundtrip(x, FORMATS[name]), x)
    q = quantise(x, FORMATS[name])
    assert not q.codes.any()
    assert torch.equal(dequantise(q, FORMATS[name]), x)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_fault_makes_its_group_nan_and_no_other(name, bad):
    fmt = FORMATS[name]
    x = torch.randn(128, 32)
    x[0, 0] = bad
    group = (slice(0, 64), slice(None)) if fmt.group is None else (0, slice(0, fmt.group))
    for got in (roundtrip(x, fmt), dequantise(quantise(x, fmt), fmt)):
        assert got[group].isnan().all()
        got[group] = 0
        assert got.isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (2, 3, 128, 96)])
def test_roundtrip_is_dequantise_of_quantise(name, dtype, shape):
    fmt = FORMATS[name]
    x = (torch.randn(shape) * torch.rand(shape[-1]).mul(8).exp2() * 2**-4).to(dtype)
    for dim in (-1, -2):
        for best in (False, True):
            q = quantise(x, fmt, dim, best=best)
            assert q.codes.dtype == torch.uint8
            assert torch.equal(dequantise(q, fmt, dim), roundtrip(x, fmt, dim, best=best))


@pytest.mark.parametrize("name", FORMATS)
def test_best_scales_are_never_worse_and_each_group_is_one_of_the_tops(name):
    fmt = FORMATS[name]
    x = torch.randn(512, 64)
    tops = torch.stack([roundtrip(x, replace(fmt, tops=(top,))) for top in fmt.tops])
    best = roundtrip(x, fmt, best=True)
    group = fmt.group or x.numel()
    errors = (tops - x).square().view(len(tops), -1, group).sum(-1)
    torch.testing.assert_close((best - x).square().view(-1, group).sum(-1), errors.amin(0))
    if len(tops) > 1:
        assert (best - x).norm() < 0.98 * (tops[0] - x).norm()
    else:
        assert torch.equal(best, tops[0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3000, 3000, width=32), min_size=32, max_size=32))
def test_error_is_bounded_by_the_format(values):
    x = torch.tensor(values)
    for fmt in (NVFP4, MXFP4):
        scale = decode_scales(quantise(x, fmt).scales, fmt).repeat_interleave(fmt.group)
        error = (roundtrip(x, fmt) - x).abs()
        # Half a spacing: at most half the magnitude's step, and the clipped part beyond 6 scales.
        bound = torch.maximum(scale * 0.25, (x.abs() / 4).clamp(max=1.0 * scale)) + (x.abs() - 6 * scale).clamp(min=0)
        assert (error <= bound * (1 + 1e-6)).all()


def test_block_format_shares_one_scale_in_64_tokens():
    x = torch.randn(130, 16)
    q = quantise(x, FP8)
    assert q.scales.shape == (3,)
    want = [x[:64].abs().max() / 16, x[64:128].abs().max() / 16, x[128:].abs().max() / 16]
    assert q.scales.tolist() == [float(w) for w in want]


def test_packing_keeps_the_even_element_low():
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    packed = pack_e2m1(codes)
    assert packed.shape == (5, 32)
    assert int(packed[2, 7]) == int(codes[2, 14]) | int(codes[2, 15]) << 4
    assert torch.equal(unpack_e2m1(packed), codes)
    with pytest.raises(ValueError, match="even number"):
        pack_e2m1(codes[:, :3])


def test_codes_equal_torchao():
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(64, 128) * torch.rand(128).mul(6).exp2()
    scales, data = nvfp4_tensor.nvfp4_quantize(x, block_size=16)
    q = quantise(x, NVFP4)
    # Its scale has a floor (it never stores zero); on these data no group comes near it.
    assert torch.equal(q.scales, scales.view(torch.uint8))
    # It multiplies by the reciprocal of the scale where the definition divides: a tie may fall the other way.
    other = kernels.unpack_uint4(data.view(torch.uint8)).view(q.codes.shape)
    ratio = x / decode_scales(q.scales, NVFP4).repeat_interleave(16, -1)
    near_tie = ((ratio.abs()[..., None] - torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])).abs() < 1e-5).any(-1)
    assert torch.equal(q.codes[~near_tie], other[~near_tie])


def test_wrong_group_and_dtype_are_refused():
    with pytest.raises(ValueError, match="multiple of 16 elements along dim -1, got 20"):
        quantise(torch.zeros(4, 20), NVFP4)
    with pytest.raises(TypeError, match="floating point"):
        quantise(torch.zeros(4, 16, dtype=torch.int32), NVFP4)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_block_means(tokens, dtype):
    k = torch.randn(2, tokens, 16, dtype=torch.float64).to(dtype)
    means = block_means(k)
    assert means.dtype == dtype
    for b in range(-(-tokens // 64)):
        want = k[:, b * 64 : (b + 1) * 64].double().mean(1)
        torch.testing.assert_close(means[:, b].double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_bits_per_element():
    bits = {name: f.bits_per_element(128) for name, f in FORMATS.items()}
    assert bits == {"nvfp4": 4.5, "mxfp4": 4.25, "fp8": 8 + 32 / 8192, "e4m3g16": 8.5}


@pytest.mark.parametrize(("plane", "gain"), [("nested", 8), ("nested8", 14)])
def test_the_residual_plane_refines_the_base(plane, gain):
    x = torch.randn(256, 128)
    base = roundtrip(x, NVFP4)
    refined = base + residual(x, base, RESIDUALS[plane])
    assert (x - refined).norm() * gain < (x - base).norm()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8"])
def test_a_weight_of_one_is_exact(name):
    """Where all queries are 0 every weight is equal, so the largest of a row stands everywhere: P = 1 exactly."""
    q = torch.zeros(1, 1, 64, 64)
    v = torch.full((1, 1, 64, 64), 6.0)  # which every format holds
    out = attention(q, q, v, config=ThriftConfig.paper(base_format=name, budget=fraction(0)), causal=False)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=0)


@pytest.mark.parametrize("std", [1.0, 3.0, 6.0])
def test_the_factor_of_p_in_mxfp4_has_the_least_error(std):
    """Error of P V against float64 over random rows, for factors at nine places between two powers of two."""
    draw = torch.Generator().manual_seed(0)
    logits = std * torch.randn(128, 1024, generator=draw, dtype=torch.float64)
    v = torch.randn(1024, 32, generator=draw, dtype=torch.float64)
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    want = p @ v / p.sum(-1, keepdim=True)

    def error(factor: float) -> float:
        rounded = roundtrip((p * factor).float(), MXFP4).double() / factor
        return float((rounded @ v / p.sum(-1, keepdim=True) - want).norm() / want.norm())

    others = [error(place) for place in (1.0, 1.125, 1.25, 1.3125, 1.375, 1.625, 1.75, 1.875)]
    assert error(MXFP4.p_factor) < 1.01 * min(others)
