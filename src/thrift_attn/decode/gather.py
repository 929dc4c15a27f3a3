"""Pages back to 16-bit K and V on the device: what a chunk of many new tokens attends to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.reference.page_layout import HIGH

_MASK = tl.constexpr(0x8E00)


@triton.jit
def _half(bits):
    """The half float with these 16 bits, as float32."""
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _element4(word, J: tl.constexpr):
    """e2m1 value times 2^-14 of token quarter J, see `thrift_attn.reference.page_layout`."""
    if J == 0:
        bits = word
    elif J == 1:
        bits = word << 3
    elif J == 2:
        bits = (word << 6) ^ (word << 1)
    else:
        bits = (word << 9) ^ (word << 2)
    return _half(bits & _MASK)


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
        return _element4(word, J) * _scale(scales, J) * 128.0


@triton.jit(do_not_specialize=["blocks", "slots"])
def widen_kernel(
    k_ptr,  # [B, Hkv, S, D], contiguous, written up to the length of each sequence
    v_ptr,
    base16_ptr,  # the base plane in 16-bit and in 32-bit words
    base32_ptr,
    centre_ptr,  # [pages, Hkv, D]
    high16_ptr,  # the residual plane likewise, or the 16-bit plane
    high32_ptr,
    tail_ptr,  # [2, B, 2, Hkv, 64, D]
    values_ptr,  # [B, Hkv, D]: V of the first token, which no page holds
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    of_k_ptr,  # [Hkv, D], what K of the cache are multiplied by
    of_v_ptr,  # [Hkv]
    blocks,  # NB
    slots,  # S
    BATCH: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRED: tl.constexpr,
    SINK: tl.constexpr,
    LEVELLED: tl.constexpr,
):
    T: tl.constexpr = D // 16
    HALF: tl.constexpr = T * 128 + (T + 1) // 2 * 32  # 32-bit words of K or V in a 4-bit plane
    HALF8: tl.constexpr = T * 256 + (T + 1) // 2 * 32
    EIGHT: tl.constexpr = HIGH == 2
    SIZE: tl.constexpr = HALF8 if EIGHT else HALF
    block = tl.program_id(0)
    t = tl.program_id(1)  # tile
    b, h = tl.program_id(2) // HKV, tl.program_id(2) % HKV
    length = tl.load(lengths_ptr + b)
    a = tl.arange(0, 8)[:, None, None, None]
    q = tl.arange(0, 4)[None, :, None, None]
    s = tl.arange(0, 2)[None, None, :, None]
    c = tl.arange(0, 4)[None, None, None, :]
    spot = ((a * 4 + q) * 2 + s) * 4 + c
    rows = a * 4 + s * 2 + 0 * q + 0 * c
    row = 8 * s + a + 0 * q + 0 * c
    column = 4 * q + c + 0 * a + 0 * s
    turned = 8 * (c // 2) + 2 * q + c % 2 + 0 * a + 0 * s  # the token of a V column
    out = (b.to(tl.int64) * HKV + h) * slots * D
    of_k = 1.0
    of_v = 1.0
    if LEVELLED:
        of_k = tl.load(of_k_ptr + h * D + t * 16 + column).to(tl.float32)
        of_v = tl.load(of_v_ptr + h).to(tl.float32)
    if block * 64 + 64 <= length:
        page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + block).to(tl.int64)
        where = page * HKV + h
        out += block.to(tl.int64) * 64 * D
        mean = 0.0
        if CENTRED and HIGH != 3:
            mean = tl.load(centre_ptr + where * D + t * 16 + column).to(tl.float32)
        base16, base32 = base16_ptr + where * (4 * HALF), base32_ptr + where * (2 * HALF)
        for j in tl.static_range(4):
            k_to = out + (16 * j + row) * D + t * 16 + column
            v_to = out + (16 * j + turned) * D + t * 16 + row
            if HIGH == 3:
                copy = high16_ptr + where * (128 * D) + (t * 4 + j) * 256
                copy += (((a * 4 + q) * 2 + c // 2) * 2 + s) * 2 + c % 2
                k = tl.load(copy).to(tl.float32)
                v = tl.load(copy + 64 * D).to(tl.float32)
            else:
                high16, high32 = high16_ptr + where * (4 * SIZE), high32_ptr + where * (2 * SIZE)
                k = mean + _decoded(base16, base32, t, spot, rows, j, T, False)
                k += _decoded(high16, high32, t, spot, rows, j, T, EIGHT)
                v = _decoded(base16 + 2 * HALF, base32 + HALF, t, spot, rows, j, T, False)
                v += _decoded(high16 + 2 * SIZE, high32 + SIZE, t, spot, rows, j, T, EIGHT)
            if SINK and j == 0:
                own = tl.load(values_ptr + (b.to(tl.int64) * HKV + h) * D + t * 16 + row).to(tl.float32)
                v = tl.where((block == 0) & (turned == 0), own, v)
            tl.store(k_ptr + k_to, (k * of_k).to(k_ptr.dtype.element_ty))
            tl.store(v_ptr + v_to, (v * of_v).to(v_ptr.dtype.element_ty))
    elif block * 64 < length:  # the incomplete block
        token, d = tl.arange(0, 64)[:, None], t * 16 + tl.arange(0, 16)[None, :]
        there = (block * 64 + token < length) & (d < D)
        at = (((b.to(tl.int64) * 2 + block % 2) * HKV + h) * 64 + token) * D + d
        to = out + (block * 64 + token).to(tl.int64) * D + d
        of_row = 1.0
        if LEVELLED:
            of_row = tl.load(of_k_ptr + h * D + d).to(tl.float32)
        k = tl.load(tail_ptr + at, mask=there).to(tl.float32) * of_row
        tl.store(k_ptr + to, k.to(k_ptr.dtype.element_ty), mask=there)
        at += BATCH * 2 * HKV * 64 * D
        v = tl.load(tail_ptr + at, mask=there).to(tl.float32) * of_v
        tl.store(v_ptr + to, v.to(v_ptr.dtype.element_ty), mask=there)


def widen_pages(
    k: Tensor,
    v: Tensor,
    base: Tensor,
    centres: Tensor,
    high: Tensor,
    tail: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    levels: tuple[Tensor, Tensor] | None = None,
    values: Tensor | None = None,
    *,
    tokens: int,
    plane: str,
    centred: bool,
) -> None:
    """Write K and V of every sequence up to its length, from its pages and from the 16-bit slot of its newest block.

    Args:
        k: ``[B, Hkv, S, D]`` in the dtype of ``centres``, contiguous, written; S is at least ``tokens``.
        v: likewise.
        base: the planes of `thrift_attn.reference.pages.Pool`.
        centres: likewise.
        high: likewise.
        tail: ``[2, B, 2, Hkv, 64, D]``.
        page_table: int32 ``[B, NB]``.
        lengths: int32 ``[B]``.
        levels: what K ``[Hkv, D]`` and V ``[Hkv]`` are multiplied by; None changes nothing.
        values: V of the first token of every sequence ``[B, Hkv, D]``, in the units of the pages, if they lack it; else None.
        tokens: the longest of ``lengths``, known to the caller.
        plane: ``"nested"``, ``"nested8"`` or ``"16bit"``.
        centred: whether the pages hold K - c_b.

    Raises:
        ValueError: too little room.
    """
    batch, kv_heads, slots, dim = k.shape
    if slots < tokens:
        raise ValueError(f"k and v must have room for {tokens} tokens, got {slots}")
    if not tokens:
        return
    high16 = high if plane == "16bit" else high.view(torch.int16)
    widen_kernel[(-(-tokens // BLOCK), dim // 16, batch * kv_heads)](
        k, v, base.view(torch.int16), base, centres, high16, high, tail, tail if values is None else values, page_table,
        lengths, *(levels or (centres, centres)),
        page_table.shape[1], slots,
        BATCH=batch, HKV=kv_heads, D=dim, HIGH=HIGH[plane], CENTRED=centred, SINK=values is not None,
        LEVELLED=levels is not None,
        num_warps=1,
    )  # fmt: skip
