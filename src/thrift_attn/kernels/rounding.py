"""Rounding to the number formats, element by element, as device functions; byte-exact to `thrift_attn.reference.quantize`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits(x):
    """The bits of a float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(x):
    """The float32 with these bits."""
    return x.to(tl.float32, bitcast=True)


@triton.jit
def cut(x):
    """The bfloat16 number at or next to a float32 towards zero, as float32."""
    return from_bits(bits(x) & ~0xFFFF)


@triton.jit
def round_e4m3(y):
    """Nearest e4m3 value of a float32, ties to even, saturating at 448; NaN stays."""
    size = bits(y) & 0x7FFFFFFF
    normal = from_bits((size + 0x7FFFF + ((size >> 20) & 1)) & ~0xFFFFF)
    small = (from_bits(size) + 16384.0) - 16384.0  # the spacing at 2^14 is 2^-9, that of subnormal e4m3
    size_r = tl.where(from_bits(size) < 0.015625, small, tl.minimum(normal, 448.0))
    size_r = tl.where(y == y, size_r, y)
    return from_bits(bits(size_r) | (bits(y) & ~0x7FFFFFFF))  # keeps the sign of zero


@triton.jit
def round_e2m1(x, SIGNED: tl.constexpr = True):
    """Nearest e2m1 value, ties to even, saturating at 6; SIGNED is False where no x is negative."""
    x = tl.minimum(x, 6.0)
    if SIGNED:
        x = tl.maximum(x, -6.0)
    # 1.5 * 2^23 spacings; the spacing of e2m1 at x is 2^(max(exponent, 0) - 1).
    magic = from_bits(tl.maximum(bits(x) & 0x7F800000, 0x3F800000)) * 6291456.0
    return (x + magic) - magic


@triton.jit
def e4m3_code(value):
    """int32 code of a float32 that is an e4m3 value; 0x7F for NaN."""
    v = bits(value) & 0x7FFFFFFF
    normal = (v >> 20) - (120 << 3)
    small = (from_bits(v) * 512.0).to(tl.int32)
    code = tl.where(from_bits(v) < 0.015625, small, normal) | ((bits(value) >> 24) & 0x80)
    return tl.where(value == value, code, 0x7F)


@triton.jit
def e2m1_magnitude(value):
    """int32 code without its sign of a float32 that is an e2m1 value."""
    v = tl.abs(value)
    return tl.where(v < 2.0, 2.0 * v, tl.where(v < 4.0, v + 2.0, v * 0.5 + 4.0)).to(tl.int32)


@triton.jit
def e2m1_code(value, signed):
    """int32 code of a float32 that is an e2m1 value, with the sign of ``signed``, also for zero."""
    return e2m1_magnitude(value) | ((bits(signed) >> 28) & 0x8)
