"""Kernels that sum samples of Q, K and V and turn the sums into mean queries and channel scales
(`thrift_attn.prefill.statistics`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.powers_of_two import k_channel_scale, log_root, v_head_scale
from thrift_attn.kernels.spans import K_LEN, K_START, Q_LEN, Q_START, SPAN


@triton.jit
def _sampled_blocks(length, max_blocks):
    """Sampled blocks of a sequence of ``length`` keys: how many, and the step from one to the next; at most ``max_blocks``."""
    whole = tl.maximum(length // 64, 1)
    step = (whole + max_blocks - 1) // max_blocks
    return (whole + step - 1) // step, step


@triton.jit
def _queries_seen(span, CAUSAL: tl.constexpr):
    """Queries of a sequence that see nothing, and that see something."""
    queries, keys = tl.load(span + Q_LEN), tl.load(span + K_LEN)
    hidden = queries - queries
    if CAUSAL:
        hidden = tl.maximum(queries - keys, 0)
    return hidden, queries - hidden


@triton.jit
def sum_keys_kernel(
    k_ptr,  # 16-bit, addressed by strides
    v_ptr,
    spans_ptr,  # int32 [B, 6]
    squares_ptr,  # float32 [B, Hkv, S, DP]: of K less the mean of its block
    totals_ptr,  # float32 [B, Hkv, S, 2]: squares of K and of V
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    max_blocks,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    ONE_BATCH: tl.constexpr,
    CENTRED: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    span = spans_ptr + b * SPAN
    start, length = tl.load(span + K_START), tl.load(span + K_LEN)
    blocks, step = _sampled_blocks(length, max_blocks)
    t = tl.arange(0, 64)[:, None]
    d = tl.arange(0, DP)[None, :]
    tokens = tl.minimum(length, 64)
    there = (t < tl.where(i < blocks, tokens, 0)) & (d < D)
    batch = (b * (not ONE_BATCH)).to(tl.int64)
    first = (start + i * step * 64).to(tl.int64)
    at_k = k_ptr + batch * stride_kb + h.to(tl.int64) * stride_kh + (first + t) * stride_kt + d
    at_v = v_ptr + batch * stride_vb + h.to(tl.int64) * stride_vh + (first + t) * stride_vt + d
    k = tl.load(at_k, mask=there, other=0.0).to(tl.float32)
    v = tl.load(at_v, mask=there, other=0.0).to(tl.float32)
    at = (b * HKV + h) * S + i
    tl.store(totals_ptr + at * 2, tl.sum(tl.sum(k * k, 1), 0))
    tl.store(totals_ptr + at * 2 + 1, tl.sum(tl.sum(v * v, 1), 0))
    if CENTRED:
        mean = tl.sum(k, 0) / tl.maximum(tokens, 1).to(tl.float32)
        k = tl.where(there, k - mean[None, :], 0.0)
    tl.store(squares_ptr + at * DP + tl.arange(0, DP), tl.sum(k * k, 0))


@triton.jit
def sum_queries_kernel(
    q_ptr,  # 16-bit, addressed by strides
    spans_ptr,  # int32 [B, 6]
    sums_ptr,  # float32 [B, Hq, S, DP]
    stride_qb,
    stride_qh,
    stride_qt,
    max_queries,
    HQ: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_BATCH: tl.constexpr,
):
    i = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    span = spans_ptr + b * SPAN
    hidden, seen = _queries_seen(span, CAUSAL)
    step = tl.maximum((seen + max_queries - 1) // max_queries, 1)
    at = (i * 64 + tl.arange(0, 64)[:, None]) * step
    d = tl.arange(0, DP)[None, :]
    batch = (b * (not ONE_BATCH)).to(tl.int64)
    row = (tl.load(span + Q_START) + hidden + at).to(tl.int64)
    at_q = q_ptr + batch * stride_qb + h.to(tl.int64) * stride_qh + row * stride_qt + d
    q = tl.load(at_q, mask=(at < seen) & (d < D), other=0.0).to(tl.float32)
    tl.store(sums_ptr + ((b * HQ + h) * S + i) * DP + tl.arange(0, DP), tl.sum(q, 0))


@triton.jit
def channel_scales_kernel(
    spans_ptr,  # int32 [B, 6]
    squares_ptr,  # of `sum_keys_kernel`
    totals_ptr,
    sums_ptr,  # of `sum_queries_kernel`
    query_mean_ptr,  # float32 [B, Hq, D]
    k_channel_scale_ptr,  # float32 [B, Hkv, D]
    v_head_scale_ptr,  # float32 [B, Hkv]
    max_blocks,
    max_queries,
    max_decode_queries,  # queries that have no mean
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SK: tl.constexpr,
    SQ: tl.constexpr,
    CAUSAL: tl.constexpr,
    SUBTRACT_QUERY_MEAN: tl.constexpr,
    CHANNEL_SCALES: tl.constexpr,
    V_HEAD_SCALES: tl.constexpr,
):
    h = tl.program_id(0)
    b = tl.program_id(1)
    span = spans_ptr + b * SPAN
    dim = tl.arange(0, DP)
    inside = dim < D
    head = b * HKV + h
    if CHANNEL_SCALES:
        length = tl.load(span + K_LEN)
        blocks, _step = _sampled_blocks(length, max_blocks)
        tokens = tl.maximum(blocks * tl.minimum(length, 64), 1).to(tl.float32)
        sample = tl.arange(0, SK)
        squares = tl.load(squares_ptr + (head * SK + sample[:, None]) * DP + dim[None, :])
        total = tl.sum(tl.load(totals_ptr + (head * SK + sample) * 2), 0)
        v_squares = tl.sum(tl.load(totals_ptr + (head * SK + sample) * 2 + 1), 0)
        k_size = log_root(total / (tokens * D))
        size = tl.where(length < 64, k_size, log_root(tl.sum(squares, 0) / tokens))
        tl.store(k_channel_scale_ptr + head * D + dim, k_channel_scale(size, k_size, inside, D), mask=inside)
        if V_HEAD_SCALES:
            tl.store(v_head_scale_ptr + head, v_head_scale(v_squares / (tokens * D)))
    if SUBTRACT_QUERY_MEAN:
        _hidden, seen = _queries_seen(span, CAUSAL)
        step = tl.maximum((seen + max_queries - 1) // max_queries, 1)
        count = tl.maximum((seen + step - 1) // step, 1).to(tl.float32)
        for g in range(GROUP):
            of_head = head * GROUP + g
            sums = tl.load(sums_ptr + (of_head * SQ + tl.arange(0, SQ)[:, None]) * DP + dim[None, :])
            mean = tl.where(seen > max_decode_queries, tl.sum(sums, 0) / count, 0.0)
            tl.store(query_mean_ptr + of_head * D + dim, mean, mask=inside)
