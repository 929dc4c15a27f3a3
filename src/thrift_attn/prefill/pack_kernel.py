"""Kernels that quantise K, V and Q for prefill; the table of what they write is in `thrift_attn.prefill.pack`."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.groups import store_columns, store_rest, store_rows
from thrift_attn.kernels.rounding import bits, cut, from_bits
from thrift_attn.kernels.spans import BLOCK_START, K_LEN, K_START, Q_LEN, Q_START, ROW_START, SPAN
from thrift_attn.kernels.token_order import token_at


@triton.jit
def _inverse(power):
    """1 / x of powers of two, exactly."""
    return from_bits((254 << 23) - bits(power))


@triton.jit(do_not_specialize=["blocks"])
def quantise_kv_kernel(
    k_ptr,  # 16-bit, addressed by strides
    v_ptr,
    spans_ptr,  # int32 [B, 6]
    centre_ptr,  # 16-bit [P, Hkv, N, D]
    kp_ptr,  # packed, see the table above
    ks_ptr,
    vp_ptr,
    vs_ptr,
    k_rest_ptr,  # 16-bit [P, Hkv, N*64, D]
    v_rest_ptr,
    others_ptr,  # 16-bit [B, Hkv, D]
    mean_ptr,  # float32 [B, Hq, D]
    bias_ptr,  # bfloat16 [P, Hq, N, 3, 64]
    keys_ptr,  # float32 [B, Hkv, D], powers of two: K is quantised times this
    values_ptr,  # float32 [B, Hkv]: powers of two of nvfp4, largest magnitudes of fp8
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    blocks,  # N
    HKV: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head whose mean query meets the keys, or 0
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    ONE_PART: tl.constexpr,  # packed tensors have one part, P = 1
    LOW: tl.constexpr,  # format, or "drop": centres only
    REST: tl.constexpr,  # format of the residual plane, or "none"
    CENTRED: tl.constexpr,
    SINK: tl.constexpr,  # the first token of a sequence is the centre of its block, and its V is left out
    BALANCED: tl.constexpr,
    BEST: tl.constexpr,
    NATIVE: tl.constexpr,
    TOKENS: tl.constexpr,  # quantised at a time
    CAST: tl.constexpr,
):
    n = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    span = spans_ptr + b * SPAN
    start, length = tl.load(span + K_START), tl.load(span + K_LEN)
    if n * 64 < length:
        block = n + tl.load(span + BLOCK_START)
        part = (b * (not ONE_PART)).to(tl.int64)
        head = part * HKV + h
        at = head * blocks + block
        t = tl.arange(0, 64)[:, None]
        d = tl.arange(0, DP)[None, :]
        there = (n * 64 + t < length) & (d < D)
        first = (start + n * 64).to(tl.int64)
        k_start = k_ptr + part * stride_kb + h.to(tl.int64) * stride_kh + first * stride_kt
        k = tl.load(k_start + t.to(tl.int64) * stride_kt + d, mask=there, other=0.0)
        k = k.to(tl.float32)
        count = tl.minimum(length - n * 64, 64).to(tl.float32)
        total = tl.sum(k, 0)
        centre = tl.div_rn(total, count + tl.zeros_like(total)).to(centre_ptr.dtype.element_ty)
        dim = tl.arange(0, DP)
        if SINK:
            sunk = dim < tl.where(n == 0, D, 0)
            own = tl.load(k_start + dim, mask=sunk, other=0.0)
            others = tl.div_rn(total - own.to(tl.float32), tl.maximum(count - 1.0, 1.0) + tl.zeros_like(total))
            others = tl.where(count > 1.0, others.to(own.dtype), own)
            tl.store(others_ptr + (b * HKV + h).to(tl.int64) * D + dim, others, mask=sunk)
            centre = tl.where(n == 0, own, centre)
        tl.store(centre_ptr + at * D + dim, centre, mask=dim < D)
        if LOW != "drop":
            first_v = v_ptr + part * stride_vb + h.to(tl.int64) * stride_vh + first * stride_vt
            back, of_v = 1.0, 1.0
            if LOW == "fp8":
                of_v = tl.load(values_ptr + b * HKV + h)
            if BALANCED:
                stretch = tl.load(keys_ptr + (b * HKV + h).to(tl.int64) * D + dim, mask=dim < D, other=1.0)
                back = _inverse(stretch)[None, :]
                if LOW == "nvfp4":
                    lift = tl.load(values_ptr + b * HKV + h)
                    of_v = _inverse(lift)
            for i in tl.range(0, 64, TOKENS):
                row = at * 64 + i
                token = i + tl.arange(0, TOKENS)[:, None]
                present = (n * 64 + token < length) & (d < D)
                x = k
                if TOKENS < 64:
                    x = tl.load(k_start + token.to(tl.int64) * stride_kt + d, mask=present, other=0.0).to(tl.float32)
                if CENTRED:
                    x = tl.where(present, x - centre.to(tl.float32)[None, :], 0.0)
                for g in range(GROUP):
                    of_head = mean_ptr + ((b * HKV + h) * GROUP + g).to(tl.int64) * D
                    met = tl.sum(x * tl.load(of_head + dim, mask=dim < D, other=0.0)[None, :], 1)
                    at_bias = bias_ptr + ((head * GROUP + g) * blocks + block) * 192 + i + tl.arange(0, TOKENS)
                    for _ in tl.static_range(3):  # three times 8 bits hold a float32
                        tl.store(at_bias, cut(met).to(tl.bfloat16))
                        met -= cut(met)
                        at_bias += 64
                if BALANCED:
                    x *= stretch[None, :]
                wide = store_rows(x, kp_ptr, ks_ptr, row, back, D, DP, LOW, BEST, NATIVE, CAST)
                if REST != "none":
                    store_rest(x - wide, k_rest_ptr, row, back, 1, D, REST, BEST)
                if NATIVE and LOW == "fp8":  # rows in the order of positions
                    token = token_at(token)
                    present = (n * 64 + token < length) & (d < D)
                if SINK:
                    present = present & (n * 64 + token > 0)
                x = tl.load(first_v + token.to(tl.int64) * stride_vt + d, mask=present, other=0.0).to(tl.float32)
                if BALANCED and LOW == "nvfp4":
                    x *= lift
                wide = store_columns(x, vp_ptr, vs_ptr, head, block, blocks, i, of_v, D, DP, LOW, BEST, NATIVE, CAST)
                if REST != "none":
                    store_rest(x - wide, v_rest_ptr, row, of_v, 0, D, REST, BEST)


@triton.jit(do_not_specialize=["rows", "blocks"])
def quantise_q_kernel(
    q_ptr,  # 16-bit, addressed by strides
    spans_ptr,  # int32 [B, 6]
    mean_ptr,  # float32 [P, Hq, R, D]
    qp_ptr,
    qs_ptr,
    sink_ptr,  # float32 [P, Hq, R*64]
    centre_ptr,  # 16-bit [P, Hkv, N, D]: that of block 0 is the first key
    of_call_ptr,  # float32 [B, Hq, D]
    keys_ptr,  # float32 [B, Hkv, D], powers of two: Q is quantised divided by this
    stride_qb,
    stride_qh,
    stride_qt,
    rows,  # R
    blocks,  # N
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_PART: tl.constexpr,
    LOW: tl.constexpr,  # "none": means only
    SINK: tl.constexpr,  # also the logits of the first token
    REDUCED: tl.constexpr,  # Q is quantised less its mean over the call
    BALANCED: tl.constexpr,
    BEST: tl.constexpr,
    NATIVE: tl.constexpr,
    TOKENS: tl.constexpr,  # quantised at a time
    CAST: tl.constexpr,
):
    r = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    span = spans_ptr + b * SPAN
    start, length = tl.load(span + Q_START), tl.load(span + Q_LEN)
    offset = length - length
    if CAUSAL:
        offset = tl.load(span + K_LEN) - length
    first = ((offset >> 6) + r) * 64 - offset  # query of the row's first position; >> rounds down
    if first < length:
        part = (b * (not ONE_PART)).to(tl.int64)
        head = part * HQ + h
        at = head * rows + r + tl.load(span + ROW_START)
        t = tl.arange(0, 64)[:, None]
        d = tl.arange(0, DP)[None, :]
        seen = (first + t >= tl.maximum(0, -offset)) & (first + t < length)
        q_start = q_ptr + part * stride_qb + h.to(tl.int64) * stride_qh + start.to(tl.int64) * stride_qt
        at_q = (first + t).to(tl.int64) * stride_qt
        q = tl.load(q_start + at_q + d, mask=seen & (d < D), other=0.0).to(tl.float32)
        count = tl.maximum(tl.sum(seen.to(tl.int32)), 1).to(tl.float32)
        total = tl.sum(q, 0)
        dim = tl.arange(0, DP)
        tl.store(mean_ptr + at * D + dim, tl.div_rn(total, count + tl.zeros_like(total)), mask=dim < D)
        if SINK:
            block = (part * HKV + h // (HQ // HKV)) * blocks + tl.load(span + BLOCK_START)
            key = tl.load(centre_ptr + block * D + dim, mask=dim < D, other=0.0).to(tl.float32)
            tl.store(sink_ptr + at * 64 + tl.arange(0, 64), tl.sum(q * key[None, :], 1))
        if LOW != "none":
            back = 1.0
            if BALANCED:
                of_head = keys_ptr + (b * HKV + h // (HQ // HKV)).to(tl.int64) * D
                stretch = tl.load(of_head + dim, mask=dim < D, other=1.0)
                back = stretch[None, :]
            for i in tl.range(0, 64, TOKENS):
                query = first + i + tl.arange(0, TOKENS)[:, None]
                present = (query >= tl.maximum(0, -offset)) & (query < length) & (d < D)
                x = q
                if TOKENS < 64:
                    x = tl.load(q_start + query.to(tl.int64) * stride_qt + d, mask=present, other=0.0).to(tl.float32)
                if REDUCED:
                    of_call = tl.load(of_call_ptr + (b * HQ + h).to(tl.int64) * D + dim, mask=dim < D, other=0.0)
                    x = tl.where(present, x - of_call[None, :], 0.0)
                if BALANCED:
                    x *= _inverse(stretch)[None, :]
                store_rows(x, qp_ptr, qs_ptr, at * 64 + i, back, D, DP, LOW, BEST, NATIVE, CAST)


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_t"])
def peaks_kernel(
    v_ptr,  # 16-bit, addressed by strides
    spans_ptr,  # int32 [B, 6]
    peaks_ptr,  # float32 [B, Hkv], zeros before
    stride_b,
    stride_h,
    stride_t,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ONE_PART: tl.constexpr,
    SINK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Largest magnitude of V of every head and sequence; ``BLOCKS`` blocks of 64 tokens a program."""
    n = tl.program_id(0) * BLOCKS
    h = tl.program_id(1)
    b = tl.program_id(2)
    start, length = tl.load(spans_ptr + b * SPAN + K_START), tl.load(spans_ptr + b * SPAN + K_LEN)
    if n * 64 < length:
        d = tl.arange(0, DP)[None, :]
        at = v_ptr + (b * (not ONE_PART)).to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        peak = tl.zeros([64, DP], tl.float32)
        for i in range(BLOCKS):
            token = (n + i) * 64 + tl.arange(0, 64)[:, None]
            row = (start + token).to(tl.int64)
            there = (token >= SINK) & (token < length) & (d < D)
            x = tl.load(at + row * stride_t + d, mask=there, other=0.0).to(tl.float32)
            peak = tl.maximum(peak, tl.abs(x) + x * 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN for infinities too
        # The bits of a float that is not negative are in its order, those of NaN above all others; a NaN may have a sign.
        top = tl.max(tl.max(bits(peak) & 0x7FFFFFFF, 1), 0)
        tl.atomic_max(peaks_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + b * HKV + h, top)
