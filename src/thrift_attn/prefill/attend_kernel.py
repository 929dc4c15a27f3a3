"""Prefill attention: low-precision blocks, then promoted blocks, in one online softmax; one source for every GPU.

A program serves BM query rows of one head: one list of promoted blocks per 64 rows. It walks all visible blocks in low
precision, with those on a row's list hidden from it, then the lists in high precision. c_b enters some blocks at a time as one
16-bit product, inside the one loop over blocks so that loads ahead go on; a block takes its column from it.

The running maximum is kept in base 2 and rounded up to a whole number. Rescaling then multiplies by powers of two, so P is
rounded on the same grid whichever block comes first: rounding online equals rounding once the whole row is known, with
exp2(S - ceil(max)) in place of exp(S - max) (underflow of the smallest scales aside).
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.arithmetic import dot, softcapped
from thrift_attn.kernels.online_softmax import P_MXFP4, P_NVFP4, online, visible
from thrift_attn.kernels.spans import BLOCK_START, K_LEN, K_START, Q_LEN, Q_START, ROW_START, SPAN
from thrift_attn.kernels.token_order import token_at
from thrift_attn.prefill.attend_steps_kernel import (
    add_residual_values,
    add_values,
    load_low_q,
    logits,
    low_logits,
    low_values,
    residual_logits,
)

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["most_rows", "rows", "blocks", "most", "window"])
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
    k_rest_ptr,
    v_rest_ptr,
    centre_ptr,  # 16-bit [P, Hkv, N, D]
    key_bias_ptr,  # bfloat16 [P, Hq, N, 3, 64]: what the mean query makes of each key, in three parts
    values_ptr,  # float32 [B, Hkv]: power of two that native V hold
    list_ptr,  # int32 [P, Hq, R, K]
    counts_ptr,  # int32 [P, Hq, R]
    out_ptr,  # 16-bit, addressed by strides
    lse_ptr,  # float32, addressed by strides
    mass_ptr,  # float32, as lse_ptr: share of the high path
    sink_ptr,  # float32 [P, Hq, R*64]: product of each query with the first key
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
    most_rows,
    rows,  # R
    blocks,  # N
    most,  # K
    window,
    scale,  # factor of the logits times log2(e)
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    CAUSAL: tl.constexpr,
    ONE_PART: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,  # soft cap times log2(e), or 0
    LOW: tl.constexpr,  # format, or "drop"
    QUANT: tl.constexpr,  # Q and P are quantised
    NATIVE: tl.constexpr,
    CENTRED: tl.constexpr,
    KEY_BIAS: tl.constexpr,  # packed Q lacks the mean query
    LEVELLED: tl.constexpr,  # native V hold powers of two
    ROUNDED: tl.constexpr,  # the output is divided by the sum of P after rounding
    REST: tl.constexpr,  # promoted blocks are low data plus a residual, not K and V
    MASS: tl.constexpr,
    SINK: tl.constexpr,  # the first token is exact: packed data lack it
    BM: tl.constexpr,
    BN: tl.constexpr,  # tokens at a time, 32 or 64
    COLUMNS: tl.constexpr,  # of the output that a program works out
    CENTRES: tl.constexpr,  # blocks whose q.c_b is worked out at a time
    STAGES: tl.constexpr,
    CAST: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    HALVES: tl.constexpr = BM // 64
    PARTS: tl.constexpr = 64 // BN
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    b = tl.program_id(2)
    h = tl.program_id(1) // (DP // COLUMNS)
    r = (tl.num_programs(0) - 1 - tl.program_id(0)) * HALVES  # longest first
    span = spans_ptr + b * SPAN
    q_start, queries = tl.load(span + Q_START), tl.load(span + Q_LEN)
    k_start, keys = tl.load(span + K_START), tl.load(span + K_LEN)
    row_start, block_start = tl.load(span + ROW_START), tl.load(span + BLOCK_START)
    offset = keys - keys
    if CAUSAL:
        offset = keys - queries
    base = offset >> 6  # block of row 0, rounded down
    own = (offset - base * 64 + queries + 63) // 64  # rows of this sequence
    if r < own:
        part = (b * (not ONE_PART)).to(tl.int64)
        head = part * HQ + h
        kv_head = part * HKV + h // (HQ // HKV)
        position = (base + r) * 64 + tl.arange(0, BM)
        query = position - offset
        d = tl.arange(0, DP)
        e = tl.program_id(1) % (DP // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)  # columns of V and of the output
        token = tl.arange(0, BN)
        inside = (query >= 0) & (query < queries)
        at_q = q_ptr + part * stride_qb + h.to(tl.int64) * stride_qh + q_start.to(tl.int64) * stride_qt
        q = tl.load(
            at_q + query.to(tl.int64)[:, None] * stride_qt + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )
        # Blocks that the program's rows see; rows before position 0 see none.
        last = tl.minimum((base + r) * 64 + BM, offset + queries)
        low_end = (keys + 63) // 64
        high = low_end
        if CAUSAL:
            high = tl.minimum(low_end, (tl.maximum(last, 0) + 63) // 64)
        low = high - high
        if WINDOW:
            low = tl.maximum((base + r) * 64 + 1 - window, 0) // 64

        # Blocks before `masked_to` and from `masked_from` on hold keys that some row does not see.
        masked_from = keys // 64
        if CAUSAL:
            masked_from = base + r
        masked_to = low
        if WINDOW:
            masked_to = (tl.maximum((base + r) * 64 + BM - window, 0) + 63) // 64

        one, zero = tl.full([BM], 1.0, tl.float32), tl.zeros([BM], tl.float32)
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        weight = tl.zeros([BM], tl.float32)  # sum of P as it is multiplied with V
        acc = tl.zeros([BM, COLUMNS], tl.float32)
        at_list = list_ptr + (head * rows + row_start + r) * most
        at_count = counts_ptr + head * rows + row_start + r
        count = tl.load(at_count)
        if HALVES == 2:
            upper = tl.arange(0, BM) < 64
            count2 = tl.load(at_count + 1, mask=r + 1 < own, other=0)

        # -- low precision --
        if LOW != "drop":
            first_row = (head * rows + row_start + r) * 64
            row = first_row + tl.arange(0, BM)
            row_there = (r * 64 + tl.arange(0, BM) < own * 64)[:, None]
            ql, qs = load_low_q(q, qp_ptr, qs_ptr, row, row_there, D, DP, LOW, QUANT, NATIVE)
            factor_q = one * scale
            if QUANT and LOW == "fp8":
                of_row = tl.load(qs_ptr + row // 64, mask=r * 64 + tl.arange(0, BM) < own * 64, other=0.0)
                factor_q = of_row * scale
            order = token
            if NATIVE and LOW == "fp8":  # tokens in the order of V's positions
                order = token_at(token)
            listed = 0
            upcoming = tl.load(at_list, mask=count > 0, other=-1)
            if HALVES == 2:
                listed2 = 0
                upcoming2 = tl.load(at_list + most, mask=count2 > 0, other=-1)
            first_block = kv_head * blocks + block_start
            qc = tl.zeros([BM, CENTRES], tl.float32)  # q.c_b of the blocks from the last multiple of CENTRES on
            for n in tl.range(low, high, num_stages=STAGES):
                if CENTRED:
                    column = n % CENTRES
                    if (column == 0) | (n == low):
                        c = n - column + tl.arange(0, CENTRES)
                        at_c = centre_ptr + (first_block + c)[None, :] * D + d[:, None]
                        centre = tl.load(at_c, mask=(c < high)[None, :] & (d < D)[:, None], other=0.0)
                        qc = dot(q, centre, PORTABLE)
                hidden = tl.zeros([BM], tl.int1) | (n == upcoming)
                listed += (n == upcoming).to(tl.int32)
                upcoming = tl.load(at_list + listed, mask=listed < count, other=-1)
                if HALVES == 2:
                    hidden = (upper & hidden) | (~upper & (n == upcoming2))
                    listed2 += (n == upcoming2).to(tl.int32)
                    upcoming2 = tl.load(at_list + most + listed2, mask=listed2 < count2, other=-1)
                bias = zero
                if CENTRED:
                    bias = tl.sum(tl.where(tl.arange(0, CENTRES)[None, :] == column, qc, 0.0), 1) * scale
                at = first_block + n
                unit = factor_q
                if LOW == "fp8":
                    unit = factor_q * tl.load(ks_ptr + at)
                    unit = tl.where(unit < 1e-30, 1e-30, unit)  # of zeros; -inf times 0 would be no number
                for i in range(PARTS):
                    t = i * BN + token  # columns in the order of V
                    s_row = at * 64 + i * BN + order
                    s = low_logits(
                        ql, qs, kp_ptr, ks_ptr, s_row, key_bias_ptr, head * blocks + block_start + n, i * BN + order, scale,
                        BM, BN, D, DP, LOW, NATIVE, KEY_BIAS, PORTABLE,
                    )  # fmt: skip
                    shift = bias
                    if CAP > 0.0:
                        s, shift = softcapped(s * unit[:, None] + bias[:, None], CAP), zero
                    shift = tl.where(hidden, float("-inf"), shift)
                    key = n * 64 + i * BN + order
                    edge = (n >= masked_from) | (n < masked_to)
                    if SINK:
                        edge = edge | (n == 0)
                    if edge:
                        s = visible(s, key, keys, position, window, CAUSAL, WINDOW, SINK)
                    p, peak, total, factor = online(s, one if CAP > 0.0 else unit, shift, peak, total)
                    acc, weight = low_values(
                        acc, weight, p, factor, vp_ptr, vs_ptr, at, (kv_head * D + e) * blocks + block_start + n, e, t,
                        D, LOW, QUANT, NATIVE, ROUNDED, CAST, PORTABLE, DTYPE,
                    )  # fmt: skip
            if QUANT and LOW != "fp8":
                FACTOR: tl.constexpr = P_MXFP4 if LOW == "mxfp4" else P_NVFP4
                acc = acc * (1.0 / FACTOR)
                weight = weight * (1.0 / FACTOR)
                if LEVELLED:
                    acc = acc / tl.load(values_ptr + b * HKV + h // (HQ // HKV))

        # -- high precision --
        low_total = total
        unit_high = one if CAP > 0.0 else one * scale
        k_head = (
            k_ptr + part * stride_kb + (h // (HQ // HKV)).to(tl.int64) * stride_kh + k_start.to(tl.int64) * stride_kt
        )
        v_head = (
            v_ptr + part * stride_vb + (h // (HQ // HKV)).to(tl.int64) * stride_vh + k_start.to(tl.int64) * stride_vt
        )
        if SINK:  # the first token, unless a promoted block holds it
            at_sink = (head * rows + row_start + r) * 64 + tl.arange(0, BM)
            first = tl.load(sink_ptr + at_sink, mask=r * 64 + tl.arange(0, BM) < own * 64, other=0.0)
            if CAP > 0.0:
                first = softcapped(first * scale, CAP)
            alone = inside & (position >= 0) & (keys > 0)
            if WINDOW:
                alone = alone & (position < window)
            if not REST:
                begun = tl.load(at_list, mask=count > 0, other=-1) == 0
                if HALVES == 2:
                    begun2 = tl.load(at_list + most, mask=count2 > 0, other=-1) == 0
                    alone = alone & ~((upper & begun) | (~upper & begun2))
                else:
                    alone = alone & ~begun
            first = tl.where(alone, first, float("-inf"))
            p_first, peak, total, factor = online(first[:, None], unit_high, zero, peak, total)
            if MASS:
                low_total = low_total * factor
            if ROUNDED:
                weight = weight * factor + tl.sum(p_first, 1)
            first_v = tl.load(v_head + e, mask=e < D, other=0.0).to(tl.float32)
            acc = acc * factor[:, None] + p_first * first_v[None, :]
        for side in tl.static_range(HALVES):
            if side == 1:
                count = count2
                at_list += most
            for j in tl.range(0, count, num_stages=STAGES):
                n = tl.load(at_list + j)
                at = kv_head * blocks + block_start + n
                for i in range(PARTS):
                    key = n * 64 + i * BN + token
                    if REST:
                        s = residual_logits(
                            q, kp_ptr, k_rest_ptr, centre_ptr, at, i * BN + token, D, DP, CENTRED, PORTABLE
                        )
                    else:
                        s = logits(q, k_head, key, keys, stride_kt, D, DP, PORTABLE)
                    if CAP > 0.0:
                        s = softcapped(s * scale, CAP)
                    s = visible(s, key, keys, position, window, CAUSAL, WINDOW, SINK and REST)
                    if HALVES == 2:
                        s = tl.where((upper if side == 0 else ~upper)[:, None], s, float("-inf"))
                    p, peak, total, factor = online(s, unit_high, zero, peak, total)
                    if MASS:
                        low_total = low_total * factor
                    if ROUNDED:
                        weight = weight * factor + tl.sum(p, 1)
                    acc = acc * factor[:, None]
                    if REST:
                        acc = add_residual_values(
                            acc, p.to(DTYPE), vp_ptr, v_rest_ptr, at, i * BN + token, e, D, PORTABLE
                        )
                    else:
                        acc = add_values(acc, p.to(DTYPE), v_head, key, keys, e, stride_vt, D, PORTABLE)

        empty = total == 0.0
        norm = tl.where(empty, 1.0, total)
        if not ROUNDED:
            weight = norm
        out = (acc / tl.where(empty, 1.0, weight)[:, None]).to(DTYPE)
        at_o = out_ptr + part * stride_ob + h.to(tl.int64) * stride_oh + q_start.to(tl.int64) * stride_ot
        at_o += query.to(tl.int64)[:, None] * stride_ot + e[None, :]
        tl.store(at_o, out, mask=inside[:, None] & (e < D)[None, :])
        at_l = part * stride_lb + h.to(tl.int64) * stride_lh + q_start + query
        lse = tl.where(empty, float("-inf"), (peak + tl.log2(norm)) * _LN2)
        tl.store(lse_ptr + at_l, lse, mask=inside)
        if MASS:
            tl.store(mass_ptr + at_l, 1.0 - tl.where(empty, 1.0, low_total / norm), mask=inside)
