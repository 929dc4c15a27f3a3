"""Device functions of the prefill kernel on a tile of logits: masks, one step of the online softmax, P in 4 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.rounding import bits, e2m1_code, from_bits, round_e2m1, round_e4m3
from thrift_attn.reference.formats import FORMATS

P_NVFP4 = tl.constexpr(FORMATS["nvfp4"].p_factor)
P_MXFP4 = tl.constexpr(FORMATS["mxfp4"].p_factor)


@triton.jit
def visible(s, key, keys, position, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr):
    """Logits [BM, BN], -inf where the query at ``position`` [BM] does not see ``key`` [BN]; with SINK nor key 0."""
    if SINK:  # one comparison without a sign, in which -1 is the largest; a position before 0 is like one that sees key 0 alone
        last = tl.maximum(position, 0) if CAUSAL else tl.maximum(keys - 1, 0) + tl.zeros_like(position)
        s = tl.where((key - 1).to(tl.uint32)[None, :] < last.to(tl.uint32)[:, None], s, float("-inf"))
    elif CAUSAL:
        s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
    else:
        s = tl.where((key < keys)[None, :], s, float("-inf"))
    if WINDOW:
        s = tl.where(key[None, :] > position[:, None] - window, s, float("-inf"))
    return s


@triton.jit
def online(s, unit, shift, peak, total):
    """One step of the online softmax in base 2: P, the new whole-number peak, the new sum, the factor of what is there.

    The logits are s * unit + shift with unit > 0 and shift [BM], which may be -inf: one multiply-add per element, with the peak
    taken off in the same.
    """
    new = tl.maximum(peak, tl.ceil(tl.max(s, 1) * unit + shift))
    base = tl.where(new == float("-inf"), 0.0, new)
    factor = tl.exp2(peak - base)
    p = tl.exp2(s * unit[:, None] + (shift - base)[:, None])
    return p, new, total * factor + tl.sum(p, 1), factor


@triton.jit
def _inverse(x, CAST: tl.constexpr):
    """1 / x to within an ulp or two, without a care for sizes near the ends of float32."""
    if CAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _p_groups(p, FORMAT: tl.constexpr, CAST: tl.constexpr):
    """P times the factor of its format in groups along tokens [BM, BN / G, G]: elements in units of their scale, and scales."""
    G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    FACTOR: tl.constexpr = P_MXFP4 if FORMAT == "mxfp4" else P_NVFP4
    x = tl.reshape(p, [p.shape[0], p.shape[1] // G, G])
    peak = tl.max(x, 2)
    if FORMAT == "mxfp4":
        exponent = tl.maximum((bits(peak * FACTOR) >> 23) - 2, 16)  # at least 2^-111, for FACTOR / scale to be a number
        scale = from_bits(exponent << 23)
        inverse = from_bits((254 - exponent) << 23)
    else:
        scale = peak * 448.0
        if CAST:
            scale = scale.to(tl.float8e4nv).to(tl.float32)
        else:
            scale = round_e4m3(scale)
        inverse = _inverse(tl.maximum(scale, 0.001953125), CAST)  # the least e4m3; of scale 0 elements do not matter
    return round_e2m1(x * tl.expand_dims(inverse * FACTOR, 2), False), scale


@triton.jit
def p_decoded(p, FORMAT: tl.constexpr, CAST: tl.constexpr):
    """P rounded through a 4-bit format, times its factor; float32 [BM, BN]."""
    value, scale = _p_groups(p, FORMAT, CAST)
    return tl.reshape(value * tl.expand_dims(scale, 2), p.shape)


@triton.jit
def p_native(p, FORMAT: tl.constexpr, CAST: tl.constexpr):
    """P times its factor as packed e2m1 [BM, BN / 2] and encoded scales [BM, BN / G], and what they sum to [BM]."""
    value, scale = _p_groups(p, FORMAT, CAST)
    weight = tl.sum(tl.sum(value, 2) * scale, 1)
    code = tl.reshape(e2m1_code(value, value), [p.shape[0], p.shape[1] // 2, 2])
    low, high = tl.split(code)
    if FORMAT == "mxfp4":
        encoded = (bits(scale) >> 23).to(tl.uint8)
    else:
        encoded = scale.to(tl.float8e4nv)
    return (low | (high << 4)).to(tl.uint8), encoded, weight
