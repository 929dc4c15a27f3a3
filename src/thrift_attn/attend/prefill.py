"""Prefill attention: low-precision blocks, then promoted blocks, in one online softmax; one source for every GPU.

A program serves BM query rows of one head: one list of promoted blocks per 64 rows. It walks all visible blocks in low
precision, with those on a row's list hidden from it, then the lists in high precision. c_b enters 32 blocks at a time as one
16-bit product; a block takes its column from it.

The running maximum is kept in base 2 and rounded up to a whole number. Rescaling then multiplies by powers of two, so P is
rounded on the same grid whichever block comes first: rounding online equals rounding once the whole row is known, with
exp2(S - ceil(max)) in place of exp(S - max) (underflow of the smallest scales aside).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.capability import Form, interpreted
from thrift_attn.config import BLOCK
from thrift_attn.quant.prefill import PackedKV, PackedQ
from thrift_attn.quant.rounding import bits, e2m1_code, from_bits, round_e2m1, round_e4m3
from thrift_attn.sequences import Sequences

LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dot(a, b, PORTABLE: tl.constexpr):
    if PORTABLE:  # the interpreter's product of bfloat16 is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _capped(s, CAP: tl.constexpr):
    """softcap * tanh(s / softcap) of logits that carry log2(e)."""
    if CAP > 0.0:
        BOUND: tl.constexpr = CAP * 1.4426950408889634
        e = tl.exp2(s * (2.0 / CAP))  # exp(2 x / softcap), x the logit
        s = BOUND - 2.0 * BOUND / (e + 1.0)
    return s


@triton.jit
def _visible(s, key, keys, position, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Logits [BM, BN], -inf where the query at ``position`` [BM] does not see ``key`` [BN]."""
    if CAUSAL:
        s = tl.where(key[None, :] <= position[:, None], s, float("-inf"))
    else:
        s = tl.where((key < keys)[None, :], s, float("-inf"))
    if WINDOW:
        s = tl.where(key[None, :] > position[:, None] - window, s, float("-inf"))
    return s


@triton.jit
def _less_first(s, token, before):
    """Logits [BM, BN] without that of the first of all tokens: ``token`` [BN] counts within a tile, ``before`` the tiles.

    Two comparisons rather than one of a sum, so that the compiler knows which registers can never hold it.
    """
    return tl.where(((token == 0) & (before == 0))[None, :], float("-inf"), s)


@triton.jit
def _online(s, peak, total):
    """One step of the online softmax in base 2: P, the new whole-number peak, the new sum, the factor of what is there."""
    new = tl.maximum(peak, tl.ceil(tl.max(s, 1)))
    base = tl.where(new == float("-inf"), 0.0, new)
    factor = tl.exp2(peak - base)
    p = tl.exp2(s - base[:, None])
    return p, new, total * factor + tl.sum(p, 1), factor


@triton.jit
def _p_groups(p, LOW: tl.constexpr, CAST: tl.constexpr):
    """P times 448 * 6 in groups along tokens [BM, BN / G, G]: elements in units of their scale, and scales."""
    G: tl.constexpr = 32 if LOW == "mxfp4" else 16
    x = tl.reshape(p * 2688.0, [p.shape[0], p.shape[1] // G, G])
    peak = tl.max(x, 2)
    if LOW == "mxfp4":
        exponent = tl.maximum((bits(peak) >> 23) - 2, 1)
        scale = from_bits(exponent << 23)
        inverse = from_bits((254 - exponent) << 23)
    else:
        scale = peak * 0.16666667
        if CAST:
            scale = scale.to(tl.float8e4nv).to(tl.float32)
        else:
            scale = round_e4m3(scale)
        inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    return round_e2m1(x * tl.expand_dims(inverse, 2)), scale


@triton.jit
def _p_wide(p, LOW: tl.constexpr, CAST: tl.constexpr):
    """P rounded through a 4-bit format, times 448 * 6; float32 [BM, BN]."""
    value, scale = _p_groups(p, LOW, CAST)
    return tl.reshape(value * tl.expand_dims(scale, 2), p.shape)


@triton.jit
def _p_excess(value, scale, p):
    """How much more the rounded P of a row sums to than P: [BM]."""
    return tl.sum(tl.sum(value, 2) * scale, 1) * (1.0 / 2688.0) - tl.sum(p, 1)


@triton.jit
def _p_native(p, LOW: tl.constexpr, CAST: tl.constexpr):
    """P times 448 * 6 as packed e2m1 [BM, BN / 2] and encoded scales [BM, BN / G], and `_p_excess`."""
    value, scale = _p_groups(p, LOW, CAST)
    excess = _p_excess(value, scale, p)
    code = tl.reshape(e2m1_code(value, value), [p.shape[0], p.shape[1] // 2, 2])
    low, high = tl.split(code)
    if LOW == "mxfp4":
        encoded = (bits(scale) >> 23).to(tl.uint8)
    else:
        encoded = scale.to(tl.float8e4nv)
    return (low | (high << 4)).to(tl.uint8), encoded, excess


@triton.jit(do_not_specialize=["most_rows", "rows", "blocks", "most", "window"])
def attend_prefill_kernel(
    q_ptr,  # 16-bit, addressed by strides
    k_ptr,
    v_ptr,
    spans_ptr,  # int32 [B, 6]
    qp_ptr,  # packed Q, K and V, see `thrift_attn.quant.prefill`
    qs_ptr,
    kp_ptr,
    ks_ptr,
    vp_ptr,
    vs_ptr,
    k_rest_ptr,
    v_rest_ptr,
    centre_ptr,  # 16-bit [P, Hkv, N, D]
    key_bias_ptr,  # float32 [P, Hq, N*64]: what the mean query makes of each key
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
    RAGGED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
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
    CENTRES: tl.constexpr,  # blocks whose q.c_b is worked out at a time
    STAGES: tl.constexpr,
    CAST: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    HALVES: tl.constexpr = BM // 64
    PARTS: tl.constexpr = 64 // BN
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    b = tl.program_id(2)
    h = tl.program_id(1)
    r = (tl.num_programs(0) - 1 - tl.program_id(0)) * HALVES  # longest first
    span = spans_ptr + b * 6
    q_start, queries = tl.load(span), tl.load(span + 1)
    k_start, keys = tl.load(span + 2), tl.load(span + 3)
    row_start, block_start = tl.load(span + 4), tl.load(span + 5)
    offset = keys - keys
    if CAUSAL:
        offset = keys - queries
    base = offset >> 6  # block of row 0, rounded down
    own = (offset - base * 64 + queries + 63) // 64  # rows of this sequence
    if r < own:
        part = (b * (not RAGGED)).to(tl.int64)
        head = part * HQ + h
        kv_head = part * HKV + h // (HQ // HKV)
        position = (base + r) * 64 + tl.arange(0, BM)
        query = position - offset
        d = tl.arange(0, DP)
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

        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        excess = tl.zeros([BM], tl.float32)  # of the sum of P after rounding over the sum before
        acc = tl.zeros([BM, DP], tl.float32)
        at_list = list_ptr + (head * rows + row_start + r) * most
        at_count = counts_ptr + head * rows + row_start + r
        count = tl.load(at_count)
        if HALVES == 2:
            upper = tl.arange(0, BM) < 64
            count2 = tl.load(at_count + 1, mask=r + 1 < own, other=0)

        v_head = (
            v_ptr + part * stride_vb + (h // (HQ // HKV)).to(tl.int64) * stride_vh + k_start.to(tl.int64) * stride_vt
        )
        if SINK:  # the online softmax begins with the first token, unless a promoted block holds it
            at_sink = (head * rows + row_start + r) * 64 + tl.arange(0, BM)
            logit = tl.load(sink_ptr + at_sink, mask=r * 64 + tl.arange(0, BM) < own * 64, other=0.0)
            logit = _capped(logit * scale, CAP)
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
            logit = tl.where(alone, logit, float("-inf"))
            peak = tl.ceil(logit)
            total = tl.exp2(logit - tl.where(alone, peak, 0.0))
            first_v = tl.load(v_head + d, mask=d < D, other=0.0).to(tl.float32)
            if QUANT and LOW != "fp8":  # in the units of P and V of the low path
                first_v *= 2688.0
                if LEVELLED:
                    first_v *= tl.load(values_ptr + b * HKV + h // (HQ // HKV))
            acc = total[:, None] * first_v[None, :]

        # -- low precision --
        if LOW != "drop":
            G: tl.constexpr = 32 if LOW == "mxfp4" else 16
            first_row = (head * rows + row_start + r) * 64
            row = first_row + tl.arange(0, BM)
            row_there = (r * 64 + tl.arange(0, BM) < own * 64)[:, None]
            if not QUANT:
                ql = q
            elif NATIVE and LOW != "fp8":
                half = tl.arange(0, DP // 2)[None, :]
                group = tl.arange(0, DP // G)[None, :]
                ql = tl.load(qp_ptr + row[:, None] * (D // 2) + half, mask=row_there & (half < D // 2), other=0)
                qs = tl.load(qs_ptr + row[:, None] * (D // G) + group, mask=row_there & (group < D // G), other=0)
                if LOW == "nvfp4":
                    qs = qs.to(tl.float8e4nv, bitcast=True)
            else:
                ql = tl.load(qp_ptr + row[:, None] * D + d[None, :], mask=row_there & (d < D)[None, :], other=0.0)
            factor_q = tl.full([BM], 1.0, tl.float32) * scale
            if QUANT and LOW == "fp8":
                of_row = tl.load(qs_ptr + row // 64, mask=r * 64 + tl.arange(0, BM) < own * 64, other=0.0)
                factor_q = of_row * scale
            order = token
            if NATIVE and LOW == "fp8":  # tokens in the order of V's positions
                order = (token & 0x31) | ((token & 2) << 2) | ((token & 12) >> 1)
            listed = 0
            upcoming = tl.load(at_list, mask=count > 0, other=-1)
            if HALVES == 2:
                listed2 = 0
                upcoming2 = tl.load(at_list + most, mask=count2 > 0, other=-1)
            first_block = kv_head * blocks + block_start
            for c0 in range(low // CENTRES * CENTRES, high, CENTRES):
                if CENTRED:
                    c = c0 + tl.arange(0, CENTRES)
                    at_c = centre_ptr + (first_block + c)[None, :] * D + d[:, None]
                    centre = tl.load(at_c, mask=(c < high)[None, :] & (d < D)[:, None], other=0.0)
                    qc = _dot(q, centre, PORTABLE) * scale  # [BM, CENTRES]
                for n in tl.range(tl.maximum(c0, low), tl.minimum(c0 + CENTRES, high), num_stages=STAGES):
                    hidden = tl.zeros([BM], tl.int1) | (n == upcoming)
                    listed += (n == upcoming).to(tl.int32)
                    upcoming = tl.load(at_list + listed, mask=listed < count, other=-1)
                    if HALVES == 2:
                        hidden = (upper & hidden) | (~upper & (n == upcoming2))
                        listed2 += (n == upcoming2).to(tl.int32)
                        upcoming2 = tl.load(at_list + most + listed2, mask=listed2 < count2, other=-1)
                    bias = tl.zeros([BM], tl.float32)
                    if CENTRED:
                        bias = tl.sum(tl.where(tl.arange(0, CENTRES)[None, :] == n - c0, qc, 0.0), 1)
                    bias = tl.where(hidden, float("-inf"), bias)
                    at = first_block + n
                    factor_k = factor_q
                    if LOW == "fp8":
                        factor_k = factor_q * tl.load(ks_ptr + at)
                    for i in range(PARTS):
                        t = i * BN + token  # columns in the order of V
                        s_row = at * 64 + i * BN + order
                        if NATIVE and LOW != "fp8":
                            kc = tl.load(kp_ptr + s_row[:, None] * (D // 2) + half, mask=half < D // 2, other=0)
                            ks = tl.load(ks_ptr + s_row[:, None] * (D // G) + group, mask=group < D // G, other=0)
                            if LOW == "nvfp4":
                                ks = ks.to(tl.float8e4nv, bitcast=True)
                            # A runtime zero: Triton 3.6 cannot compile this product for sm_100 without an accumulator.
                            zero = tl.zeros([BM, BN], tl.float32) + scale * 0.0
                            s = tl.dot_scaled(ql, qs, "e2m1", tl.trans(kc), ks, "e2m1", zero)
                        else:
                            kc = tl.load(kp_ptr + s_row[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
                            s = _dot(ql, tl.trans(kc), PORTABLE)
                        s = s * factor_k[:, None] + bias[:, None]
                        if KEY_BIAS:
                            at_bias = (head * blocks + block_start + n) * 64 + i * BN + order
                            s += (tl.load(key_bias_ptr + at_bias) * scale)[None, :]
                        s = _capped(s, CAP)
                        if CAP > 0.0:
                            s = tl.where(hidden[:, None], float("-inf"), s)
                        key = n * 64 + i * BN + order
                        s = _visible(s, key, keys, position, window, CAUSAL, WINDOW)
                        if SINK:
                            s = _less_first(s, order, n + i)
                        p, peak, total, factor = _online(s, peak, total)
                        if NATIVE:
                            UNIT: tl.constexpr = 64 if LOW == "fp8" else 32
                            at_v = (kv_head * D + d) * blocks + block_start + n  # [DP], in blocks
                            if LOW == "fp8":
                                vt = tl.load(
                                    vp_ptr + at_v[:, None] * UNIT + t[None, :], mask=(d < D)[:, None], other=0.0
                                )
                                new = tl.dot((p * 448.0).to(tl.float8e4nv), tl.trans(vt))
                                acc = acc * factor[:, None] + new * (tl.load(vs_ptr + at) * (1.0 / 448.0))
                            else:
                                pair = tl.arange(0, 32)[None, :]
                                vt = tl.load(vp_ptr + at_v[:, None] * UNIT + pair, mask=(d < D)[:, None], other=0)
                                g = tl.arange(0, 64 // G)[None, :]
                                vs = tl.load(vs_ptr + at_v[:, None] * (64 // G) + g, mask=(d < D)[:, None], other=0)
                                if LOW == "nvfp4":
                                    vs = vs.to(tl.float8e4nv, bitcast=True)
                                pc, ps, more = _p_native(p, LOW, CAST)
                                if ROUNDED:
                                    excess = excess * factor + more
                                acc = tl.dot_scaled(pc, ps, "e2m1", tl.trans(vt), vs, "e2m1", acc * factor[:, None])
                        else:
                            at_v = vp_ptr + (at * 64 + t)[:, None] * D + d[None, :]
                            vc = tl.load(at_v, mask=(d < D)[None, :], other=0.0)
                            if LOW == "fp8":
                                unit = tl.load(vs_ptr + at)
                                if QUANT:
                                    unit *= 1.0 / 448.0
                                    if CAST:
                                        p = (p * 448.0).to(tl.float8e4nv).to(tl.float32)
                                    else:
                                        p = round_e4m3(p * 448.0)
                                acc = acc * factor[:, None] + _dot(p.to(DTYPE), vc, PORTABLE) * unit
                            else:
                                if QUANT:
                                    wide = _p_wide(p, LOW, CAST)
                                    if ROUNDED:
                                        excess = excess * factor + tl.sum(wide * (1.0 / 2688.0) - p, 1)
                                    p = wide
                                acc = acc * factor[:, None] + _dot(p.to(DTYPE), vc, PORTABLE)
            if QUANT and LOW != "fp8":
                acc = acc * (1.0 / 2688.0)
                if LEVELLED:
                    acc = acc / tl.load(values_ptr + b * HKV + h // (HQ // HKV))

        # -- high precision --
        low_total = total
        if SINK and MASS:
            low_total -= tl.exp2(logit - tl.where(peak == float("-inf"), 0.0, peak))
        k_head = (
            k_ptr + part * stride_kb + (h // (HQ // HKV)).to(tl.int64) * stride_kh + k_start.to(tl.int64) * stride_kt
        )
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
                        at_k = (at * 64 + i * BN + token)[:, None] * D + d[None, :]
                        kc = tl.load(kp_ptr + at_k, mask=(d < D)[None, :], other=0.0)
                        kr = tl.load(k_rest_ptr + at_k, mask=(d < D)[None, :], other=0.0)
                        s = _dot(q, tl.trans(kc), PORTABLE) + _dot(q, tl.trans(kr), PORTABLE)
                        if CENTRED:
                            centre = tl.load(centre_ptr + at * D + d, mask=d < D, other=0.0)
                            s += tl.sum(q.to(tl.float32) * centre.to(tl.float32)[None, :], 1)[:, None]
                    else:
                        at_k = k_head + key.to(tl.int64)[:, None] * stride_kt + d[None, :]
                        kc = tl.load(at_k, mask=(key < keys)[:, None] & (d < D)[None, :], other=0.0)
                        s = _dot(q, tl.trans(kc), PORTABLE)
                    s = _capped(s * scale, CAP)
                    s = _visible(s, key, keys, position, window, CAUSAL, WINDOW)
                    if SINK and REST:
                        s = _less_first(s, token, n + i)
                    if HALVES == 2:
                        s = tl.where((upper if side == 0 else ~upper)[:, None], s, float("-inf"))
                    p, peak, total, factor = _online(s, peak, total)
                    if MASS:
                        low_total = low_total * factor
                    if ROUNDED:
                        excess = excess * factor
                    acc = acc * factor[:, None]
                    if REST:
                        at_v = (at * 64 + i * BN + token)[:, None] * D + d[None, :]
                        vc = tl.load(vp_ptr + at_v, mask=(d < D)[None, :], other=0.0)
                        vr = tl.load(v_rest_ptr + at_v, mask=(d < D)[None, :], other=0.0)
                        acc += _dot(p.to(DTYPE), vc, PORTABLE)
                        acc += _dot(p.to(DTYPE), vr, PORTABLE)
                    else:
                        at_v = v_head + key.to(tl.int64)[:, None] * stride_vt + d[None, :]
                        vc = tl.load(at_v, mask=(key < keys)[:, None] & (d < D)[None, :], other=0.0)
                        acc += _dot(p.to(DTYPE), vc, PORTABLE)

        empty = total == 0.0
        norm = tl.where(empty, 1.0, total)
        out = (acc / (norm + excess)[:, None]).to(DTYPE)
        at_o = out_ptr + part * stride_ob + h.to(tl.int64) * stride_oh + q_start.to(tl.int64) * stride_ot
        at_o += query.to(tl.int64)[:, None] * stride_ot + d[None, :]
        tl.store(at_o, out, mask=inside[:, None] & (d < D)[None, :])
        at_l = part * stride_lb + h.to(tl.int64) * stride_lh + q_start + query
        lse = tl.where(empty, float("-inf"), (peak + tl.log2(norm)) * _LN2)
        tl.store(lse_ptr + at_l, lse, mask=inside)
        if MASS:
            tl.store(mass_ptr + at_l, 1.0 - tl.where(empty, 1.0, low_total / norm), mask=inside)


class Tuning(NamedTuple):
    """How a program works: query rows, tokens at a time, warps, loop stages, blocks whose q.c_b is worked out at a time."""

    rows: int
    tokens: int
    warps: int
    stages: int
    centres: int


def tuning(dim: int, low: str, form: Form, capability: tuple[int, int]) -> Tuning:
    """Settings for a head dim and a GPU of this compute capability.

    Shared memory is 100 KB on 8.6, 8.9 and 12.x; block-scaled products have 128 rows on 10.x. Timed on 9.0 alone, the others
    are chosen so that little or nothing spills (`thrift bench compile`).
    """
    small = capability in ((8, 6), (8, 9), (12, 0), (12, 1))
    fp4 = form == "native" and low != "fp8"
    if capability[0] == 10 and (fp4 or dim <= 128):
        return Tuning(128, 64, 8, 2 if dim in (64, 128) else 1, 16)
    if fp4:
        return Tuning(64, 64, 4 if dim <= 64 and low == "nvfp4" else 8, 1 if dim > 128 else 2, 16)
    if dim > 128:
        return Tuning(64, 32, 8, 1 if small else 2, 16)
    return Tuning(64, 64, 8 if capability[0] == 12 else 4, 2, 32)


def attend_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_q: PackedQ,
    packed: PackedKV,
    chosen: Tensor,
    counts: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    *,
    low: str,
    form: Form,
    quantised: bool,
    centred: bool,
    scale: float,
    key_bias: Tensor | None = None,
    values: Tensor | None = None,
    rounded: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    mass: Tensor | None = None,
    tuned: Tuning | None = None,
) -> None:
    """Attend to low-precision blocks and promoted ones.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``, or ``[1, Hq, tokens, D]`` for sequences end to end; contiguous in D.
        k: ``[B, Hkv, Tk, D]`` likewise.
        v: likewise.
        packed_q: Q in the low format when ``quantised``; with the logits of the first token, that one is attended exactly.
        packed: K and V in the low format, then without the first token; with a residual plane, promoted blocks are read from
            it and not from k and v.
        chosen: lists of promoted blocks ``[P, Hq, R, K]``, ascending.
        counts: their lengths ``[P, Hq, R]``.
        out: the shape of ``q``, contiguous in D, written.
        lse: float32 ``[B, Hq, Tq]``, natural logarithm, contiguous in its last dimension, written.
        sequences: how they lie.
        low: ``"nvfp4"``, ``"mxfp4"``, ``"fp8"`` or ``"drop"``.
        form: of the packed data.
        quantised: whether Q and P are quantised (``math="fp4"``).
        centred: whether packed K is K - c_b.
        scale: factor of the logits.
        key_bias: float32 ``[P, Hq, N*64]`` of `quantise_kv`, when packed Q lacks the mean query; else None.
        values: float32 ``[B, Hkv]``, the powers of two of V that data were packed with, see `thrift_attn.quant.levels`. Those
            of Q and K cancel out, and wide data lack them already.
        rounded: divide by the sum of P after rounding (4-bit formats, ``quantised``).
        window: sliding window in tokens.
        softcap: bound of the logits.
        mass: float32, the shape and strides of ``lse``: written with each row's share of the high path.
        tuned: settings to use in place of `tuning`.

    Raises:
        NotImplementedError: native data without quantised Q.
    """
    if form == "native" and not quantised and low != "drop":
        raise NotImplementedError("native low-precision products need quantised Q and P, math='fp4'")
    heads, dim = q.shape[1], q.shape[3]
    rest = packed.k_rest is not None
    portable = interpreted()
    capability = (0, 0) if portable else torch.cuda.get_device_capability(q.device)
    tuned = tuned or tuning(dim, low, form, capability)
    fill = packed.centres
    grid = (-(-sequences.most_rows // (tuned.rows // BLOCK)), heads, sequences.batch)
    attend_prefill_kernel[grid](
        q,
        k,
        v,
        sequences.spans,
        *(fill if x is None else x for x in (packed_q.q, packed_q.q_scale)),
        *(fill if x is None else x for x in packed[1:-1]),
        packed.centres,
        *(fill if x is None else x for x in (key_bias, values)),
        chosen,
        counts,
        out,
        lse,
        lse if mass is None else mass,
        lse if packed_q.sink is None else packed_q.sink,
        *(x.stride(i) for x in (q, k, v, out) for i in range(3)),
        *lse.stride()[:2],
        sequences.most_rows,
        chosen.shape[2],
        packed.centres.shape[2],
        chosen.shape[3],
        window or 0,
        scale * LOG2E,
        HQ=heads,
        HKV=k.shape[1],
        D=dim,
        DP=triton.next_power_of_2(dim),
        CAUSAL=sequences.causal,
        RAGGED=sequences.parts == 1,
        WINDOW=window is not None,
        CAP=softcap or 0.0,
        LOW=low,
        QUANT=quantised,
        NATIVE=form == "native",
        CENTRED=centred,
        KEY_BIAS=key_bias is not None,
        LEVELLED=values is not None and form == "native",
        ROUNDED=rounded,
        REST=rest,
        MASS=mass is not None,
        SINK=packed_q.sink is not None,
        BM=tuned.rows,
        BN=tuned.tokens,
        CENTRES=tuned.centres,
        STAGES=tuned.stages,
        CAST=not portable and capability >= (8, 9),
        PORTABLE=portable,
        num_warps=tuned.warps,
        num_stages=tuned.stages,
    )
