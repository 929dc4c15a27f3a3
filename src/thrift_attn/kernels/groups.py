"""Rounding in the quantise kernels: groups with narrow scales, whole blocks with a float32 one, and how both are stored.

What is stored for which format and form is the table of `thrift_attn.prefill.pack`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.dispatch import interpreted
from thrift_attn.kernels.rounding import bits, e2m1_code, e4m3_code, from_bits, round_e2m1, round_e4m3
from thrift_attn.reference.formats import FORMATS

_INTERPRETED = tl.constexpr(interpreted())
_FP8_TOP = tl.constexpr(FORMATS["fp8"].tops[0])


@triton.jit
def e4m3_scale(peak, TOP: tl.constexpr):
    """The e4m3 number next to peak / TOP; NaN for NaN."""
    return round_e4m3(tl.div_rn(peak, TOP + tl.zeros_like(peak)))


@triton.jit
def _group_scale(peak, TOP: tl.constexpr, POWER: tl.constexpr):
    """Scale of groups with these maxima, see `thrift_attn.reference.formats`; NaN for NaN."""
    if POWER:
        exponent = tl.maximum((bits(peak) >> 23) - (2 if TOP == 4.0 else 1), 0)
        scale = from_bits(tl.where(exponent == 0, 1 << 22, exponent << 23))
        return tl.where(peak == peak, scale, peak)
    else:
        return e4m3_scale(peak, TOP)


@triton.jit
def _scale_code(scale, POWER: tl.constexpr):
    if POWER:
        return tl.where(scale == scale, bits(scale) >> 23, 0xFF).to(tl.uint8)
    else:
        return e4m3_code(scale).to(tl.uint8)


@triton.jit
def _ratio(x, scale, AXIS: tl.constexpr, POWER: tl.constexpr):
    """x / scale, correctly rounded, with one division per group; 0 where there is no usable scale."""
    s = tl.expand_dims(scale, AXIS)
    if POWER:
        field = 254 - (bits(scale) >> 23)
        inverse = from_bits(tl.where(field == 0, 1 << 22, field << 23))
        ratio = x * tl.expand_dims(inverse, AXIS)
    elif _INTERPRETED:  # its fma rounds twice
        ratio = tl.div_rn(x, tl.where(s > 0.0, s, 1.0) + tl.zeros_like(x))
    else:  # Markstein's correction of x * (1 / scale)
        inverse = tl.expand_dims(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), AXIS)
        inverse, s = tl.broadcast(inverse, x)[0], tl.broadcast(s, x)[0]
        estimate = x * inverse
        ratio = tl.fma(tl.fma(-estimate, s, x), inverse, estimate)
    return tl.where(s > 0.0, ratio, 0.0)


@triton.jit
def _round_groups(x, AXIS: tl.constexpr, FORMAT: tl.constexpr, BEST_SCALES: tl.constexpr):
    """Elements, their ratios (for the sign of zero) and scales of groups along AXIS of x; FORMAT names the format."""
    POWER: tl.constexpr = FORMAT == "mxfp4"
    TOP: tl.constexpr = 4.0 if FORMAT == "mxfp4" else 6.0
    peak = tl.max(tl.abs(x), AXIS) + tl.sum(x * 0.0, AXIS)  # NaN where an element is not finite
    scale = _group_scale(peak, TOP, POWER)
    ratio = _ratio(x, scale, AXIS, POWER)
    if FORMAT == "e4m3g16":
        value = round_e4m3(ratio)
    else:
        value = round_e2m1(ratio)
        if BEST_SCALES:
            scale2 = _group_scale(peak, 2.0 if POWER else 4.0, POWER)
            ratio2 = _ratio(x, scale2, AXIS, POWER)
            value2 = round_e2m1(ratio2)
            e = value * tl.expand_dims(scale, AXIS) - x
            e2 = value2 * tl.expand_dims(scale2, AXIS) - x
            better = tl.sum(e2 * e2, AXIS) < tl.sum(e * e, AXIS)
            scale = tl.where(better, scale2, scale)
            ratio = tl.where(tl.expand_dims(better, AXIS), ratio2, ratio)
            value = tl.where(tl.expand_dims(better, AXIS), value2, value)
    return value, ratio, scale


@triton.jit
def _round_block(x, peak, TOP: tl.constexpr, CAST: tl.constexpr):
    """e4m3 of [64, DP] with the float32 scale peak / TOP: elements (e4m3 if CAST, which rounds in hardware), scale."""
    scale = tl.div_rn(peak, TOP + peak * 0.0)
    ratio = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0) + tl.zeros_like(x))
    ratio = tl.where(scale > 0.0, ratio, 0.0)
    if CAST:
        element = ratio.to(tl.float8e4nv)
    else:
        element = round_e4m3(ratio)
    return element, scale


@triton.jit
def _as_e4m3(element, TYPE: tl.constexpr, CAST: tl.constexpr):
    """Elements of `_round_block` as stored codes."""
    if CAST:
        return element
    else:
        return e4m3_code(element).to(tl.uint8).to(TYPE, bitcast=True)


@triton.jit
def _by_column(x, G: tl.constexpr):
    """[T, D] to groups along D: [T, D / G, G]."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // G, G])


@triton.jit
def _by_token(x, G: tl.constexpr):
    """[T, D] to groups along T: [T / G, G, D]."""
    return tl.reshape(x, [x.shape[0] // G, G, x.shape[1]])


@triton.jit
def _store_decoded(x, ptr, row, D: tl.constexpr):
    """Numbers [T, DP] as they are, at rows [T, 1] of D."""
    d = tl.arange(0, x.shape[1])[None, :]
    tl.store(ptr + row * D + d, x.to(ptr.dtype.element_ty), mask=d < D)


@triton.jit
def store_rows(
    x, ptr, scale_ptr, first, inv_scale, D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr, BEST_SCALES: tl.constexpr,
    NATIVE: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Quantise rows [T, DP] of a block with groups along D and store them from row ``first`` (of the whole tensor) on.

    Decoded 4-bit data are stored times ``inv_scale``, a number or powers of two [1, DP]. fp8 takes whole blocks.
    Returns what they decode to in float32 (for fp8 in units of the scale), before that.
    """
    d = tl.arange(0, DP)[None, :]
    row = first + tl.arange(0, x.shape[0])[:, None]
    if FORMAT == "fp8":
        peak = tl.max(tl.max(tl.abs(x), 1), 0) + tl.sum(tl.sum(x * 0.0, 1), 0)
        element, scale = _round_block(x, peak, _FP8_TOP, CAST)
        decoded = element.to(tl.float32)
        tl.store(scale_ptr + first // 64, scale)
        if NATIVE:
            tl.store(ptr + row * D + d, _as_e4m3(element, ptr.dtype.element_ty, CAST), mask=d < D)
        else:
            _store_decoded(decoded, ptr, row, D)
        return decoded
    else:
        G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
        value, ratio, scale = _round_groups(_by_column(x, G), 2, FORMAT, BEST_SCALES)
        decoded = tl.reshape(value * tl.expand_dims(scale, 2), x.shape)
        if NATIVE:
            code = tl.reshape(e2m1_code(value, ratio), [x.shape[0], DP // 2, 2])
            low, high = tl.split(code)
            half = tl.arange(0, DP // 2)[None, :]
            tl.store(ptr + row * (D // 2) + half, (low | (high << 4)).to(tl.uint8), mask=half < D // 2)
            g = tl.arange(0, DP // G)[None, :]
            tl.store(scale_ptr + row * (D // G) + g, _scale_code(scale, FORMAT == "mxfp4"), mask=g < D // G)
        else:
            _store_decoded(decoded * inv_scale, ptr, row, D)
        return decoded


@triton.jit
def store_columns(
    x, ptr, scale_ptr, head, block, blocks, i, inv_scale, D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr,
    BEST_SCALES: tl.constexpr, NATIVE: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """`store_rows` for V: groups along the tokens; native data are stored transposed.

    ``head`` counts heads of the whole tensor, ``block`` blocks of the head, of which there are ``blocks``; ``i`` is the
    first token in the block.
    """
    T: tl.constexpr = x.shape[0]
    at = head * blocks + block
    row = at * 64 + i + tl.arange(0, T)[:, None]
    column = (head * D + tl.arange(0, DP)[:, None]) * blocks + block  # [DP, 1], in blocks
    inside = tl.arange(0, DP)[:, None] < D
    if FORMAT == "fp8":  # ``inv_scale`` is the largest magnitude of the head
        element, scale = _round_block(x, inv_scale, 448.0, CAST)
        decoded = element.to(tl.float32)
        tl.store(scale_ptr + at, scale)
        if NATIVE:
            turned = tl.trans(_as_e4m3(element, ptr.dtype.element_ty, CAST))
            p = tl.arange(0, 64)[None, :]
            tl.store(ptr + column * 64 + p, turned, mask=inside)
        else:
            _store_decoded(decoded, ptr, row, D)
        return decoded
    else:
        G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
        value, ratio, scale = _round_groups(_by_token(x, G), 1, FORMAT, BEST_SCALES)
        decoded = tl.reshape(value * tl.expand_dims(scale, 1), x.shape)
        if NATIVE:
            code = tl.reshape(e2m1_code(value, ratio), [T // 2, 2, DP])
            low, high = tl.split(tl.permute(code, [0, 2, 1]))
            half = i // 2 + tl.arange(0, T // 2)[None, :]
            tl.store(ptr + column * 32 + half, tl.trans((low | (high << 4)).to(tl.uint8)), mask=inside)
            g = i // G + tl.arange(0, T // G)[None, :]
            place = scale_ptr + column * (64 // G) + g
            tl.store(place, tl.trans(_scale_code(scale, FORMAT == "mxfp4")), mask=inside)
        else:
            _store_decoded(decoded * inv_scale, ptr, row, D)
        return decoded


@triton.jit
def store_residual(
    x, ptr, first, inv_scale, AXIS: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, BEST_SCALES: tl.constexpr
):
    """Round a residual [T, DP] in groups of 16 along AXIS and store it decoded, times ``inv_scale``, from row ``first`` on."""
    if AXIS == 1:
        value, _signed, scale = _round_groups(_by_column(x, 16), 2, FORMAT, BEST_SCALES)
        decoded = value * tl.expand_dims(scale, 2)
    else:
        value, _signed, scale = _round_groups(_by_token(x, 16), 1, FORMAT, BEST_SCALES)
        decoded = value * tl.expand_dims(scale, 1)
    row = first + tl.arange(0, x.shape[0])[:, None]
    _store_decoded(tl.reshape(decoded, x.shape) * inv_scale, ptr, row, D)
