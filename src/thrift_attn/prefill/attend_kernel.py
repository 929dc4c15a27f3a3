"""Prefill attention: blocks in the base format, then promoted blocks, in one online softmax; one source for every GPU.

A program serves BM query rows of one head: one list of promoted blocks per 64 rows. It walks all visible blocks in the base
format, with those on a row's list hidden from it, then the lists in 16 bits. c_b enters some blocks at a time as one
16-bit product, inside the one loop over blocks so that loads ahead go on; a block takes its column from it.

The running maximum is kept in base 2 and rounded up to a whole number. Rescaling then multiplies by powers of two, so P is
rounded on the same grid whichever block comes first: rounding online equals rounding once the whole row is known, with
exp2(S - ceil(max)) in place of exp(S - max) (underflow of the smallest scales aside).
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.arithmetic import softcapped
from thrift_attn.kernels.online_softmax import P_MXFP4, P_NVFP4, online, visible
from thrift_attn.kernels.spans import BLOCK_START, K_LEN, K_START, Q_BLOCK_START, Q_LEN, Q_START, SPAN
from thrift_attn.kernels.token_order import token_at
from thrift_attn.prefill.attend_steps_kernel import (
    add_base_values,
    base_logits,
    blocks_seen,
    load_base_q,
    mean_logits,
    next_listed,
    promoted_logits,
    promoted_values,
    sink_logits,
)

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["max_q_blocks", "q_blocks", "blocks", "capacity", "window"])
def attend_prefill_kernel(
    q_ptr,  # 16-bit, addressed by strides
    k_ptr,
    v_ptr,
    spans_ptr,  # int32 [B, 6]
    qp_ptr,  # packed Q, K and V, see `thrift_attn.prefill.pack`
    qs_ptr,
    kp_ptr,
    ks_ptr,
    vp_ptr,
    vs_ptr,
    k_residual_ptr,
    v_residual_ptr,
    k_block_mean_ptr,  # 16-bit [P, Hkv, N, D]
    key_bias_ptr,  # bfloat16 [P, Hq, N, 3, 64]: what the mean query makes of each key, in three parts
    v_head_scale_ptr,  # float32 [B, Hkv]: power of two that native V hold
    block_indices_ptr,  # int32 [P, Hq, R, K]
    block_counts_ptr,  # int32 [P, Hq, R]
    out_ptr,  # 16-bit, addressed by strides
    lse_ptr,  # float32, addressed by strides
    high_fraction_ptr,  # float32, as lse_ptr: share of the promoted path
    sink_logits_ptr,  # float32 [P, Hq, R*64]: product of each query with the first key
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_lb,
    stride_lh,
    max_q_blocks,
    q_blocks,  # R
    blocks,  # N
    capacity,  # K
    window,
    scale,  # factor of the logits times log2(e)
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    CAUSAL: tl.constexpr,
    ONE_BATCH: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,  # soft cap times log2(e), or 0
    FORMAT: tl.constexpr,  # the base format, or "drop"
    QUANTISE_QP: tl.constexpr,  # Q and P are quantised
    NATIVE: tl.constexpr,
    CENTRED: tl.constexpr,
    KEY_BIAS: tl.constexpr,  # packed Q lacks the mean query
    V_SCALED: tl.constexpr,  # native V hold powers of two
    NORMALIZE_ROUNDED: tl.constexpr,  # the output is divided by the sum of P after rounding
    RESIDUAL: tl.constexpr,  # promoted blocks are base data plus a residual, not K and V
    HIGH_FRACTION: tl.constexpr,
    SINK: tl.constexpr,  # the first token is exact: packed data lack it
    BM: tl.constexpr,
    BN: tl.constexpr,  # tokens at a time, 32 or 64
    COLUMNS: tl.constexpr,  # of the output that a program works out
    MEANS: tl.constexpr,  # blocks whose q.c_b is worked out at a time
    STAGES: tl.constexpr,
    CAST: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    Q_BLOCKS: tl.constexpr = BM // 64
    CHUNKS: tl.constexpr = 64 // BN
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    b = tl.program_id(2)
    h = tl.program_id(1) // (DP // COLUMNS)
    r = (tl.num_programs(0) - 1 - tl.program_id(0)) * Q_BLOCKS  # longest first
    span = spans_ptr + b * SPAN
    q_start, queries = tl.load(span + Q_START), tl.load(span + Q_LEN)
    k_start, keys = tl.load(span + K_START), tl.load(span + K_LEN)
    q_block_start, block_start = tl.load(span + Q_BLOCK_START), tl.load(span + BLOCK_START)
    offset = keys - keys
    if CAUSAL:
        offset = keys - queries
    base = offset >> 6  # block of row 0, rounded down
    seq_q_blocks = (offset - base * 64 + queries + 63) // 64  # of this sequence
    if r < seq_q_blocks:
        batch = (b * (not ONE_BATCH)).to(tl.int64)
        head = batch * HQ + h
        kv_head = batch * HKV + h // (HQ // HKV)
        position = (base + r) * 64 + tl.arange(0, BM)
        query = position - offset
        d = tl.arange(0, DP)
        e = tl.program_id(1) % (DP // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)  # columns of V and of the output
        token = tl.arange(0, BN)
        inside = (query >= 0) & (query < queries)
        at_q = q_ptr + batch * stride_qb + h.to(tl.int64) * stride_qh + q_start.to(tl.int64) * stride_qt
        q = tl.load(
            at_q + query.to(tl.int64)[:, None] * stride_qt + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )
        begin, end, masked_to, masked_from = blocks_seen(base, r, queries, keys, offset, window, BM, CAUSAL, WINDOW)
        ones, zeros = tl.full([BM], 1.0, tl.float32), tl.zeros([BM], tl.float32)
        row_max = tl.full([BM], float("-inf"), tl.float32)
        row_sum = tl.zeros([BM], tl.float32)
        rounded_sum = tl.zeros([BM], tl.float32)  # sum of P as it is multiplied with V
        acc = tl.zeros([BM, COLUMNS], tl.float32)
        at_indices = block_indices_ptr + (head * q_blocks + q_block_start + r) * capacity
        at_count = block_counts_ptr + head * q_blocks + q_block_start + r
        count = tl.load(at_count)
        count2 = count  # of the second query block, where there is one
        if Q_BLOCKS == 2:
            upper = tl.arange(0, BM) < 64
            count2 = tl.load(at_count + 1, mask=r + 1 < seq_q_blocks, other=0)

        # -- base format --
        if FORMAT != "drop":
            first_row = (head * q_blocks + q_block_start + r) * 64
            row = first_row + tl.arange(0, BM)
            row_exists = (r * 64 + tl.arange(0, BM) < seq_q_blocks * 64)[:, None]
            ql, qs = load_base_q(q, qp_ptr, qs_ptr, row, row_exists, D, DP, FORMAT, QUANTISE_QP, NATIVE)
            factor_q = ones * scale
            if QUANTISE_QP and FORMAT == "fp8":
                of_row = tl.load(qs_ptr + row // 64, mask=r * 64 + tl.arange(0, BM) < seq_q_blocks * 64, other=0.0)
                factor_q = of_row * scale
            order = token
            if NATIVE and FORMAT == "fp8":  # tokens in the order of V's positions
                order = token_at(token)
            listed = 0
            upcoming = tl.load(at_indices, mask=count > 0, other=-1)
            if Q_BLOCKS == 2:
                listed2 = 0
                upcoming2 = tl.load(at_indices + capacity, mask=count2 > 0, other=-1)
            first_block = kv_head * blocks + block_start
            qc = tl.zeros([BM, MEANS], tl.float32)  # q.c_b of the blocks from the last multiple of MEANS on
            for n in tl.range(begin, end, num_stages=STAGES):
                if CENTRED:
                    column = n % MEANS
                    if (column == 0) | (n == begin):
                        qc = mean_logits(q, k_block_mean_ptr, first_block, n - column, end, D, DP, MEANS, PORTABLE)
                hidden = tl.zeros([BM], tl.int1) | (n == upcoming)
                listed, upcoming = next_listed(n, at_indices, count, listed, upcoming)
                if Q_BLOCKS == 2:
                    hidden = (upper & hidden) | (~upper & (n == upcoming2))
                    listed2, upcoming2 = next_listed(n, at_indices + capacity, count2, listed2, upcoming2)
                bias = zeros
                if CENTRED:
                    bias = tl.sum(tl.where(tl.arange(0, MEANS)[None, :] == column, qc, 0.0), 1) * scale
                at = first_block + n
                unit = factor_q
                if FORMAT == "fp8":
                    unit = factor_q * tl.load(ks_ptr + at)
                    unit = tl.where(unit < 1e-30, 1e-30, unit)  # of zeros; -inf times 0 would be no number
                for i in range(CHUNKS):
                    t = i * BN + token  # columns in the order of V
                    s_row = at * 64 + i * BN + order
                    s = base_logits(
                        ql, qs, kp_ptr, ks_ptr, s_row, key_bias_ptr, head * blocks + block_start + n, i * BN + order, scale,
                        BM, BN, D, DP, FORMAT, NATIVE, KEY_BIAS, PORTABLE,
                    )  # fmt: skip
                    shift = bias
                    if CAP > 0.0:
                        s, shift = softcapped(s * unit[:, None] + bias[:, None], CAP), zeros
                    shift = tl.where(hidden, float("-inf"), shift)
                    key = n * 64 + i * BN + order
                    edge = (n >= masked_from) | (n < masked_to)
                    if SINK:
                        edge = edge | (n == 0)
                    if edge:
                        s = visible(s, key, keys, position, window, CAUSAL, WINDOW, SINK)
                    p, row_max, row_sum, factor = online(s, ones if CAP > 0.0 else unit, shift, row_max, row_sum)
                    acc, rounded_sum = add_base_values(
                        acc, rounded_sum, p, factor, vp_ptr, vs_ptr, at, (kv_head * D + e) * blocks + block_start + n, e, t,
                        D, FORMAT, QUANTISE_QP, NATIVE, NORMALIZE_ROUNDED, CAST, PORTABLE, DTYPE,
                    )  # fmt: skip
            if QUANTISE_QP and FORMAT != "fp8":
                FACTOR: tl.constexpr = P_MXFP4 if FORMAT == "mxfp4" else P_NVFP4
                acc = acc * (1.0 / FACTOR)
                rounded_sum = rounded_sum * (1.0 / FACTOR)
                if V_SCALED:
                    acc = acc / tl.load(v_head_scale_ptr + b * HKV + h // (HQ // HKV))

        # -- first token and promoted blocks, in 16 bits --
        base_sum = row_sum
        promoted_unit = ones if CAP > 0.0 else ones * scale
        k_head = (
            k_ptr + batch * stride_kb + (h // (HQ // HKV)).to(tl.int64) * stride_kh + k_start.to(tl.int64) * stride_kt
        )
        v_head = (
            v_ptr + batch * stride_vb + (h // (HQ // HKV)).to(tl.int64) * stride_vh + k_start.to(tl.int64) * stride_vt
        )
        if SINK:  # the first token, unless a promoted block holds it
            first = sink_logits(
                sink_logits_ptr, head * q_blocks + q_block_start + r, r, seq_q_blocks, at_indices, count, count2, capacity,
                inside, position, keys, window, scale, BM, WINDOW, CAP, RESIDUAL,
            )  # fmt: skip
            p_sink, row_max, row_sum, factor = online(first[:, None], promoted_unit, zeros, row_max, row_sum)
            if HIGH_FRACTION:
                base_sum = base_sum * factor
            if NORMALIZE_ROUNDED:
                rounded_sum = rounded_sum * factor + tl.sum(p_sink, 1)
            sink_value = tl.load(v_head + e, mask=e < D, other=0.0).to(tl.float32)
            acc = acc * factor[:, None] + p_sink * sink_value[None, :]
        for side in tl.static_range(Q_BLOCKS):
            if side == 1:
                count = count2
                at_indices += capacity
            for j in tl.range(0, count, num_stages=STAGES):
                n = tl.load(at_indices + j)
                at = kv_head * blocks + block_start + n
                for i in range(CHUNKS):
                    s = promoted_logits(
                        q, k_head, kp_ptr, k_residual_ptr, k_block_mean_ptr, n, at, i * BN + token, position, keys, window,
                        scale, stride_kt, D, DP, CAUSAL, WINDOW, CAP, CENTRED, RESIDUAL, SINK, PORTABLE,
                    )  # fmt: skip
                    if Q_BLOCKS == 2:
                        s = tl.where((upper if side == 0 else ~upper)[:, None], s, float("-inf"))
                    p, row_max, row_sum, factor = online(s, promoted_unit, zeros, row_max, row_sum)
                    if HIGH_FRACTION:
                        base_sum = base_sum * factor
                    if NORMALIZE_ROUNDED:
                        rounded_sum = rounded_sum * factor + tl.sum(p, 1)
                    acc = promoted_values(
                        acc * factor[:, None], p.to(DTYPE), v_head, vp_ptr, v_residual_ptr, n, at, i * BN + token, keys, e,
                        stride_vt, D, RESIDUAL, PORTABLE,
                    )  # fmt: skip

        empty = row_sum == 0.0
        norm = tl.where(empty, 1.0, row_sum)
        if not NORMALIZE_ROUNDED:
            rounded_sum = norm
        out = (acc / tl.where(empty, 1.0, rounded_sum)[:, None]).to(DTYPE)
        at_o = out_ptr + batch * stride_ob + h.to(tl.int64) * stride_oh + q_start.to(tl.int64) * stride_ot
        at_o += query.to(tl.int64)[:, None] * stride_ot + e[None, :]
        tl.store(at_o, out, mask=inside[:, None] & (e < D)[None, :])
        at_l = batch * stride_lb + h.to(tl.int64) * stride_lh + q_start + query
        lse = tl.where(empty, float("-inf"), (row_max + tl.log2(norm)) * _LN2)
        tl.store(lse_ptr + at_l, lse, mask=inside)
        if HIGH_FRACTION:
            tl.store(high_fraction_ptr + at_l, 1.0 - tl.where(empty, 1.0, base_sum / norm), mask=inside)
