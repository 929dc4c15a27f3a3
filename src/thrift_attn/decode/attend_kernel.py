"""The kernel of split-KV attention over two-precision pages; `thrift_attn.decode.attend` launches it.

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

import triton
import triton.language as tl

from thrift_attn.decode.block_steps import (
    add_k,
    add_v,
    cap_block,
    hide_block,
    load_chunk,
    load_queries,
    nth_unpromoted,
    operands,
    over_scales,
    scaled,
    softmax_step,
)
from thrift_attn.decode.fragments import (
    again,
    k_copy_operand,
    load_copy,
    over_rows,
    page_at,
    v_copy_operand,
)
from thrift_attn.decode.packed_rows import length_seen, rows_of
from thrift_attn.decode.split_steps import add_newest, fitted_queries, given_queries, store_split
from thrift_attn.kernels.arithmetic import dot
from thrift_attn.kernels.powers_of_two import inverse
from thrift_attn.reference.page_layout import HIGH

_NESTED: tl.constexpr = tl.constexpr(HIGH["nested"])
_NESTED8: tl.constexpr = tl.constexpr(HIGH["nested8"])
_COPY: tl.constexpr = tl.constexpr(HIGH["16bit"])
_LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # below every logit, and still finite so that differences are defined


@triton.jit(do_not_specialize=["window", "blocks", "tq"])
def attend_split_kernel(
    q_ptr,  # [B, Hq, Tq, D], or [tokens, Hq, D] with PACKED, 16-bit
    starts_ptr,  # int32 [B + 1], with PACKED: the first query of each sequence
    base_ptr,  # int32 [pages, Hkv, words], strides BASE_PAGE and BASE_HEAD
    high_ptr,  # the residual plane, int32 [slots, Hkv, words], or the 16-bit plane [slots, Hkv, 2 * 64 * D]; likewise
    tail_ptr,  # [rings, 2, Hkv, RING, D], 16-bit: K and V, token t at t mod RING
    rings_ptr,  # int32 [B]: the ring of each sequence
    bias_ptr,  # float32 [B, Hkv, NB, RP]: q.c_b in base 2
    block_indices_ptr,  # int32 [B, Hkv, 2, NB]: block numbers, page numbers; with POOLED [B, Hkv, 3, NB]: slots, too
    block_counts_ptr,  # int32 [B, Hkv, 2]: promoted, all listed
    lengths_ptr,  # int32 [B]
    partial_out_ptr,  # float32 [B, Hkv, num_splits, RP, D]
    partial_lse_ptr,  # float32 [B, Hkv, num_splits, RP], base 2; of the first splits that a sequence has work for
    k_channel_scale_ptr,  # float32 [B, Hkv, D], or [Hkv, D] if FIXED: powers of two that K of 4-bit planes was multiplied by
    v_head_scale_ptr,  # float32 [B, Hkv], or [Hkv]
    scale,  # factor of the logits times log2(e)
    stride_qb,
    stride_qh,
    stride_qt,
    window,
    blocks,  # NB
    tq,
    BASE_PAGE: tl.constexpr,
    BASE_HEAD: tl.constexpr,
    HIGH_PAGE: tl.constexpr,
    HIGH_HEAD: tl.constexpr,
    RING: tl.constexpr,
    TAIL_RING: tl.constexpr,  # strides of the tail
    TAIL_KV: tl.constexpr,
    TAIL_HEAD: tl.constexpr,
    TAIL_TOKEN: tl.constexpr,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    TQ: tl.constexpr,  # tq rounded up to a power of two
    D: tl.constexpr,
    CHUNKS: tl.constexpr,  # (first tile, number of tiles), see `chunks`
    N: tl.constexpr,
    RP: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SCALED: tl.constexpr,
    FIXED: tl.constexpr,  # all sequences have the same scales
    PACKED: tl.constexpr,
    POOLED: tl.constexpr,  # residuals lie in slots of their own; else where pages do
    PORTABLE: tl.constexpr,
    OVERLAP: tl.constexpr,  # starts while the choice of blocks is still being made
):
    T: tl.constexpr = D // 16
    HALF: tl.constexpr = T * 128 + (T + 1) // 2 * 32  # words of K, and of V
    PIECES: tl.constexpr = len(CHUNKS)
    WIDE: tl.constexpr = 2 if HIGH == _NESTED8 else 1
    RESIDUAL: tl.constexpr = HIGH == _NESTED or HIGH == _NESTED8
    # Base blocks that hold as many bytes as a promoted one takes.
    MORE: tl.constexpr = 2 if HIGH == _NESTED else (3 if HIGH == _NESTED8 else 4)
    MASKED: tl.constexpr = WINDOW or TQ > 1  # some block of the list may be visible in part
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    if TQ == 1 and not PACKED:
        tq = 1
    split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    rows = tl.program_id(1) * N
    bh = tl.program_id(2)
    b = bh // HKV
    h = bh % HKV
    # Lengths and scales come from a kernel of this chain, so not from an L1 line of its last replay. Queries are written by an
    # ordinary launch before it.
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")
    query, new = rows_of(starts_ptr, b, tq, PACKED)
    length = length_seen(length, new, tq, blocks, PACKED)
    if split >= length // 64 + 4:  # neither a block nor a step of the incomplete one is left for it
        return
    scales_of = h if FIXED else bh

    # -- queries, scaled by a power of two such that the largest uses the range of fp16 --
    q_start = q_ptr + b.to(tl.int64) * stride_qb + query * stride_qt + (h * GROUP).to(tl.int64) * stride_qh
    given = load_queries(q_start, rows, stride_qh, stride_qt, new, GROUP, N, CHUNKS)
    if SCALED:
        given = over_scales(given, k_channel_scale_ptr + scales_of.to(tl.int64) * D, N, CHUNKS)
    queries, factor, unfactor = fitted_queries(given, scale, N, CHUNKS)

    column = rows + tl.arange(0, N)
    position = length - new + column // GROUP  # [N]
    first = tl.zeros([N], tl.int32)
    if WINDOW:
        first = position - window + 1
    token = tl.arange(0, 16)

    bias_start = bias_ptr + bh.to(tl.int64) * blocks * RP + rows
    blocks_ptr = block_indices_ptr + bh.to(tl.int64) * (3 if POOLED else 2) * blocks
    pages_ptr = blocks_ptr + blocks
    slots_ptr = pages_ptr  # where the list says which slots
    if POOLED:
        slots_ptr = pages_ptr + blocks
    m = tl.full([N], _LOWEST, tl.float32)
    total = tl.zeros([16, N], tl.float32)
    out = ()
    for i in tl.static_range(PIECES):
        out = out + (tl.zeros([16 * CHUNKS[i][1], N], tl.float32),)

    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    promoted = tl.load(block_counts_ptr + bh * 2)
    listed = tl.load(block_counts_ptr + bh * 2 + 1)

    # This split's share: promoted blocks split, split + splits and so on; the splits from `short` on have one of them less and
    # take MORE of the others in its place; the incomplete block in steps of 16 tokens, dealt on from there.
    unpromoted = listed - promoted
    short = promoted % num_splits
    even = tl.where(short > 0, tl.maximum(unpromoted - MORE * (num_splits - short), 0), unpromoted)
    even_rounds = (tl.maximum(even - split, 0) + num_splits - 1) // num_splits
    more = tl.where(split >= short, tl.maximum(unpromoted - even - (split - short), 0), 0)
    count = even_rounds + (more + num_splits - short - 1) // (num_splits - short)
    first_step = (split + num_splits - even % num_splits) % num_splits

    # -- the first block of the others, then the promoted ones from base and residual: whatever comes next is loaded while this
    # is worked on, numbers one block earlier; past the end that is block 0 and page 0, whatever they hold --
    unpromoted_ptr = blocks_ptr + promoted
    at = unpromoted_ptr + nth_unpromoted(0, even_rounds, even, short, split, num_splits)
    block = tl.load(at, mask=count > 0, other=0)
    page = tl.load(at + blocks, mask=count > 0, other=0)
    page_ptr = base_ptr + page_at(page, h, HKV, BASE_PAGE, BASE_HEAD)
    codes = ()
    if RESIDUAL:
        SCALES: tl.constexpr = T * WIDE * 128  # place of the scales in half a residual page
        HALF_R: tl.constexpr = SCALES + HALF - T * 128
        ones = tl.full([N], 1.0, tl.float32)
        place = tl.load(pages_ptr + split, mask=split < promoted, other=page)
        slot = place
        if POOLED:
            slot = tl.load(slots_ptr + split, mask=split < promoted, other=0)
        b_ptr = base_ptr + page_at(place, h, HKV, BASE_PAGE, BASE_HEAD)
        for j in tl.static_range(PIECES):
            codes = codes + (load_chunk(b_ptr, T * 128, 1, CHUNKS[j][0], CHUNKS[j][1], ""),)
        for i in range(split, promoted, num_splits):
            number = tl.load(blocks_ptr + i)
            b_ptr = base_ptr + page_at(place, h, HKV, BASE_PAGE, BASE_HEAD)
            if POOLED:
                r_ptr = high_ptr + page_at(slot, h, HKV, HIGH_PAGE, HIGH_HEAD)
                slot = tl.load(slots_ptr + i + num_splits, mask=i + num_splits < promoted, other=0)
            else:
                r_ptr = high_ptr + page_at(place, h, HKV, HIGH_PAGE, HIGH_HEAD)
            place = tl.load(pages_ptr + i + num_splits, mask=i + num_splits < promoted, other=page)
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
            b_ptr = base_ptr + page_at(place, h, HKV, BASE_PAGE, BASE_HEAD)
            out, codes = add_v(out, rv_codes, ones, b0, b1, b2, b3, b_ptr, WIDE, T * 128, 1, CHUNKS, PORTABLE)
    else:
        for j in tl.static_range(PIECES):
            codes = codes + (load_chunk(page_ptr, T * 128, 1, CHUNKS[j][0], CHUNKS[j][1], ""),)

    # -- blocks in low precision --
    bias = tl.zeros([16, N], tl.float32)
    if CENTRED:
        bias = over_rows(bias_start + block.to(tl.int64) * RP, N) * unfactor
    at = unpromoted_ptr + nth_unpromoted(1, even_rounds, even, short, split, num_splits)
    block_after = tl.load(at, mask=count > 1, other=0)
    page_after = tl.load(at + blocks, mask=count > 1, other=0)
    for i in range(count):
        s0, s1, s2, s3, v_codes = add_k(
            bias, bias, bias, bias, codes, queries, page_ptr + HALF, 1, T * 128, 1, CHUNKS, PORTABLE
        )
        page_ptr = base_ptr + page_at(page_after, h, HKV, BASE_PAGE, BASE_HEAD)
        if CENTRED:
            bias = over_rows(bias_start + block_after.to(tl.int64) * RP, N) * unfactor
        s0, s1, s2, s3, left = cap_block(s0, s1, s2, s3, factor, CAP)
        if MASKED:
            start = block * 64
            if (start + 64 > length - new + 1) | (start < length - window):
                s0, s1, s2, s3 = hide_block(s0, s1, s2, s3, start + token, position, first)
        p0, p1, p2, p3, m, total, decay = softmax_step(s0, s1, s2, s3, left, m, total)
        b0, b1, b2, b3 = operands(p0, p1, p2, p3, N, tl.float16, 4, PORTABLE)
        out, codes = add_v(out, v_codes, decay, b0, b1, b2, b3, page_ptr, 1, T * 128, 1, CHUNKS, PORTABLE)
        block = block_after
        at = unpromoted_ptr + nth_unpromoted(i + 2, even_rounds, even, short, split, num_splits)
        block_after = tl.load(at, mask=i + 2 < count, other=0)
        page_after = tl.load(at + blocks, mask=i + 2 < count, other=0)

    # -- 16-bit data, which knows no scales: V has its own unit from here on, and the queries are read again --
    rows = again(rows, PORTABLE)
    given = load_queries(q_start, rows, stride_qh, stride_qt, new, GROUP, N, CHUNKS)
    raw = given_queries(given, N, CHUNKS)
    unit = 128.0
    if SCALED:
        unit *= inverse(tl.load(v_head_scale_ptr + scales_of, cache_modifier=".cg"))
    out = scaled(out, tl.full([N], 1.0, tl.float32) * unit, CHUNKS)
    if HIGH == _COPY:
        for i in range(split, promoted, num_splits):
            number = tl.load(blocks_ptr + i)
            c_ptr = high_ptr + page_at(tl.load(slots_ptr + i), h, HKV, HIGH_PAGE, HIGH_HEAD)
            s0 = tl.zeros([16, N], tl.float32)
            s1 = tl.zeros([16, N], tl.float32)
            s2 = tl.zeros([16, N], tl.float32)
            s3 = tl.zeros([16, N], tl.float32)
            for j in tl.static_range(PIECES):
                k_ptr = c_ptr + CHUNKS[j][0] * 1024
                s0 = dot(k_copy_operand(load_copy(k_ptr, 0, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], PORTABLE, s0)
                s1 = dot(k_copy_operand(load_copy(k_ptr, 1, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], PORTABLE, s1)
                s2 = dot(k_copy_operand(load_copy(k_ptr, 2, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], PORTABLE, s2)
                s3 = dot(k_copy_operand(load_copy(k_ptr, 3, CHUNKS[j][1]), CHUNKS[j][1]), raw[j], PORTABLE, s3)
            s0, s1, s2, s3, left = cap_block(s0, s1, s2, s3, scale, CAP)
            if MASKED:
                start = number * 64
                s0, s1, s2, s3 = hide_block(s0, s1, s2, s3, start + token, position, first)
            p0, p1, p2, p3, m, total, decay = softmax_step(s0, s1, s2, s3, left, m, total)
            b0, b1, b2, b3 = operands(p0, p1, p2, p3, N, DTYPE, 2, PORTABLE)
            grown = ()
            for j in tl.static_range(PIECES):
                v_ptr = c_ptr + 64 * D + CHUNKS[j][0] * 1024
                o = out[j] * decay[None, :]
                o = dot(v_copy_operand(load_copy(v_ptr, 0, CHUNKS[j][1]), CHUNKS[j][1]), b0, PORTABLE, o)
                o = dot(v_copy_operand(load_copy(v_ptr, 1, CHUNKS[j][1]), CHUNKS[j][1]), b1, PORTABLE, o)
                o = dot(v_copy_operand(load_copy(v_ptr, 2, CHUNKS[j][1]), CHUNKS[j][1]), b2, PORTABLE, o)
                o = dot(v_copy_operand(load_copy(v_ptr, 3, CHUNKS[j][1]), CHUNKS[j][1]), b3, PORTABLE, o)
                grown = grown + (o,)
            out = grown

    # -- the newest, incomplete block, and this split's result --
    m, total, out = add_newest(
        m, total, out, raw, tail_ptr, tl.load(rings_ptr + b), h, length, position, first, first_step, num_splits, scale,
        RING, TAIL_RING, TAIL_KV, TAIL_HEAD, TAIL_TOKEN, CAP, N, CHUNKS, PORTABLE,
    )  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    store_split(
        partial_out_ptr, partial_lse_ptr, m, total, out, bh.to(tl.int64) * num_splits + split, column, GROUP * new,
        D, RP, CHUNKS,
    )  # fmt: skip
