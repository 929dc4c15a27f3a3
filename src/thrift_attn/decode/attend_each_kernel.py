"""The kernel of decode for short page tables: a program per block, which finds out by itself whether its block is promoted;
`thrift_attn.decode.attend` launches it.

Which block a program attends to does not depend on the choice, so its 4-bit data are loaded and multiplied while the scores are
worked out. What waits for the scores is one comparison: a block is promoted where fewer blocks come before it than the budget
gives, in the order of `thrift_attn.decode.select_kernel.promotion_keys`. No kernel chooses and no list is written. Where the
budget promotes all blocks of a sequence, the scores are not waited for either.

Tiles, units and what a program does with a block are those of `thrift_attn.decode.attend_kernel`; q.c_b is computed here.
"""

# ruff: noqa: RUF005, SIM102  (kernels know tuples by `+` alone, no `in`, and what a constant excludes is not compiled)

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.block_steps import (
    add_k_half,
    add_v_half,
    cap_block,
    hide_block,
    load_half,
    load_queries,
    operands,
    over_scales,
    scaled,
    softmax_step,
)
from thrift_attn.decode.fragments import page_at, split_order
from thrift_attn.decode.packed_rows import length_seen, rows_of
from thrift_attn.decode.select_kernel import blocks_listed, promotion_keys
from thrift_attn.decode.split_steps import add_newest, fitted_queries, given_queries, store_split
from thrift_attn.kernels.arithmetic import dot
from thrift_attn.kernels.powers_of_two import inverse
from thrift_attn.reference.page_layout import HIGH

_NESTED8: tl.constexpr = tl.constexpr(HIGH["nested8"])
_LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # below every logit, and still finite so that differences are defined


@triton.jit
def _mean_logits(mean_ptr, raw, N: tl.constexpr, CHUNKS: tl.constexpr, PORTABLE: tl.constexpr):
    """Products of c_b with the queries, the same in every row of an accumulator: [16, N]."""
    s = tl.zeros([16, N], tl.float32)
    row = tl.zeros([16], tl.int32)
    for j in tl.static_range(len(CHUNKS)):
        d = CHUNKS[j][0] * 16 + tl.arange(0, 16 * CHUNKS[j][1])
        mean = tl.load(mean_ptr + row[:, None] + d[None, :], cache_modifier=".cg")
        s = dot(split_order(mean, CHUNKS[j][1]), raw[j], PORTABLE, s)
    return s


@triton.jit
def _weights(
    s0, s1, s2, s3, block, position, first, factor, m, total,
    MASKED: tl.constexpr, CAP: tl.constexpr, N: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum with one block, and its weights as operands."""
    s0, s1, s2, s3, left = cap_block(s0, s1, s2, s3, factor, CAP)
    if MASKED:
        s0, s1, s2, s3 = hide_block(s0, s1, s2, s3, block * 64 + tl.arange(0, 16), position, first)
    p0, p1, p2, p3, m, total, _decay = softmax_step(s0, s1, s2, s3, left, m, total)
    b0, b1, b2, b3 = operands(p0, p1, p2, p3, N, tl.float16, 4, PORTABLE)
    return b0, b1, b2, b3, m, total


@triton.jit(do_not_specialize=["window", "blocks", "tq"])
def attend_each_kernel(
    q_ptr,  # [B, Hq, Tq, D], or [tokens, Hq, D] with PACKED, 16-bit
    starts_ptr,  # int32 [B + 1], with PACKED: the first query of each sequence
    base_ptr,  # int32 [pages, Hkv, words], strides BASE_PAGE and BASE_HEAD
    high_ptr,  # the residual plane, likewise
    k_block_mean_ptr,  # 16-bit [pages, Hkv, D], strides MEAN_PAGE and MEAN_HEAD
    tail_ptr,  # [rings, 2, Hkv, RING, D], 16-bit: K and V, token t at t mod RING
    rings_ptr,  # int32 [B]: the ring of each sequence
    score_ptr,  # float32 [B, Hkv, NB], with SCORED
    bias_ptr,  # float32 [B, Hkv, NB, RP], without SCORED: q.c_b of block 0 is written, base 2
    page_table_ptr,  # int32 [B, NB]
    budget_ptr,  # int32 [NB + 1]: promoted blocks where so many are listed
    lengths_ptr,  # int32 [B]
    partial_out_ptr,  # float32 [B, Hkv, NB, RP, D]
    partial_lse_ptr,  # float32 [B, Hkv, NB, RP], base 2; of the first splits that a sequence has work for
    k_channel_scale_ptr,  # float32 [B, Hkv, D], or [Hkv, D] if FIXED: powers of two that K of 4-bit planes was multiplied by
    v_head_scale_ptr,  # float32 [B, Hkv], or [Hkv]
    scale,  # factor of the logits times log2(e)
    stride_qb,
    stride_qh,
    stride_qt,
    window,
    blocks,  # NB, and splits
    tq,
    BASE_PAGE: tl.constexpr,
    BASE_HEAD: tl.constexpr,
    HIGH_PAGE: tl.constexpr,
    HIGH_HEAD: tl.constexpr,
    MEAN_PAGE: tl.constexpr,
    MEAN_HEAD: tl.constexpr,
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
    FIRST: tl.constexpr,  # forced first and last blocks
    LAST: tl.constexpr,
    PAD: tl.constexpr,  # NB rounded up to a power of two
    SCORED: tl.constexpr,  # the kernel before this one works out the scores; else every block is promoted
    PORTABLE: tl.constexpr,
    OVERLAP: tl.constexpr,  # starts while the kernel before it runs
):
    T: tl.constexpr = D // 16
    HALF: tl.constexpr = T * 128 + (T + 1) // 2 * 32  # words of K, and of V
    WIDE: tl.constexpr = 2 if HIGH == _NESTED8 else 1
    SCALES: tl.constexpr = T * WIDE * 128  # place of the scales in half a residual page
    HALF_R: tl.constexpr = SCALES + HALF - T * 128

    if OVERLAP and not SCORED:  # the kernel before this one may be the one that writes pages
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if TQ == 1 and not PACKED:
        tq = 1
    split = tl.program_id(0)
    rows = tl.program_id(1) * N
    bh = tl.program_id(2)
    b = bh // HKV
    h = bh % HKV
    # Nothing that a kernel of this chain writes comes from an L1 line of its last replay: with SCORED all is read before the
    # scores are waited for, and the kernel of the scores has waited for those before it.
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + split)
    query, new = rows_of(starts_ptr, b, tq, PACKED)
    length = length_seen(length, new, tq, blocks, PACKED)
    start, full, blocks_in_all, listed = blocks_listed(length, new, window, WINDOW)
    if split >= full + 4:  # neither a block nor a step of the incomplete one is left for it
        return
    scales_of = h if FIXED else bh
    q_start = q_ptr + b.to(tl.int64) * stride_qb + query * stride_qt + (h * GROUP).to(tl.int64) * stride_qh
    given = load_queries(q_start, rows, stride_qh, stride_qt, new, GROUP, N, CHUNKS)
    raw = given_queries(given, N, CHUNKS)
    column = rows + tl.arange(0, N)
    position = length - new + column // GROUP  # [N]
    first = tl.zeros([N], tl.int32)
    if WINDOW:
        first = position - window + 1
    m = tl.full([N], _LOWEST, tl.float32)
    total = tl.zeros([16, N], tl.float32)
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (tl.zeros([16 * CHUNKS[i][1], N], tl.float32),)

    for block in range(tl.maximum(split, start), tl.minimum(split + 1, full)):  # once, or not at all
        base = base_ptr + page_at(page, h, HKV, BASE_PAGE, BASE_HEAD)
        k_codes = load_half(base, T * 128, 1, CHUNKS)
        v_codes = load_half(base + HALF, T * 128, 1, CHUNKS)
        wanted = listed
        if SCORED:
            wanted = tl.minimum(tl.maximum(tl.load(budget_ptr + listed), 0), listed)
        unscaled = given
        if SCALED:
            unscaled = over_scales(given, k_channel_scale_ptr + scales_of.to(tl.int64) * D, N, CHUNKS)
        queries, factor, unfactor = fitted_queries(unscaled, scale, N, CHUNKS)
        s0 = tl.zeros([16, N], tl.float32)
        if CENTRED:
            mean = k_block_mean_ptr + page_at(page, h, HKV, MEAN_PAGE, MEAN_HEAD)
            s0 = _mean_logits(mean, raw, N, CHUNKS, PORTABLE) * scale
            if not SCORED:
                if block == 0:  # for the value of the first token, which is added where splits are combined
                    to = bias_ptr + bh.to(tl.int64) * blocks * RP + column
                    tl.store(to, tl.max(s0, 0))
            s0 *= unfactor
        s0, s1, s2, s3 = add_k_half(s0, s0, s0, s0, k_codes, queries, 1, CHUNKS, PORTABLE)

        promoted = wanted > 0
        if SCORED:
            if wanted < listed:
                if OVERLAP:
                    tl.extra.cuda.gdc_wait()
                    tl.extra.cuda.gdc_launch_dependents()
                others = tl.arange(0, PAD)
                scores = score_ptr + bh.to(tl.int64) * blocks
                key = promotion_keys(scores, others, start, full, blocks_in_all, FIRST, LAST)
                own = tl.max(tl.where(others == block, key, -0x7FFFFFFF - 1), 0)
                before = (key > own) | ((key == own) & (others < block))
                promoted = tl.sum(before.to(tl.int32), 0) < wanted
        if promoted:
            residual = high_ptr + page_at(page, h, HKV, HIGH_PAGE, HIGH_HEAD)
            k_more = load_half(residual, SCALES, WIDE, CHUNKS)
            v_more = load_half(residual + HALF_R, SCALES, WIDE, CHUNKS)
            s0, s1, s2, s3 = add_k_half(s0, s1, s2, s3, k_more, queries, WIDE, CHUNKS, PORTABLE)
            b0, b1, b2, b3, m, total = _weights(
                s0, s1, s2, s3, block, position, first, factor, m, total, WINDOW or TQ > 1, CAP, N, PORTABLE
            )
            out = add_v_half(out, v_more, b0, b1, b2, b3, WIDE, CHUNKS, PORTABLE)
        else:
            b0, b1, b2, b3, m, total = _weights(
                s0, s1, s2, s3, block, position, first, factor, m, total, WINDOW or TQ > 1, CAP, N, PORTABLE
            )
        out = add_v_half(out, v_codes, b0, b1, b2, b3, 1, CHUNKS, PORTABLE)
        unit = 128.0
        if SCALED:
            unit *= inverse(tl.load(v_head_scale_ptr + scales_of, cache_modifier=".cg"))
        out = scaled(out, tl.full([N], 1.0, tl.float32) * unit, CHUNKS)

    if OVERLAP and SCORED:  # before anything is written that the kernels of the last step read
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first_step = (split + blocks - full % blocks) % blocks
    m, total, out = add_newest(
        m, total, out, raw, tail_ptr, tl.load(rings_ptr + b), h, length, position, first, first_step, blocks, scale,
        RING, TAIL_RING, TAIL_KV, TAIL_HEAD, TAIL_TOKEN, CAP, N, CHUNKS, PORTABLE,
    )  # fmt: skip
    store_split(
        partial_out_ptr, partial_lse_ptr, m, total, out, bh.to(tl.int64) * blocks + split, column, GROUP * new,
        D, RP, CHUNKS,
    )  # fmt: skip
