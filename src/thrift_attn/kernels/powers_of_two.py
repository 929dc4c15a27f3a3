"""Powers of two from mean squares of K and V: the twins of `level_keys` and `level_values` of
`thrift_attn.reference.channel_scales`, for prefill and for pages.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.rounding import bits, from_bits
from thrift_attn.reference import channel_scales as reference

_LEVEL = tl.constexpr(reference.LEVEL)
_SLACK = tl.constexpr(reference.SLACK)
_SPREAD = tl.constexpr(reference.SPREAD)
_DEPTH = tl.constexpr(reference.DEPTH)
_LARGEST = tl.constexpr(reference.LARGEST)
_REACH = tl.constexpr(reference.REACH)


@triton.jit
def log_root(x):
    """log2 of the square root, -inf for 0."""
    return tl.where(x > 0.0, tl.log2(tl.where(x > 0.0, x, 1.0)) * 0.5, float("-inf"))


@triton.jit
def _whole(x):
    """Rounded, ties to even."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def _power(e):
    """2 to the exponent rounded and held within bounds; 1 where there is nothing to go by."""
    e = tl.where((e == e) & (tl.abs(e) < float("inf")), e, 0.0)
    e = tl.minimum(tl.maximum(e, -_LARGEST), _LARGEST)
    return from_bits((_whole(e).to(tl.int32) + 127) << 23)


@triton.jit
def k_channel_scale(size, k_size, inside, D: tl.constexpr):
    """Powers of two [DP] of the channels of K.

    ``size`` [DP] is `log_root` of their mean squares, ``k_size`` that of all of K; ``inside`` says which of the DP channels
    there are.
    """
    top = tl.max(tl.where(inside, size, float("-inf")), 0)
    size = tl.maximum(size, tl.maximum(top - _SPREAD, k_size - _DEPTH))
    middle = tl.sum(tl.where(inside, size, 0.0), 0) / D
    outside = size - middle
    outside -= tl.minimum(tl.maximum(outside, -_SLACK), _SLACK)
    return _power(-_whole(middle) - _whole(outside) + _LEVEL)


@triton.jit
def v_head_scale(mean_square):
    """Power of two of a head of V whose elements have this mean square."""
    return _power(-log_root(mean_square) + _LEVEL)


@triton.jit
def within_reach(power, largest):
    """Powers of two, or smaller ones where times them ``largest`` would exceed 2^`REACH`."""
    e = ((bits(largest) >> 23) & 0xFF) - 126  # largest < 2^e
    limit = _power(-e.to(tl.float32) + _REACH)
    return tl.where((largest > 0.0) & (largest < float("inf")), tl.minimum(power, limit), power)


@triton.jit
def inverse(power):
    """1 / x of float32 powers of two: exact."""
    return from_bits(0x7F000000 - power.to(tl.int32, bitcast=True))  # 254 << 23
