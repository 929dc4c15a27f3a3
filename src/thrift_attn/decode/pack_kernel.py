"""The kernel that packs complete KV blocks into pages; `thrift_attn.decode.pack` launches it.

One program packs one tile of one block and head; it works in the order the lanes of the decode kernel own, so that pages are
written with 16-byte stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.block_scales import scales_of_block
from thrift_attn.decode.fragments import page_at, place_in_ring
from thrift_attn.dispatch import interpreted
from thrift_attn.kernels.groups import e4m3_scale as _e4m3_scale
from thrift_attn.kernels.rounding import bits as _bits
from thrift_attn.kernels.rounding import e2m1_magnitude as _e2m1_magnitude
from thrift_attn.kernels.rounding import from_bits as _float
from thrift_attn.kernels.rounding import round_e2m1 as _round_e2m1
from thrift_attn.kernels.rounding import round_e4m3 as _round_e4m3
from thrift_attn.reference.page_layout import MASK

_MASK = tl.constexpr(MASK)
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _e2m1_half(value, signed):
    """e2m1 values to the bits of the half float value * 2^-14, with the sign of ``signed``, also for zero."""
    return (_e2m1_magnitude(value) << 9) | ((_bits(signed) >> 16) & 0x8000)


@triton.jit
def _group_max(x):
    """[8, 4, 2, 4] (a q h c) to the maximum of each row [8, 2]; NaN where an element is not finite."""
    peak = tl.max(tl.max(tl.abs(x), 3), 1)
    return peak + tl.sum(tl.sum(x * 0.0, 3), 1)


@triton.jit
def _scale_of(peak, TOP: tl.constexpr, POWER: tl.constexpr):
    """Scale of groups with these maxima: e4m3 of peak / TOP, or the power of two of mxfp4, 2^floor(log2 peak) / TOP."""
    if POWER:
        exponent = tl.maximum((_bits(peak) >> 23) - (2 if TOP == 4.0 else 1), 0)
        exponent = tl.minimum(exponent, 127 + 8)
        scale = tl.where(exponent < 127 - 24, 0.0, _float(exponent << 23))
        return tl.where(peak == peak, scale, peak)
    else:
        return _e4m3_scale(peak, TOP)


@triton.jit
def _error(x, scale):
    """Squared rounding error of each row."""
    e = _round_e2m1(_ratio(x, scale)) * scale[:, None, :, None] - x
    return tl.sum(tl.sum(e * e, 3), 1)


@triton.jit
def _best_scale(x, z, peak, POWER: tl.constexpr, BEST: tl.constexpr):
    """Scale of the rows of x; ``z`` shares it if POWER. With BEST the better of the format's two."""
    if POWER:
        scale = _scale_of(peak, 4.0, True)
        if BEST:
            other = _scale_of(peak, 2.0, True)
            better = _error(x, other) + _error(z, other) < _error(x, scale) + _error(z, scale)
            scale = tl.where(better, other, scale)
    else:
        scale = _scale_of(peak, 6.0, False)
        if BEST:
            other = _scale_of(peak, 4.0, False)
            scale = tl.where(_error(x, other) < _error(x, scale), other, scale)
    return scale


@triton.jit
def _scale_byte(scale):
    bits = (scale * 128.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) >> 7
    return tl.where(scale == scale, bits & 0xFF, 0xFF)


@triton.jit
def _ratio(x, scale):
    """x / scale, correctly rounded, with one division per row (Markstein's correction of x * (1 / scale))."""
    s = scale[:, None, :, None]
    if _INTERPRETED:  # its fma rounds twice
        return tl.where(s > 0.0, tl.div_rn(x, tl.where(s == 0.0, float("inf"), s)), 0.0)
    else:
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None, :, None]
        inverse, s = tl.broadcast(inverse, x)[0], tl.broadcast(s, x)[0]
        estimate = x * inverse
        ratio = tl.fma(tl.fma(-estimate, s, x), inverse, estimate)
        return tl.where(s > 0.0, ratio, 0.0)


@triton.jit
def _word(h0, h1, h2, h3):
    """Half-float bits of the four quarters to words, `thrift_attn.reference.page_layout.pack_word`."""
    known = h0 | (h1 >> 3)
    x2 = h2 ^ (((known << 6) ^ (known << 1)) & _MASK)
    x3 = h3 ^ (((known << 9) ^ (known << 2)) & _MASK)
    word = known | ((x2 & 0x8000) >> 1) | ((x2 & 0x0E00) >> 6) | ((x3 & 0x8000) >> 2) | ((x3 & 0x0E00) >> 9)
    return word.to(tl.int16)


@triton.jit
def _quantise4(x, z, peak, POWER: tl.constexpr, BEST: tl.constexpr):
    """Codes as half-float bits, scale bytes and decoded values of one quarter of a tile; see `_best_scale`."""
    scale = _best_scale(x, z, peak, POWER, BEST)
    ratio = _ratio(x, scale)
    value = _round_e2m1(ratio)
    return _e2m1_half(value, ratio), _scale_byte(scale), value * scale[:, None, :, None]


@triton.jit
def _quantise8(x):
    """e4m3 bytes and scale bytes of one quarter of a residual tile."""
    scale = _scale_of(_group_max(x), 6.0, False)
    value = _round_e4m3(_ratio(x, scale))
    v = _bits(tl.abs(value))
    normal = (v >> 20) - (120 << 3)
    small = (tl.abs(value) * 512.0).to(tl.int32)
    code = tl.where(tl.abs(value) < 0.015625, small, normal)
    return code | ((_bits(value) >> 24) & 0x80), _scale_byte(scale)


@triton.jit
def _store_tile4(ptr, scale_ptr, t, h0, h1, h2, h3, y0, y1, y2, y3):
    """One tile of a 4-bit plane; ``ptr`` counts 16-bit words, ``scale_ptr`` 32-bit words."""
    a = tl.arange(0, 8)[:, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None]
    h = tl.arange(0, 2)[None, None, :, None]
    c = tl.arange(0, 4)[None, None, None, :]
    tl.store(ptr + t * 256 + ((a * 4 + q) * 2 + h) * 4 + c, _word(h0, h1, h2, h3))
    _store_scales(scale_ptr, t, y0, y1, y2, y3)


@triton.jit
def _store_scales(scale_ptr, t, y0, y1, y2, y3):
    a = tl.arange(0, 8)[:, None]
    h = tl.arange(0, 2)[None, :]
    tl.store(scale_ptr + t // 2 * 32 + a * 4 + h * 2 + t % 2, y0 | (y1 << 8) | (y2 << 16) | (y3 << 24))


@triton.jit
def _store_tile8(ptr, scale_ptr, t, e0, e1, e2, e3, y0, y1, y2, y3):
    a = tl.arange(0, 8)[:, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None]
    h = tl.arange(0, 2)[None, None, :, None]
    c = tl.arange(0, 4)[None, None, None, :]
    place = ptr + t * 512 + ((a * 4 + q) * 2 + h) * 4 + c
    tl.store(place, (e0 | (e1 << 8)).to(tl.int16))
    tl.store(place + 256, (e2 | (e3 << 8)).to(tl.int16))
    _store_scales(scale_ptr, t, y0, y1, y2, y3)


@triton.jit
def pack_blocks_kernel(
    k_ptr,  # 16-bit [n, Hkv, 64, D]; with RING [rings, Hkv, RING, D], token t of a sequence at t mod RING
    v_ptr,
    pages_ptr,  # int32 [n]; below 0: nothing to pack
    k_block_mean_ptr,  # 16-bit [pages, Hkv, D], strides MEAN_PAGE and MEAN_HEAD
    base16_ptr,  # the base plane in 16-bit and in 32-bit words, which BASE_PAGE and BASE_HEAD count
    base32_ptr,
    high16_ptr,  # the residual plane likewise, or the 16-bit plane
    high32_ptr,
    rings_ptr,  # int32 [n], with RING: the ring of each block; block n is of sequence n then
    seqs_ptr,  # int32 [n], with SINK or SCALED: the sequence of each block
    numbers_ptr,  # int32 [n]: the number of the block in its sequence
    block0_mean_ptr,  # 16-bit [B or pages, Hkv, D]: mean of the first block without its first token
    sink_value_ptr,  # 16-bit [B or pages, Hkv, D]: V of the first token
    k_channel_scale_ptr,  # float32 [B, Hkv, D], powers of two, written with the first block; [Hkv, D] if FIXED, only read
    v_head_scale_ptr,  # float32 [B, Hkv], or [Hkv]
    slots_ptr,  # int32 [n, Hkv], with POOLED: where the plane of promoted blocks goes, below 0 where it is not kept
    stride_kn,
    stride_kh,
    stride_kt,
    stride_vn,
    stride_vh,
    stride_vt,
    BASE_PAGE: tl.constexpr,
    BASE_HEAD: tl.constexpr,
    HIGH_PAGE: tl.constexpr,
    HIGH_HEAD: tl.constexpr,
    MEAN_PAGE: tl.constexpr,
    MEAN_HEAD: tl.constexpr,
    FIRST_PAGE: tl.constexpr,  # strides of block0_mean and sink_value
    FIRST_HEAD: tl.constexpr,
    FIRST_IN_PAGE: tl.constexpr,  # their rows are pages
    RING: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRED: tl.constexpr,
    SINK: tl.constexpr,  # the first token of a first block is its c_b, and its V is left out
    SCALED: tl.constexpr,  # K and V are packed times powers of two
    FIXED: tl.constexpr,  # which all sequences share
    POWER: tl.constexpr,  # mxfp4: powers of two as scales, shared by 32
    BEST: tl.constexpr,  # the better of the format's two scales
    POOLED: tl.constexpr,  # not all blocks keep the plane of promoted ones
    OVERLAP: tl.constexpr,  # starts while the kernel before it ends
):
    T: tl.constexpr = D // 16
    HALF: tl.constexpr = T * 128 + (T + 1) // 2 * 32
    HALF8: tl.constexpr = T * 256 + (T + 1) // 2 * 32
    DP: tl.constexpr = triton.next_power_of_2(D)
    n = tl.program_id(0)
    head = tl.program_id(1)
    t = tl.program_id(2)  # tile
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    page = tl.load(pages_ptr + n)
    if page >= 0:
        a = tl.arange(0, 8)[:, None, None, None]
        q = tl.arange(0, 4)[None, :, None, None]
        h = tl.arange(0, 2)[None, None, :, None]
        c = tl.arange(0, 4)[None, None, None, :]
        row = 8 * h + a + 0 * q + 0 * c
        column = 4 * q + c + 0 * a + 0 * h
        turned = 8 * (c // 2) + 2 * q + c % 2 + 0 * a + 0 * h  # the token of a V column
        source = n
        start = 0  # where the first token of the block lies
        if RING > 0:
            source = tl.load(rings_ptr + n)
            start = tl.load(numbers_ptr + n) * 64 % RING
        k_start = k_ptr + source.to(tl.int64) * stride_kn + head.to(tl.int64) * stride_kh
        v_start = v_ptr + source.to(tl.int64) * stride_vn + head.to(tl.int64) * stride_vh
        if RING % 64 == 0:  # the block does not wrap, and from here on nothing knows of the ring
            k_start += start * stride_kt
            v_start += start * stride_vt
        base_at = page_at(page, head, HKV, BASE_PAGE, BASE_HEAD)
        base16 = base16_ptr + 2 * base_at
        base32 = base32_ptr + base_at
        slot = page
        if POOLED:
            slot = tl.load(slots_ptr + n * HKV + head)
        high_at = page_at(slot, head, HKV, HIGH_PAGE, HIGH_HEAD)
        high16 = high16_ptr + (high_at if HIGH == 3 else 2 * high_at)
        high32 = high32_ptr + high_at

        seq = page - page
        first = seq - 1  # the sequence whose first block it is, or below 0
        if SINK or SCALED:
            seq = n
            if RING == 0:
                seq = tl.load(seqs_ptr + n)
            first = tl.where(tl.load(numbers_ptr + n) == 0, seq, -1)
        of_sequence = (seq * HKV + head).to(tl.int64)
        if SCALED:
            scales_of = head.to(tl.int64) if FIXED else of_sequence
            k_scale_ptr, v_scale_ptr = k_channel_scale_ptr + scales_of * D, v_head_scale_ptr + scales_of
            d = tl.arange(0, DP)
            of_block = -1 if FIXED else first
            if of_block >= 0:
                k_scale, v_scale = scales_of_block(k_start, v_start, stride_kt, stride_vt, CENTRED, SINK, D, DP)
                if t == 0:
                    tl.store(k_scale_ptr + d, k_scale, mask=d < D)
                    tl.store(v_scale_ptr, v_scale)
            else:
                k_scale = tl.load(k_scale_ptr + d, mask=d < D, other=1.0)
                v_scale = tl.load(v_scale_ptr)

        # -- K: groups along D, the columns of a tile --
        DTYPE: tl.constexpr = k_block_mean_ptr.dtype.element_ty
        x0, x1, x2, x3, mean, block0_mean = _k_quarters(
            k_start, row, column, stride_kt, t, start, first, RING, CENTRED, SINK, DTYPE
        )
        four = t * 16 + tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(k_block_mean_ptr + page_at(page, head, HKV, MEAN_PAGE, MEAN_HEAD) + four, mean)
        if SINK:
            sunk = page_at(page if FIRST_IN_PAGE else first, head, HKV, FIRST_PAGE, FIRST_HEAD) + four
            tl.store(block0_mean_ptr + sunk, block0_mean, mask=(first + 0 * four) >= 0)
            value = tl.load(v_start + four)
            tl.store(sink_value_ptr + sunk, value, mask=(first + 0 * four) >= 0)
        if SCALED:
            x0, x1, x2, x3 = _times(x0, x1, x2, x3, _of_tile(k_scale, t, DP)[None, :, None, :])
        m0, m1, m2, m3 = _group_max(x0), _group_max(x1), _group_max(x2), _group_max(x3)
        z0, z1, z2, z3 = x0, x1, x2, x3
        if POWER:
            z0, z1, z2, z3, _mean, _block0_mean = _k_quarters(
                k_start, row, column, stride_kt, t ^ 1, start, first, RING, CENTRED, SINK, DTYPE
            )
            if SCALED:
                z0, z1, z2, z3 = _times(z0, z1, z2, z3, _of_tile(k_scale, t ^ 1, DP)[None, :, None, :])
            m0 = _larger(m0, _group_max(z0))
            m1 = _larger(m1, _group_max(z1))
            m2 = _larger(m2, _group_max(z2))
            m3 = _larger(m3, _group_max(z3))
        h0, y0, w0 = _quantise4(x0, z0, m0, POWER, BEST)
        h1, y1, w1 = _quantise4(x1, z1, m1, POWER, BEST)
        h2, y2, w2 = _quantise4(x2, z2, m2, POWER, BEST)
        h3, y3, w3 = _quantise4(x3, z3, m3, POWER, BEST)
        _store_tile4(base16, base32 + T * 128, t, h0, h1, h2, h3, y0, y1, y2, y3)
        if slot >= 0:
            if HIGH == 1:
                _store_residual4(high16, high32 + T * 128, t, x0 - w0, x1 - w1, x2 - w2, x3 - w3, BEST)
            elif HIGH == 2:
                _store_residual8(high16, high32 + T * 256, t, x0 - w0, x1 - w1, x2 - w2, x3 - w3)

        # -- V: groups along tokens, the columns of a tile again --
        v_tile = v_start + t * 16 + row
        x0 = tl.load(v_tile + _row_at(turned, 0, stride_vt, start, RING)).to(tl.float32)
        x1 = tl.load(v_tile + _row_at(turned, 1, stride_vt, start, RING)).to(tl.float32)
        x2 = tl.load(v_tile + _row_at(turned, 2, stride_vt, start, RING)).to(tl.float32)
        x3 = tl.load(v_tile + _row_at(turned, 3, stride_vt, start, RING)).to(tl.float32)
        hidden = (first + turned) < 0  # no token
        if SINK:
            hidden = (turned == 0) & (first >= 0)
            x0 = tl.where(hidden, 0.0, x0)
        if SCALED:
            x0, x1, x2, x3 = _times(x0, x1, x2, x3, v_scale)
        m0, m1, m2, m3 = _group_max(x0), _group_max(x1), _group_max(x2), _group_max(x3)
        if POWER:
            m0 = _larger(m0, m1)
            m1 = m0
            m2 = _larger(m2, m3)
            m3 = m2
        h0, y0, w0 = _quantise4(x0, x1, m0, POWER, BEST)
        h1, y1, w1 = _quantise4(x1, x0, m1, POWER, BEST)
        h2, y2, w2 = _quantise4(x2, x3, m2, POWER, BEST)
        h3, y3, w3 = _quantise4(x3, x2, m3, POWER, BEST)
        _store_tile4(base16 + 2 * HALF, base32 + HALF + T * 128, t, h0, h1, h2, h3, y0, y1, y2, y3)
        if slot >= 0:
            if HIGH == 1:
                _store_residual4(
                    high16 + 2 * HALF, high32 + HALF + T * 128, t, x0 - w0, x1 - w1, x2 - w2, x3 - w3, BEST
                )
            elif HIGH == 2:
                _store_residual8(high16 + 2 * HALF8, high32 + HALF8 + T * 256, t, x0 - w0, x1 - w1, x2 - w2, x3 - w3)

        # -- the 16-bit plane: lane 4a + q owns columns (w, e), c = 2w + e, of rows a and 8 + a --
        if HIGH == 3:
            place = (((a * 4 + q) * 2 + c // 2) * 2 + h) * 2 + c % 2
            for j in tl.static_range(4):
                x = tl.load(k_start + _row_at(row, j, stride_kt, start, RING) + t * 16 + column)
                tl.store(high16 + (t * 4 + j) * 256 + place, x, mask=(slot + 0 * place) >= 0)
                x = tl.load(v_tile + _row_at(turned, j, stride_vt, start, RING))
                if SINK and j == 0:
                    x = tl.where(hidden, 0.0, x)
                tl.store(high16 + 64 * D + (t * 4 + j) * 256 + place, x, mask=(slot + 0 * place) >= 0)


@triton.jit
def _row_at(row, QUARTER: tl.constexpr, stride, start, RING: tl.constexpr):
    """Offset of a row of a quarter of the block."""
    if RING % 64 == 0:
        at = row * stride + QUARTER * 16 * stride
    else:
        at = place_in_ring(start, QUARTER * 16 + row, RING) * stride
    return at


@triton.jit
def _times(x0, x1, x2, x3, factor):
    """Four quarters times one factor."""
    return x0 * factor, x1 * factor, x2 * factor, x3 * factor


@triton.jit
def _of_tile(scale, t, DP: tl.constexpr):
    """The scales [4, 4] (q c) of the columns of tile ``t``, from those of all channels [DP]."""
    tile = tl.arange(0, DP // 16)[:, None, None]
    return tl.sum(tl.where(tile == t, tl.reshape(scale, (DP // 16, 4, 4)), 0.0), 0)


@triton.jit
def _larger(x, y):
    """The larger; NaN if either is."""
    return tl.maximum(x, y) + (x * 0.0 + y * 0.0)


@triton.jit
def _k_quarters(
    k_start, row, column, stride_kt, t, start, first, RING: tl.constexpr, CENTRED: tl.constexpr, SINK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The four quarters of a K tile, less c_b if CENTRED; c_b [4, 4] in DTYPE; the mean of the block without its first token.

    c_b is the mean of the block, or its first token if SINK and ``first`` is not below 0.
    """
    k_tile = k_start + t * 16 + column
    x0 = tl.load(k_tile + _row_at(row, 0, stride_kt, start, RING)).to(tl.float32)
    x1 = tl.load(k_tile + _row_at(row, 1, stride_kt, start, RING)).to(tl.float32)
    x2 = tl.load(k_tile + _row_at(row, 2, stride_kt, start, RING)).to(tl.float32)
    x3 = tl.load(k_tile + _row_at(row, 3, stride_kt, start, RING)).to(tl.float32)
    total = tl.sum(tl.sum((x0 + x1) + (x2 + x3), 2), 0)  # [4, 4] (q c)
    mean = (total * 0.015625).to(DTYPE)
    block0_mean = mean
    if SINK:
        own = tl.load(k_start + t * 16 + tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :])
        block0_mean = tl.div_rn(total - own.to(tl.float32), 63.0 + tl.zeros_like(total)).to(DTYPE)
        mean = tl.where(first >= 0, own, mean)
    if CENTRED:
        taken = mean.to(tl.float32)[None, :, None, :]
        x0 -= taken
        x1 -= taken
        x2 -= taken
        x3 -= taken
    return x0, x1, x2, x3, mean, block0_mean


@triton.jit
def _store_residual4(ptr, scale_ptr, t, r0, r1, r2, r3, BEST: tl.constexpr):
    h0, y0, _w0 = _quantise4(r0, r0, _group_max(r0), False, BEST)
    h1, y1, _w1 = _quantise4(r1, r1, _group_max(r1), False, BEST)
    h2, y2, _w2 = _quantise4(r2, r2, _group_max(r2), False, BEST)
    h3, y3, _w3 = _quantise4(r3, r3, _group_max(r3), False, BEST)
    _store_tile4(ptr, scale_ptr, t, h0, h1, h2, h3, y0, y1, y2, y3)


@triton.jit
def _store_residual8(ptr, scale_ptr, t, r0, r1, r2, r3):
    e0, y0 = _quantise8(r0)
    e1, y1 = _quantise8(r1)
    e2, y2 = _quantise8(r2)
    e3, y3 = _quantise8(r3)
    _store_tile8(ptr, scale_ptr, t, e0, e1, e2, e3, y0, y1, y2, y3)
