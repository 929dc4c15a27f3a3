"""The kernel that scores KV blocks by q.c_b; `thrift_attn.decode.score` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.fragments import page_at
from thrift_attn.decode.packed_rows import length_seen, rows_of
from thrift_attn.kernels.arithmetic import dot


@triton.jit
def _score(s, block, block0_mean, q, inside, scale, SINK: tl.constexpr):
    """Scores [BM] of blocks: the largest logit s [BM, N] of the columns that are inside; with SINK that of block 0 is the
    largest product of ``block0_mean`` [DP] with the queries q [DP, N].
    """
    largest = tl.max(tl.where(inside[None, :], s, float("-inf")), 1)
    if SINK and tl.program_id(0) == 0:
        product = tl.sum(block0_mean[:, None] * q.to(tl.float32), 0) * scale
        largest = tl.where(block == 0, tl.max(tl.where(inside, product, float("-inf")), 0), largest)
    return largest


@triton.jit(do_not_specialize=["blocks", "tq"])
def block_scores_kernel(
    q_ptr,  # [B, Hq, Tq, D], or [tokens, Hq, D] with PACKED
    starts_ptr,  # int32 [B + 1], with PACKED: the first query of each sequence
    k_block_mean_ptr,  # 16-bit [pages, Hkv, D], strides MEAN_PAGE and MEAN_HEAD
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    bias_ptr,  # float32 [B, Hkv, NB, RP]
    score_ptr,  # float32 [B, Hkv, NB]
    block0_mean_ptr,  # 16-bit [B or pages, Hkv, D], what block 0 is scored by in place of c_0
    first_score_ptr,  # float32 [B, Hkv, NB], with POOLED: the largest logits of the first query
    score_lse_ptr,  # float32 [B, Hkv, NB / BM], with POOLED: log2 of the sum of 2^ these
    scale,  # factor of the logits times log2(e)
    stride_qb,
    stride_qh,
    stride_qt,
    blocks,  # NB
    tq,
    MEAN_PAGE: tl.constexpr,
    MEAN_HEAD: tl.constexpr,
    FIRST_PAGE: tl.constexpr,  # strides of block0_mean
    FIRST_HEAD: tl.constexpr,
    FIRST_IN_PAGE: tl.constexpr,  # its rows are pages
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    N: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,  # blocks per program
    SINK: tl.constexpr,
    POOLED: tl.constexpr,  # some blocks have no residual: what decides which is written too
    ONE: tl.constexpr,  # one query
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,  # most of the table may lie behind the end of a sequence
    PORTABLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # the kernel before it may be the one that writes block means
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    bh = tl.program_id(1)
    b = bh // HKV
    h = bh % HKV
    block = tl.program_id(0) * BM + tl.arange(0, BM)
    query, rows = rows_of(starts_ptr, b, tq, PACKED)
    full = length_seen(tl.load(lengths_ptr + b), rows, tq, blocks, PACKED) // 64  # complete blocks
    # Page numbers do not wait for the length, what stands behind its end is not used; of a wide table that would be too much.
    known = full if WIDE else blocks
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + block, mask=block < known, other=0)
    if tl.program_id(0) * BM < full:
        there = block < full
        d = tl.arange(0, DP)
        mean_at = page_at(page, h, HKV, MEAN_PAGE, MEAN_HEAD)[:, None] + d[None, :]
        mean = tl.load(k_block_mean_ptr + mean_at, mask=there[:, None] & (d < D)[None, :], other=0.0)  # [BM, DP]
        largest = tl.full([BM], float("-inf"), tl.float32)
        of_first = largest
        block0_mean = tl.full([DP], 0.0, tl.float32)
        if SINK:
            owner = b
            if FIRST_IN_PAGE:
                owner = tl.load(page_table_ptr + b.to(tl.int64) * blocks)
            first_at = page_at(owner, h, HKV, FIRST_PAGE, FIRST_HEAD)
            block0_mean = tl.load(block0_mean_ptr + first_at + d, mask=d < D, other=0.0).to(tl.float32)
        q_start = q_ptr + b.to(tl.int64) * stride_qb + query * stride_qt + (h * GROUP).to(tl.int64) * stride_qh
        for first in tl.static_range(0, RP, N):
            row = first + tl.arange(0, N)
            at = row // GROUP * stride_qt + row % GROUP * stride_qh
            inside = row < GROUP * rows
            q = tl.load(q_start + at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
            s = dot(mean, q, PORTABLE) * scale  # [BM, N]
            bias_at = (bh.to(tl.int64) * blocks + block)[:, None] * RP + row[None, :]
            tl.store(bias_ptr + bias_at, s, mask=there[:, None])
            largest = tl.maximum(largest, _score(s, block, block0_mean, q, inside, scale, SINK))
            if POOLED and not ONE:
                own = inside & (row < GROUP)
                of_first = tl.maximum(of_first, _score(s, block, block0_mean, q, own, scale, SINK))
        score_at = bh.to(tl.int64) * blocks + block
        tl.store(score_ptr + score_at, largest, mask=there)
        if POOLED:
            if ONE:
                of_first = largest
            else:
                tl.store(first_score_ptr + score_at, of_first, mask=there)
            lse_at = bh.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            of_first = tl.where(there, of_first, float("-inf"))
            peak = tl.max(of_first, 0)
            finite = tl.where(peak == float("-inf"), 0.0, peak)
            tl.store(score_lse_ptr + lse_at, finite + tl.log2(tl.sum(tl.exp2(of_first - finite), 0)))
