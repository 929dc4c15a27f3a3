"""The kernel that decodes pages to 16-bit K and V; `thrift_attn.decode.gather` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.fragments import page_at, place_in_ring, quarter_bits
from thrift_attn.decode.packed_rows import length_seen
from thrift_attn.kernels.powers_of_two import inverse


@triton.jit
def _half(bits):
    """The half float with these 16 bits, as float32."""
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _element8(word, J: tl.constexpr):
    """e4m3 value times 2^-8 of the low (J even) or high byte."""
    byte = (word >> (8 * (J % 2))) & 0xFF
    return _half(((byte & 0x80) << 8) | ((byte & 0x7F) << 7))


@triton.jit
def _scale(word, J: tl.constexpr):
    """Scale times 2^7 of token quarter J."""
    return _half(((word >> (8 * J)) & 0xFF) << 7)


@triton.jit
def _decoded(ptr16, ptr32, t, spot, rows, J: tl.constexpr, T: tl.constexpr, EIGHT: tl.constexpr):
    """Quarter J of one tile of K or V; ``ptr16`` and ``ptr32`` are its half of a plane in 16- and 32-bit words."""
    if EIGHT:
        word = tl.load(ptr16 + t * 512 + (J // 2) * 256 + spot).to(tl.int32)
        scales = tl.load(ptr32 + T * 256 + t // 2 * 32 + rows + t % 2)
        return _element8(word, J) * _scale(scales, J) * 2.0
    else:
        word = tl.load(ptr16 + t * 256 + spot).to(tl.int32)
        scales = tl.load(ptr32 + T * 128 + t // 2 * 32 + rows + t % 2)
        return _half(quarter_bits(word, J)) * _scale(scales, J) * 128.0


@triton.jit(do_not_specialize=["blocks", "capacity", "first"])
def gather_pages_kernel(
    k_ptr,  # [B, Hkv, S, D], contiguous, written from block ``first`` up to the length of each sequence
    v_ptr,
    base16_ptr,  # the base plane in 16-bit and in 32-bit words, which BASE_PAGE and BASE_HEAD count
    base32_ptr,
    k_block_mean_ptr,  # [pages, Hkv, D], strides MEAN_PAGE and MEAN_HEAD
    high16_ptr,  # the residual plane likewise, or the 16-bit plane
    high32_ptr,
    tail_ptr,  # [rings, 2, Hkv, RING, D], token t at t mod RING
    rings_ptr,  # int32 [B]: the ring of each sequence
    sink_value_ptr,  # [B or pages, Hkv, D]: V of the first token, which no page holds
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    k_channel_scale_ptr,  # float32 [B, Hkv, D], or [Hkv, D] if FIXED: powers of two that packed K was multiplied by
    v_head_scale_ptr,  # float32 [B, Hkv], or [Hkv]
    slot_of_page_ptr,  # int32 [pages, Hkv], with POOLED: where the plane of promoted blocks lies, below 0 where it is not kept
    blocks,  # NB
    capacity,  # S
    first,  # the block that comes first
    BASE_PAGE: tl.constexpr,
    BASE_HEAD: tl.constexpr,
    HIGH_PAGE: tl.constexpr,
    HIGH_HEAD: tl.constexpr,
    MEAN_PAGE: tl.constexpr,
    MEAN_HEAD: tl.constexpr,
    FIRST_PAGE: tl.constexpr,  # strides of sink_value
    FIRST_HEAD: tl.constexpr,
    FIRST_IN_PAGE: tl.constexpr,  # its rows are pages
    RING: tl.constexpr,
    TAIL_RING: tl.constexpr,  # strides of the tail
    TAIL_KV: tl.constexpr,
    TAIL_HEAD: tl.constexpr,
    TAIL_TOKEN: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRED: tl.constexpr,
    SINK: tl.constexpr,
    SCALED: tl.constexpr,
    FIXED: tl.constexpr,  # all sequences have the same scales
    POOLED: tl.constexpr,
):
    T: tl.constexpr = D // 16
    HALF: tl.constexpr = T * 128 + (T + 1) // 2 * 32  # 32-bit words of K or V in a 4-bit plane
    HALF8: tl.constexpr = T * 256 + (T + 1) // 2 * 32
    EIGHT: tl.constexpr = HIGH == 2
    SIZE: tl.constexpr = HALF8 if EIGHT else HALF
    block = first + tl.program_id(0)
    t = tl.program_id(1)  # tile
    b, h = tl.program_id(2) // HKV, tl.program_id(2) % HKV
    length = length_seen(tl.load(lengths_ptr + b), 0, 0, blocks, False)
    a = tl.arange(0, 8)[:, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None]
    s = tl.arange(0, 2)[None, None, :, None]
    c = tl.arange(0, 4)[None, None, None, :]
    spot = ((a * 4 + q) * 2 + s) * 4 + c
    rows = a * 4 + s * 2 + 0 * q + 0 * c
    row = 8 * s + a + 0 * q + 0 * c
    column = 4 * q + c + 0 * a + 0 * s
    turned = 8 * (c // 2) + 2 * q + c % 2 + 0 * a + 0 * s  # the token of a V column
    out = ((b.to(tl.int64) * HKV + h) * capacity - first * 64) * D
    if block * 64 + 64 <= length:
        page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + block)
        out += block.to(tl.int64) * 64 * D
        slot = page
        if POOLED:
            slot = tl.load(slot_of_page_ptr + page.to(tl.int64) * HKV + h)
        there = slot >= 0
        high_at = page_at(tl.where(there, slot, 0), h, HKV, HIGH_PAGE, HIGH_HEAD)
        mean = 0.0
        if CENTRED:
            mean_at = page_at(page, h, HKV, MEAN_PAGE, MEAN_HEAD)
            mean = tl.load(k_block_mean_ptr + mean_at + t * 16 + column).to(tl.float32)
        base_at = page_at(page, h, HKV, BASE_PAGE, BASE_HEAD)
        base16, base32 = base16_ptr + 2 * base_at, base32_ptr + base_at
        inv_k = 1.0
        inv_v = 1.0
        if SCALED:
            scales_of = (h if FIXED else b * HKV + h).to(tl.int64)
            inv_k = inverse(tl.load(k_channel_scale_ptr + scales_of * D + t * 16 + column))
            inv_v = inverse(tl.load(v_head_scale_ptr + scales_of))
        for j in tl.static_range(4):
            k_to = out + (16 * j + row) * D + t * 16 + column
            v_to = out + (16 * j + turned) * D + t * 16 + row
            if HIGH == 3 and not POOLED:
                copy = high16_ptr + high_at + (t * 4 + j) * 256
                copy += (((a * 4 + q) * 2 + c // 2) * 2 + s) * 2 + c % 2
                k = tl.load(copy).to(tl.float32)
                v = tl.load(copy + 64 * D).to(tl.float32)
            else:
                k = _decoded(base16, base32, t, spot, rows, j, T, False)
                v = _decoded(base16 + 2 * HALF, base32 + HALF, t, spot, rows, j, T, False)
                if HIGH == 1 or HIGH == 2:
                    high16, high32 = high16_ptr + 2 * high_at, high32_ptr + high_at
                    more_k = _decoded(high16, high32, t, spot, rows, j, T, EIGHT)
                    more_v = _decoded(high16 + 2 * SIZE, high32 + SIZE, t, spot, rows, j, T, EIGHT)
                    k += tl.where(there, more_k, 0.0)
                    v += tl.where(there, more_v, 0.0)
                k = mean + k * inv_k
                v = v * inv_v
                if HIGH == 3:
                    copy = high16_ptr + high_at + (t * 4 + j) * 256
                    copy += (((a * 4 + q) * 2 + c // 2) * 2 + s) * 2 + c % 2
                    k = tl.where(there, tl.load(copy).to(tl.float32), k)
                    v = tl.where(there, tl.load(copy + 64 * D).to(tl.float32), v)
            if SINK and j == 0:
                first_at = page_at(page if FIRST_IN_PAGE else b, h, HKV, FIRST_PAGE, FIRST_HEAD)
                own = tl.load(sink_value_ptr + first_at + t * 16 + row).to(tl.float32)
                v = tl.where((block == 0) & (turned == 0), own, v)
            tl.store(k_ptr + k_to, k.to(k_ptr.dtype.element_ty))
            tl.store(v_ptr + v_to, v.to(v_ptr.dtype.element_ty))
    elif block * 64 < length:  # the incomplete block
        token, d = tl.arange(0, 64)[:, None], t * 16 + tl.arange(0, 16)[None, :]
        there = (block * 64 + token < length) & (d < D)
        ring = tail_ptr + tl.load(rings_ptr + b).to(tl.int64) * TAIL_RING + h.to(tl.int64) * TAIL_HEAD
        at = ring + place_in_ring(block * 64 % RING, token, RING) * TAIL_TOKEN + d
        to = out + (block * 64 + token).to(tl.int64) * D + d
        tl.store(k_ptr + to, tl.load(at, mask=there), mask=there)
        tl.store(v_ptr + to, tl.load(at + TAIL_KV, mask=there), mask=there)
