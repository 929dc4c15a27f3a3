"""Split-KV attention over two-precision pages; `thrift_attn.decode.combine_splits` merges the splits.

One program is one warp: it owns N query columns of one (sequence, KV head) and a share of the blocks, and computes the
transposed products S^T = K Q^T [tokens, N] and O^T = V^T P^T [D, N], so that a widened tile is the first operand of a matrix
product straight from the registers it was loaded into. The blocks come as a list (`thrift_attn.decode.select`): promoted ones
first, the others after them. Both parts of the list are dealt out one by one, and a split that got one promoted block less gets
more of the others, so that all splits move the same number of bytes and work side by side until the end.

Units: widened K and V are 2^-7 of their value and Q is scaled to fill half precision by a power of two, all exact; logits are
kept in base 2.
"""

# ruff: noqa: RUF005, SIM109  (kernels know tuples by `+` alone, and no `in`)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode.block_steps import (
    add_k,
    add_v,
    cap,
    cap_block,
    dot16,
    hide,
    hide_block,
    load_chunk,
    load_queries,
    nth_other,
    operands,
    scaled,
    softmax_step,
)
from thrift_attn.decode.combine_splits import padded_rows
from thrift_attn.decode.fragments import (
    again,
    k_copy_operand,
    load_copy,
    over_rows,
    query_operand,
    split_order,
    split_query_operand,
    v_copy_operand,
)
from thrift_attn.dispatch import interpreted
from thrift_attn.kernels.online_softmax import LOG2E
from thrift_attn.reference.page_layout import HIGH, TILE, plane_size

PORTABLE = interpreted()
"""Plain operations instead of inline assembly, and float32 products of 16-bit data, for the interpreter."""

_NESTED: tl.constexpr = tl.constexpr(HIGH["nested"])
_NESTED8: tl.constexpr = tl.constexpr(HIGH["nested8"])
_COPY: tl.constexpr = tl.constexpr(HIGH["16bit"])
_LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # below every logit, and still finite so that differences are defined


@triton.jit(do_not_specialize=["window", "blocks"])
def attend_split_kernel(
    q_ptr,  # [B, Hq, Tq, D], 16-bit
    base_ptr,  # int32 [pages, Hkv, words]
    high_ptr,  # the residual plane, int32 [pages, Hkv, words], or the 16-bit plane [pages, Hkv, 2 * 64 * D]
    tail_ptr,  # [2, B, 2, Hkv, 64, D], 16-bit: K and V, block b in slot b mod 2
    bias_ptr,  # float32 [B, Hkv, NB, RP]: q.c_b in base 2
    list_ptr,  # int32 [B, Hkv, 2, NB]: block numbers, page numbers
    counts_ptr,  # int32 [B, Hkv, 2]: promoted, all listed
    lengths_ptr,  # int32 [B]
    out_ptr,  # float32 [B, Hkv, SPLITS, RP, D]
    lse_ptr,  # float32 [B, Hkv, SPLITS, RP], base 2
    of_queries_ptr,  # 16-bit [Hkv, D], powers of two that queries are multiplied by
    scale,  # factor of the logits times log2(e)
    stride_qb,
    stride_qh,
    stride_qt,
    window,
    blocks,  # NB
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    TQ: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,  # (first tile, number of tiles), see `chunks`
    N: tl.constexpr,
    RP: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    LEVELLED: tl.constexpr,
    PORTABLE: tl.constexpr,
    OVERLAP: tl.constexpr,  # starts while the choice of blocks is still being made
):
    T: tl.constexpr = D // 16
    HALF: tl.constexpr = T * 128 + (T + 1) // 2 * 32  # words of K, and of V
    PARTS: tl.constexpr = len(CHUNKS)
    WIDE: tl.constexpr = 2 if HIGH == _NESTED8 else 1
    RESIDUAL: tl.constexpr = HIGH == _NESTED or HIGH == _NESTED8
    # Base blocks that hold as many bytes as a promoted one takes.
    MORE: tl.constexpr = 2 if HIGH == _NESTED else (3 if HIGH == _NESTED8 else 4)
    MASKED: tl.constexpr = WINDOW or TQ > 1  # some block of the list may be visible in part
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    split = tl.program_id(0)
    splits = tl.num_programs(0)
    rows = tl.program_id(1) * N
    bh = tl.program_id(2)
    b = bh // HKV
    h = bh % HKV
    length = tl.load(lengths_ptr + b)

    # -- queries, scaled by a power of two such that the largest uses the range of fp16 --
    q_start = q_ptr + b.to(tl.int64) * stride_qb + (h * GROUP).to(tl.int64) * stride_qh
    of_head = of_queries_ptr + h * D
    given = load_queries(q_start, of_head, rows, stride_qh, stride_qt, GROUP, TQ, N, CHUNKS, LEVELLED)
    largest = 0.0
    for i in tl.static_range(PARTS):
        largest = tl.maximum(largest, tl.max(tl.abs(given[i].to(tl.float32)), 0))
    field = 268 - ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF)
    field = tl.minimum(tl.maximum(field, 1), 253)
    up = (field << 23).to(tl.float32, bitcast=True)
    factor = scale * 128.0 * ((254 - field) << 23).to(tl.float32, bitcast=True)
    unfactor = 1.0 / factor
    queries = ()
    for i in tl.static_range(PARTS):
        queries = queries + (query_operand((given[i].to(tl.float32) * up).to(tl.float16), CHUNKS[i][1], N),)

    column = rows + tl.arange(0, N)
    position = length - TQ + column // GROUP  # [N]
    first = tl.zeros([N], tl.int32)
    if WINDOW:
        first = position - window + 1
    token = tl.arange(0, 16)

    bias_start = bias_ptr + bh.to(tl.int64) * blocks * RP + rows
    blocks_ptr = list_ptr + bh.to(tl.int64) * 2 * blocks
    pages_ptr = blocks_ptr + blocks
    m = tl.full([N], _LOWEST, tl.float32)
    total = tl.zeros([16, N], tl.float32)
    out = ()
    for i in tl.static_range(PARTS):
        out = out + (tl.zeros([16 * CHUNKS[i][1], N], tl.float32),)

    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    promoted = tl.load(counts_ptr + bh * 2)
    listed = tl.load(counts_ptr + bh * 2 + 1)

    # This split's share: promoted blocks split, split + splits and so on; the splits from `short` on have one of them less and
    # take MORE of the others in its place; the incomplete block in steps of 16 tokens, dealt on from there.
    rest = listed - promoted
    steps = (length % 64 + 15) // 16
    short = promoted % splits
    even = tl.where(short > 0, tl.maximum(rest - MORE * (splits - short), 0), rest)
    even_rounds = (tl.maximum(even - split, 0) + splits - 1) // splits
    more = tl.where(split >= short, tl.maximum(rest - even - (split - short), 0), 0)
    count = even_rounds + (more + splits - short - 1) // (splits - short)
    first_step = (split + splits - even % splits) % splits

    # -- the first block of the others, then the promoted ones from base and residual: whatever comes next is loaded while this
    # is worked on, numbers one block earlier; past the end that is block 0 and page 0, whatever they hold --
    rest_ptr = blocks_ptr + promoted
    at = rest_ptr + nth_other(0, even_rounds, even, short, split, splits)
    block = tl.load(at, mask=count > 0, other=0)
    page = tl.load(at + blocks, mask=count > 0, other=0)
    page_ptr = base_ptr + (page * HKV + h).to(tl.int64) * (2 * HALF)
    codes = ()
    if RESIDUAL:
        SCALES: tl.constexpr = T * WIDE * 128  # place of the scales in half a residual page
        HALF_R: tl.constexpr = SCALES + HALF - T * 128
        ones = tl.full([N], 1.0, tl.float32)
        place = (tl.load(pages_ptr + split, mask=split < promoted, other=page) * HKV + h).to(tl.int64)
        for j in tl.static_range(PARTS):
            codes = codes + (load_chunk(base_ptr + place * (2 * HALF), T * 128, 1, CHUNKS[j][0], CHUNKS[j][1]),)
        for i in range(split, promoted, splits):
            number = tl.load(blocks_ptr + i)
            b_ptr = base_ptr + place * (2 * HALF)
            r_ptr = high_ptr + place * (2 * HALF_R)
            place = (tl.load(pages_ptr + i + splits, mask=i + splits < promoted, other=page) * HKV + h).to(tl.int64)
            s0 = tl.zeros([16, N], tl.float32)
            if CENTRED:
                s0 = over_rows(bias_start + number.to(tl.int64) * RP, N) * unfactor
            s0, s1, s2, s3, rk_codes = add_k(s0, s0, s0, s0, codes, queries, r_ptr, 1, SCALES, WIDE, CHUNKS, PORTABLE)
            s0, s1, s2, s3, bv_codes = add_k(
                s0, s1, s2, s3, rk_codes, queries, b_ptr + HALF, WIDE, T * 128, 1, CHUNKS, PORTABLE
            )
            s0, s1, s2, s3, left = cap_block(s0, s1, s2, s3, factor, CAP)
            if MASKED:
                start = number * 64
                s0, s1, s2, s3 = hide_block(s0, s1, s2, s3, start + token, position, first)
            p0, p1, p2, p3, m, total, decay = softmax_step(s0, s1, s2, s3, left, m, total)
            b0, b1, b2, b3 = operands(p0, p1, p2, p3, N, tl.float16, 4, PORTABLE)
            out, rv_codes = add_v(
                out, bv_codes, decay, b0, b1, b2, b3, r_ptr + HALF_R, 1, SCALES, WIDE, CHUNKS, PORTABLE
            )
            out, codes = add_v(
                out, rv_codes, ones, b0, b1, b2, b3, base_ptr + place * (2 * HALF), WIDE, T * 128, 1, CHUNKS, PORTABLE
            )
    else:
        for j in tl.static_range(PARTS):
            codes = codes + (load_chunk(page_ptr, T * 128, 1, CHUNKS[j][0], CHUNKS[j][1]),)

    # -- blocks in low precision --
    bias = tl.zeros([16, N], tl.float32)
    if CENTRED:
        bias = over_rows(bias_start + block.to(tl.int64) * RP, N) * unfactor
    at = rest_ptr + nth_other(1, even_rounds, even, short, split, splits)
    block_after = tl.load(at, mask=count > 1, other=0)
    page_after = tl.load(at + blocks, mask=count > 1, other=0)
    for i in range(count):
        s0, s1, s2, s3, v_codes = add_k(
            bias, bias, bias, bias, codes, queries, page_ptr + HALF, 1, T * 128, 1, CHUNKS, PORTABLE
        )
        page_ptr = base_ptr + (page_after * HKV + h).to(tl.int64) * (2 * HALF)
        if CENTRED:
            bias = over_rows(bias_start + block_after.to(tl.int64) * RP, N) * unfactor
        s0, s1, s2, s3, left = cap_block(s0, s1, s2, s3, factor, CAP)
        if MASKED:
            start = block * 64
            if (start + 64 > length - TQ + 1) | (start < length - window):
                s0, s1, s2, s3 = hide_block(s0, s1, s2, s3, start + token, position, first)
        p0, p1, p2, p3, m, total, decay = softmax_step(s0, s1, s2, s3, left, m, total)
        b0, b1, b2, b3 = operands(p0, p1, p2, p3, N, tl.float16, 4, PORTABLE)
        out, codes = add_v(out, v_codes, decay, b0, b1, b2, b3, page_ptr, 1, T * 128, 1, CHUNKS, PORTABLE)
        block = block_after
        at = rest_ptr + nth_other(i + 2, even_rounds, even, short, split, splits)
        block_after = tl.load(at, mask=i + 2 < count, other=0)
        page_after = tl.load(at + blocks, mask=i + 2 < count, other=0)

    # -- 16-bit data: V has its own unit from here on, and the queries are read again rather than kept --
    rows = again(rows, PORTABLE)
    given = load_queries(q_start, of_head, rows, stride_qh, stride_qt, GROUP, TQ, N, CHUNKS, LEVELLED)
    raw = ()
    for i in tl.static_range(PARTS):
        raw = raw + (split_query_operand(given[i], CHUNKS[i][1], N),)
    out = scaled(out, tl.full([N], 128.0, tl.float32), CHUNKS)
    if HIGH == _COPY:
        for i in range(split, promoted, splits):
            number = tl.load(blocks_ptr + i)
            c_ptr = high_ptr + (tl.load(pages_ptr + i) * HKV + h).to(tl.int64) * (128 * D)
            s0 = tl.zeros([16, N], tl.float32)
            s1 = tl.zeros([16, N], tl.float32)
            s2 = tl.zeros([16, N], tl.float32)
            s3 = tl.zeros([16, N], tl.float32)
            for j in tl.static_range(PARTS):
                k_ptr = c_ptr + CHUNKS[j][0] * 1024
                s0 = dot16(k_copy_operand(load_copy(k_ptr, 0, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], s0, PORTABLE)
                s1 = dot16(k_copy_operand(load_copy(k_ptr, 1, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], s1, PORTABLE)
                s2 = dot16(k_copy_operand(load_copy(k_ptr, 2, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], s2, PORTABLE)
                s3 = dot16(k_copy_operand(load_copy(k_ptr, 3, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], s3, PORTABLE)
            s0, s1, s2, s3, left = cap_block(s0, s1, s2, s3, scale, CAP)
            if MASKED:
                start = number * 64
                s0, s1, s2, s3 = hide_block(s0, s1, s2, s3, start + token, position, first)
            p0, p1, p2, p3, m, total, decay = softmax_step(s0, s1, s2, s3, left, m, total)
            b0, b1, b2, b3 = operands(p0, p1, p2, p3, N, DTYPE, 2, PORTABLE)
            grown = ()
            for j in tl.static_range(PARTS):
                v_ptr = c_ptr + 64 * D + CHUNKS[j][0] * 1024
                o = out[j] * decay[None, :]
                o = dot16(v_copy_operand(load_copy(v_ptr, 0, CHUNKS[j][1]), CHUNKS[j][1]), b0, o, PORTABLE)
                o = dot16(v_copy_operand(load_copy(v_ptr, 1, CHUNKS[j][1]), CHUNKS[j][1]), b1, o, PORTABLE)
                o = dot16(v_copy_operand(load_copy(v_ptr, 2, CHUNKS[j][1]), CHUNKS[j][1]), b2, o, PORTABLE)
                o = dot16(v_copy_operand(load_copy(v_ptr, 3, CHUNKS[j][1]), CHUNKS[j][1]), b3, o, PORTABLE)
                grown = grown + (o,)
            out = grown

    # -- the newest, incomplete block --
    tail = length % 64
    tail_start = ((b * 2 + length // 64 % 2) * HKV + h).to(tl.int64) * (64 * D)
    v_tail_ptr = tail_ptr + (tl.num_programs(2) * 2).to(tl.int64) * (64 * D)
    for quarter in range(first_step, steps, splits):
        tokens = quarter * 16 + token  # [16]
        there = tokens < tail
        tail_at = tail_start + tokens * D
        s0 = tl.zeros([16, N], tl.float32)
        for j in tl.static_range(PARTS):
            d = CHUNKS[j][0] * 16 + tl.arange(0, 16 * CHUNKS[j][1])
            k_tile = tl.load(tail_ptr + tail_at[:, None] + d[None, :], mask=there[:, None], other=0.0)
            s0 = dot16(split_order(k_tile, CHUNKS[j][1]), raw[j], s0, PORTABLE)
        if CAP > 0:
            s0 = cap(s0, scale, CAP)
        else:
            s0 = s0 * scale
        s0 = hide(s0, length - tail + tokens, position, first)
        peak = tl.maximum(m, tl.max(s0, 0))
        decay = tl.exp2(m - peak)
        p0 = tl.exp2(s0 - peak[None, :])
        m = peak
        total = total * decay[None, :] + p0
        grown = ()
        for j in tl.static_range(PARTS):
            d = CHUNKS[j][0] * 16 + tl.arange(0, 16 * CHUNKS[j][1])
            v_tile = tl.load(v_tail_ptr + tail_at[None, :] + d[:, None], mask=there[None, :], other=0.0)
            grown = grown + (dot16(v_tile, p0.to(DTYPE), out[j] * decay[None, :], PORTABLE),)
        out = grown

    # -- this split's result --
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    mass = tl.sum(total, 0)
    seen = mass > 0
    norm = 1.0 / tl.where(seen, mass, 1.0)
    o_start = (bh.to(tl.int64) * splits + split) * RP
    inside = column < GROUP * TQ
    for j in tl.static_range(PARTS):
        d = CHUNKS[j][0] * 16 + tl.arange(0, 16 * CHUNKS[j][1])
        at_out = (o_start + column[None, :]) * D + d[:, None]
        tl.store(out_ptr + at_out, out[j] * norm[None, :], mask=inside[None, :])
    lse = tl.where(seen, m + tl.log2(tl.where(seen, mass, 1.0)), float("-inf"))
    tl.store(lse_ptr + o_start + column, lse, mask=inside)


def chunks(head_dim: int, largest: int) -> tuple[tuple[int, int], ...]:
    """How the tiles of a head are handled: (first tile, number of tiles), the numbers powers of two, none above ``largest``."""
    out, at, tiles = [], 0, head_dim // TILE
    while at < tiles:
        size = min(largest, 1 << ((tiles - at).bit_length() - 1))
        out.append((at, size))
        at += size
    return tuple(out)


def column_tile(group: int, tq: int, head_dim: int) -> int:
    """Query columns of one program: 8, or 16 where there are that many and the output of all of them fits the registers."""
    return 8 if group * tq <= 8 or head_dim > 128 else 16


class Tuning(NamedTuple):
    """What was found to compile to fast code that does not spill.

    Args:
        maxnreg: registers per thread: 168 lets 12 programs run on a multiprocessor of 64k registers, 255 lets 8.
        chunk: tiles that are widened at a time: fewer need fewer registers, more are compiled faster.
    """

    maxnreg: int
    chunk: int

    @property
    def programs(self) -> int:
        """Programs (of one warp) that a multiprocessor runs at a time; its registers are dealt out in four equal parts."""
        return 4 * (16384 // (32 * -(-self.maxnreg // 8) * 8))


def tuning(head_dim: int, tile: int, masked: bool, plane: str | None) -> Tuning:
    """Registers and chunk for a head dimension, column tile, partly visible blocks, and plane of high precision."""
    if head_dim > 128:
        return Tuning(255, 4 if plane == "16bit" else 2)
    if tile > 8:
        return Tuning(255, 4)
    return Tuning(168, 2 if masked else 4)


def choose_splits(max_blocks: int, batch: int, kv_heads: int, row_tiles: int, slots: int) -> int:
    """Splits per (sequence, KV head) such that no more than ``slots`` programs run, each with three blocks or more.

    Args:
        max_blocks: most blocks of a sequence.
        batch: B.
        kv_heads: Hkv.
        row_tiles: programs that share a split: padded rows over `column_tile`.
        slots: programs the device runs at a time: its multiprocessors times `Tuning.programs`.
    """
    return max(1, min(slots // max(1, batch * kv_heads * row_tiles), max_blocks // 3, 1024))


def attend_pages(
    q: Tensor,
    base: Tensor,
    high: Tensor | None,
    tail: Tensor,
    bias: Tensor,
    blocks: Tensor,
    counts: Tensor,
    lengths: Tensor,
    parts: Tensor,
    part_lse: Tensor,
    *,
    scale: float,
    of_queries: Tensor | None = None,
    plane: str | None = "nested",
    centred: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    tuned: Tuning | None = None,
    overlap: bool = False,
) -> None:
    """Attention of the newest tokens over the listed pages and the incomplete block, in splits.

    Args:
        q: queries ``[B, Hq, Tq, D]``, 16-bit, contiguous in D; query i of a sequence sits at position length - Tq + i.
        base: packed pages, int32 ``[pages, Hkv, plane_size(D, 4).words]``.
        high: the plane that ``plane`` names, or None.
        tail: ``[2, B, 2, Hkv, 64, D]`` in the dtype of ``q``: K and V of the newest blocks, block b in slot b mod 2. Only the
            first length % 64 tokens of the incomplete block are read.
        bias: float32 ``[B, Hkv, NB, RP]`` of `thrift_attn.decode.select.score_blocks`.
        blocks: int32 ``[B, Hkv, 2, NB]`` of `thrift_attn.decode.select.select_blocks`.
        counts: int32 ``[B, Hkv, 2]`` of the same.
        lengths: int32 ``[B]``, tokens of each sequence, the new ones included.
        parts: float32 ``[B, Hkv, SPLITS, RP, D]``, written.
        part_lse: float32 ``[B, Hkv, SPLITS, RP]``, written; base 2, -inf for an empty split.
        scale: factor of the logits.
        of_queries: what queries are multiplied by, in their dtype, Hkv times D numbers
        (`thrift_attn.cache.cache_scales`), or None.
        plane: ``"nested"``, ``"nested8"``, ``"16bit"`` or None (no block is promoted).
        centred: K pages hold K - c_b and ``bias`` is added.
        window: each query sees so many tokens, itself included; None for all.
        softcap: bound of the logits.
        tuned: registers and chunk, by default `tuning`.
        overlap: start while the choice of blocks is still being made (programmatic dependent launch).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: queries that are not 16-bit, or of another dtype than the incomplete block.
    """
    batch, heads, tq, dim = q.shape
    kv_heads, splits, rows = parts.shape[1], parts.shape[2], parts.shape[3]
    group = heads // kv_heads
    tile = column_tile(group, tq, dim)
    words = plane_size(dim, 4).words
    if base.shape[1:] != (kv_heads, words) or heads % kv_heads or rows != padded_rows(group, tq):
        raise ValueError(
            f"expected base [*, {kv_heads}, {words}] and parts [B, {kv_heads}, SPLITS, {padded_rows(group, tq)}, {dim}] "
            f"for q {list(q.shape)}, got {list(base.shape)} and {list(parts.shape)}"
        )
    if q.dtype not in (torch.float16, torch.bfloat16) or tail.dtype != q.dtype:
        raise TypeError(f"expected 16-bit q and tail of one dtype, got {q.dtype} and {tail.dtype}")
    if tail.shape != (2, batch, 2, kv_heads, BLOCK, dim) or not tail.is_contiguous():
        raise ValueError(
            f"expected a contiguous tail [2, {batch}, 2, {kv_heads}, {BLOCK}, {dim}], got {list(tail.shape)}"
        )
    masked = tq > 1 or window is not None
    tuned = tuned or tuning(dim, tile, masked, plane)
    attend_split_kernel[(splits, rows // tile, batch * kv_heads)](
        q,
        base,
        base if high is None else high,
        tail,
        bias,
        blocks,
        counts,
        lengths,
        parts,
        part_lse,
        q if of_queries is None else of_queries,
        scale * LOG2E,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        window or 0,
        blocks.shape[-1],
        HKV=kv_heads,
        GROUP=group,
        TQ=tq,
        D=dim,
        CHUNKS=chunks(dim, tuned.chunk),
        N=tile,
        RP=rows,
        HIGH=HIGH[plane],
        CENTRED=centred,
        WINDOW=window is not None,
        CAP=(softcap or 0.0) * LOG2E,
        LEVELLED=of_queries is not None,
        PORTABLE=PORTABLE,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=1,
        num_stages=1,
        maxnreg=tuned.maxnreg,
    )
