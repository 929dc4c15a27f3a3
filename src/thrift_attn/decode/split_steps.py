"""Beginning and end of a split of decode, the same for both kernels that attend (`thrift_attn.decode.attend_kernel` and
`thrift_attn.decode.attend_each_kernel`): fit the queries, add the newest tokens, store what was found.

Units are those of `thrift_attn.decode.block_steps`.
"""

# ruff: noqa: RUF005  (kernels know tuples by `+` alone)

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.block_steps import hide
from thrift_attn.decode.fragments import place_in_ring, query_operand, split_order, split_query_operand
from thrift_attn.kernels.arithmetic import dot, softcapped


@triton.jit
def fitted_queries(given, scale, N: tl.constexpr, CHUNKS: tl.constexpr):
    """Queries scaled by a power of two such that the largest uses the range of fp16: operands per chunk, the factor that makes
    their products with widened K logits, and one over it.
    """
    largest = 0.0
    for i in tl.static_range(len(CHUNKS)):
        largest = tl.maximum(largest, tl.max(tl.abs(given[i].to(tl.float32)), 0))
    field = 268 - ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF)
    field = tl.minimum(tl.maximum(field, 1), 190)  # of zeros as well: 1 / factor stays finite for any scale above 2^-60
    up = (field << 23).to(tl.float32, bitcast=True)
    factor = scale * 128.0 * ((254 - field) << 23).to(tl.float32, bitcast=True)
    queries = ()
    for i in tl.static_range(len(CHUNKS)):
        queries = queries + (query_operand((given[i].to(tl.float32) * up).to(tl.float16), CHUNKS[i][1], N),)
    return queries, factor, 1.0 / factor


@triton.jit
def given_queries(given, N: tl.constexpr, CHUNKS: tl.constexpr):
    """Queries as they came, operands per chunk for 16-bit data in `split_order`."""
    raw = ()
    for i in tl.static_range(len(CHUNKS)):
        raw = raw + (split_query_operand(given[i], CHUNKS[i][1], N),)
    return raw


@triton.jit
def add_newest(
    m, total, out, raw, tail_ptr, ring, h, length, position, first, first_step, num_splits, scale,
    RING: tl.constexpr, TAIL_RING: tl.constexpr, TAIL_KV: tl.constexpr, TAIL_HEAD: tl.constexpr, TAIL_TOKEN: tl.constexpr,
    CAP: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and output with this split's steps of the incomplete block, of 16 tokens each."""
    DTYPE: tl.constexpr = tail_ptr.dtype.element_ty
    token = tl.arange(0, 16)
    tail = length % 64
    tail_start = ring.to(tl.int64) * TAIL_RING + h.to(tl.int64) * TAIL_HEAD
    begin = (length - tail) % RING
    if RING % 64 == 0:  # no block wraps: one offset for all of its tokens
        tail_start += begin * TAIL_TOKEN
        begin = 0
    for quarter in range(first_step, (tail + 15) // 16, num_splits):
        tokens = quarter * 16 + token  # [16]
        there = tokens < tail
        tail_at = tail_start + place_in_ring(begin, tokens, RING) * TAIL_TOKEN
        s0 = tl.zeros([16, N], tl.float32)
        for j in tl.static_range(len(CHUNKS)):
            d = CHUNKS[j][0] * 16 + tl.arange(0, 16 * CHUNKS[j][1])
            k_tile = tl.load(tail_ptr + tail_at[:, None] + d[None, :], mask=there[:, None], other=0.0)
            s0 = dot(split_order(k_tile, CHUNKS[j][1]), raw[j], PORTABLE, s0)
        if CAP > 0:
            s0 = softcapped(s0 * scale, CAP)
        else:
            s0 = s0 * scale
        s0 = hide(s0, length - tail + tokens, position, first)
        peak = tl.maximum(m, tl.max(s0, 0))
        decay = tl.exp2(m - peak)
        p0 = tl.exp2(s0 - peak[None, :])
        m = peak
        total = total * decay[None, :] + p0
        grown = ()
        for j in tl.static_range(len(CHUNKS)):
            d = CHUNKS[j][0] * 16 + tl.arange(0, 16 * CHUNKS[j][1])
            v_at = TAIL_KV + tail_at[None, :] + d[:, None]
            v_tile = tl.load(tail_ptr + v_at, mask=there[None, :], other=0.0)
            grown = grown + (dot(v_tile, p0.to(DTYPE), PORTABLE, out[j] * decay[None, :]),)
        out = grown
    return m, total, out


@triton.jit
def store_split(
    partial_out_ptr, partial_lse_ptr, m, total, out, split_of_all, column, rows_there,
    D: tl.constexpr, RP: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write a split's normalised output and its LSE, -inf where it saw nothing.

    ``split_of_all`` counts the splits of all heads of all sequences, int64; ``rows_there`` are the query rows of a KV head.
    """
    row_sum = tl.sum(total, 0)
    seen = row_sum > 0
    norm = 1.0 / tl.where(seen, row_sum, 1.0)
    o_start = split_of_all * RP
    inside = column < rows_there
    for j in tl.static_range(len(CHUNKS)):
        d = CHUNKS[j][0] * 16 + tl.arange(0, 16 * CHUNKS[j][1])
        at_out = (o_start + column[None, :]) * D + d[:, None]
        tl.store(partial_out_ptr + at_out, out[j] * norm[None, :], mask=inside[None, :])
    lse = tl.where(seen, m + tl.log2(tl.where(seen, row_sum, 1.0)), float("-inf"))
    tl.store(partial_lse_ptr + o_start + column, lse, mask=inside)
