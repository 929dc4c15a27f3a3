"""Kernels that quantise K, V and Q for prefill; the table of what they write is in `thrift_attn.prefill.pack`."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.groups import store_columns, store_residual, store_rows
from thrift_attn.kernels.powers_of_two import inverse
from thrift_attn.kernels.rounding import bits, cut
from thrift_attn.kernels.spans import BLOCK_START, K_LEN, K_START, Q_BLOCK_START, Q_LEN, Q_START, SPAN
from thrift_attn.kernels.token_order import token_at


@triton.jit(do_not_specialize=["blocks"])
def quantise_kv_kernel(
    k_ptr,  # 16-bit, addressed by strides
    v_ptr,
    spans_ptr,  # int32 [B, 6]
    k_block_mean_ptr,  # 16-bit [P, Hkv, N, D]
    kp_ptr,  # packed, see the table of `thrift_attn.prefill.pack`
    ks_ptr,
    vp_ptr,
    vs_ptr,
    k_residual_ptr,  # 16-bit [P, Hkv, N*64, D]
    v_residual_ptr,
    block0_mean_ptr,  # 16-bit [B, Hkv, D]
    query_mean_ptr,  # float32 [B, Hq, D]
    key_bias_ptr,  # bfloat16 [P, Hq, N, 3, 64]
    k_channel_scale_ptr,  # float32 [B, Hkv, D], powers of two: K is quantised times this
    v_head_scale_ptr,  # float32 [B, Hkv]: powers of two of nvfp4, largest magnitudes of fp8
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
    ONE_BATCH: tl.constexpr,  # P = 1, packed end to end or a batch of one
    FORMAT: tl.constexpr,  # format, or "drop": block means only
    RESIDUAL: tl.constexpr,  # format of the residual plane, or "none"
    CENTRED: tl.constexpr,
    SINK: tl.constexpr,  # the first token of a sequence is the mean of its block, and its V is left out
    CHANNEL_SCALES: tl.constexpr,
    BEST_SCALES: tl.constexpr,
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
        batch = (b * (not ONE_BATCH)).to(tl.int64)
        head = batch * HKV + h
        at = head * blocks + block
        t = tl.arange(0, 64)[:, None]
        d = tl.arange(0, DP)[None, :]
        there = (n * 64 + t < length) & (d < D)
        first = (start + n * 64).to(tl.int64)
        k_start = k_ptr + batch * stride_kb + h.to(tl.int64) * stride_kh + first * stride_kt
        k = tl.load(k_start + t.to(tl.int64) * stride_kt + d, mask=there, other=0.0)
        k = k.to(tl.float32)
        count = tl.minimum(length - n * 64, 64).to(tl.float32)
        total = tl.sum(k, 0)
        block_mean = tl.div_rn(total, count + tl.zeros_like(total)).to(k_block_mean_ptr.dtype.element_ty)
        dim = tl.arange(0, DP)
        if SINK:
            in_block0 = dim < tl.where(n == 0, D, 0)
            first_key = tl.load(k_start + dim, mask=in_block0, other=0.0)
            block0_mean = tl.div_rn(
                total - first_key.to(tl.float32), tl.maximum(count - 1.0, 1.0) + tl.zeros_like(total)
            )
            block0_mean = tl.where(count > 1.0, block0_mean.to(first_key.dtype), first_key)
            tl.store(block0_mean_ptr + (b * HKV + h).to(tl.int64) * D + dim, block0_mean, mask=in_block0)
            block_mean = tl.where(n == 0, first_key, block_mean)
        tl.store(k_block_mean_ptr + at * D + dim, block_mean, mask=dim < D)
        if FORMAT != "drop":
            first_v = v_ptr + batch * stride_vb + h.to(tl.int64) * stride_vh + first * stride_vt
            inv_k_scale, inv_v_scale = 1.0, 1.0
            if FORMAT == "fp8":
                inv_v_scale = tl.load(v_head_scale_ptr + b * HKV + h)
            if CHANNEL_SCALES:
                k_scale = tl.load(k_channel_scale_ptr + (b * HKV + h).to(tl.int64) * D + dim, mask=dim < D, other=1.0)
                inv_k_scale = inverse(k_scale)[None, :]
                if FORMAT == "nvfp4":
                    v_scale = tl.load(v_head_scale_ptr + b * HKV + h)
                    inv_v_scale = inverse(v_scale)
            for i in tl.range(0, 64, TOKENS):
                row = at * 64 + i
                token = i + tl.arange(0, TOKENS)[:, None]
                present = (n * 64 + token < length) & (d < D)
                x = k
                if TOKENS < 64:
                    x = tl.load(k_start + token.to(tl.int64) * stride_kt + d, mask=present, other=0.0).to(tl.float32)
                if CENTRED:
                    x = tl.where(present, x - block_mean.to(tl.float32)[None, :], 0.0)
                for g in range(GROUP):
                    at_query_mean = query_mean_ptr + ((b * HKV + h) * GROUP + g).to(tl.int64) * D
                    product = tl.sum(x * tl.load(at_query_mean + dim, mask=dim < D, other=0.0)[None, :], 1)
                    at_bias = key_bias_ptr + ((head * GROUP + g) * blocks + block) * 192 + i + tl.arange(0, TOKENS)
                    for _ in tl.static_range(3):  # three times 8 bits hold a float32
                        tl.store(at_bias, cut(product).to(tl.bfloat16))
                        product -= cut(product)
                        at_bias += 64
                if CHANNEL_SCALES:
                    x *= k_scale[None, :]
                decoded = store_rows(x, kp_ptr, ks_ptr, row, inv_k_scale, D, DP, FORMAT, BEST_SCALES, NATIVE, CAST)
                if RESIDUAL != "none":
                    store_residual(x - decoded, k_residual_ptr, row, inv_k_scale, 1, D, RESIDUAL, BEST_SCALES)
                if NATIVE and FORMAT == "fp8":  # rows in the order of positions
                    token = token_at(token)
                    present = (n * 64 + token < length) & (d < D)
                if SINK:
                    present = present & (n * 64 + token > 0)
                x = tl.load(first_v + token.to(tl.int64) * stride_vt + d, mask=present, other=0.0).to(tl.float32)
                if CHANNEL_SCALES and FORMAT == "nvfp4":
                    x *= v_scale
                decoded = store_columns(
                    x, vp_ptr, vs_ptr, head, block, blocks, i, inv_v_scale, D, DP, FORMAT, BEST_SCALES, NATIVE, CAST
                )
                if RESIDUAL != "none":
                    store_residual(x - decoded, v_residual_ptr, row, inv_v_scale, 0, D, RESIDUAL, BEST_SCALES)


@triton.jit(do_not_specialize=["q_blocks", "blocks"])
def quantise_q_kernel(
    q_ptr,  # 16-bit, addressed by strides
    spans_ptr,  # int32 [B, 6]
    q_block_mean_ptr,  # float32 [P, Hq, R, D]
    qp_ptr,
    qs_ptr,
    sink_logits_ptr,  # float32 [P, Hq, R*64]
    k_block_mean_ptr,  # 16-bit [P, Hkv, N, D]: that of block 0 is the first key
    query_mean_ptr,  # float32 [B, Hq, D]
    k_channel_scale_ptr,  # float32 [B, Hkv, D], powers of two: Q is quantised divided by this
    stride_qb,
    stride_qh,
    stride_qt,
    q_blocks,  # R
    blocks,  # N
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_BATCH: tl.constexpr,
    FORMAT: tl.constexpr,  # "none": means only
    SINK: tl.constexpr,  # also the logits of the first token
    SUBTRACT_QUERY_MEAN: tl.constexpr,  # Q is quantised less its mean over the call
    CHANNEL_SCALES: tl.constexpr,
    BEST_SCALES: tl.constexpr,
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
        batch = (b * (not ONE_BATCH)).to(tl.int64)
        head = batch * HQ + h
        at = head * q_blocks + r + tl.load(span + Q_BLOCK_START)
        t = tl.arange(0, 64)[:, None]
        d = tl.arange(0, DP)[None, :]
        seen = (first + t >= tl.maximum(0, -offset)) & (first + t < length)
        q_start = q_ptr + batch * stride_qb + h.to(tl.int64) * stride_qh + start.to(tl.int64) * stride_qt
        at_q = (first + t).to(tl.int64) * stride_qt
        q = tl.load(q_start + at_q + d, mask=seen & (d < D), other=0.0).to(tl.float32)
        count = tl.maximum(tl.sum(seen.to(tl.int32)), 1).to(tl.float32)
        total = tl.sum(q, 0)
        dim = tl.arange(0, DP)
        tl.store(q_block_mean_ptr + at * D + dim, tl.div_rn(total, count + tl.zeros_like(total)), mask=dim < D)
        if SINK:
            block = (batch * HKV + h // (HQ // HKV)) * blocks + tl.load(span + BLOCK_START)
            key = tl.load(k_block_mean_ptr + block * D + dim, mask=dim < D, other=0.0).to(tl.float32)
            tl.store(sink_logits_ptr + at * 64 + tl.arange(0, 64), tl.sum(q * key[None, :], 1))
        if FORMAT != "none":
            inv_k_scale = 1.0
            if CHANNEL_SCALES:
                at_scale = k_channel_scale_ptr + (b * HKV + h // (HQ // HKV)).to(tl.int64) * D
                k_scale = tl.load(at_scale + dim, mask=dim < D, other=1.0)
                inv_k_scale = k_scale[None, :]
            for i in tl.range(0, 64, TOKENS):
                query = first + i + tl.arange(0, TOKENS)[:, None]
                present = (query >= tl.maximum(0, -offset)) & (query < length) & (d < D)
                x = q
                if TOKENS < 64:
                    x = tl.load(q_start + query.to(tl.int64) * stride_qt + d, mask=present, other=0.0).to(tl.float32)
                if SUBTRACT_QUERY_MEAN:
                    query_mean = tl.load(query_mean_ptr + (b * HQ + h).to(tl.int64) * D + dim, mask=dim < D, other=0.0)
                    x = tl.where(present, x - query_mean[None, :], 0.0)
                if CHANNEL_SCALES:
                    x *= inverse(k_scale)[None, :]
                store_rows(x, qp_ptr, qs_ptr, at * 64 + i, inv_k_scale, D, DP, FORMAT, BEST_SCALES, NATIVE, CAST)


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_t"])
def peaks_kernel(
    v_ptr,  # 16-bit, addressed by strides
    spans_ptr,  # int32 [B, 6]
    v_peaks_ptr,  # float32 [B, Hkv], zeros before
    stride_b,
    stride_h,
    stride_t,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ONE_BATCH: tl.constexpr,
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
        at = v_ptr + (b * (not ONE_BATCH)).to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        peak = tl.zeros([64, DP], tl.float32)
        for i in range(BLOCKS):
            token = (n + i) * 64 + tl.arange(0, 64)[:, None]
            row = (start + token).to(tl.int64)
            there = (token >= SINK) & (token < length) & (d < D)
            x = tl.load(at + row * stride_t + d, mask=there, other=0.0).to(tl.float32)
            peak = tl.maximum(peak, tl.abs(x) + x * 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN for infinities too
        # The bits of a float that is not negative are in its order, those of NaN above all block0_mean; a NaN may have a sign.
        top = tl.max(tl.max(bits(peak) & 0x7FFFFFFF, 1), 0)
        tl.atomic_max(v_peaks_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + b * HKV + h, top)
