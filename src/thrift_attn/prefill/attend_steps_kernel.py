"""Steps of the attention kernel of prefill on one tile: what it loads, multiplies and adds. `attend_kernel` puts them together.

A tile is BM query rows and BN tokens of one block; D is the head dim and DP that rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.arithmetic import dot, softcapped
from thrift_attn.kernels.online_softmax import p_decoded, p_native, visible
from thrift_attn.kernels.rounding import round_e4m3


@triton.jit
def blocks_seen(base, r, queries, keys, offset, window, BM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Blocks that a program's rows see, from the first number up to the second; rows before position 0 see none.

    Blocks before the third number and from the fourth on hold keys that some row does not see.
    """
    last = tl.minimum((base + r) * 64 + BM, offset + queries)
    end = (keys + 63) // 64
    if CAUSAL:
        end = tl.minimum(end, (tl.maximum(last, 0) + 63) // 64)
    begin = end - end
    if WINDOW:
        begin = tl.maximum((base + r) * 64 + 1 - window, 0) // 64
    masked_from = keys // 64
    if CAUSAL:
        masked_from = base + r
    masked_to = begin
    if WINDOW:
        masked_to = (tl.maximum((base + r) * 64 + BM - window, 0) + 63) // 64
    return begin, end, masked_to, masked_from


@triton.jit
def next_listed(n, at_indices, count, listed, upcoming):
    """How many entries of an ascending list are passed after block ``n``, and the entry to come; -1 where there is none."""
    listed += (n == upcoming).to(tl.int32)
    return listed, tl.load(at_indices + listed, mask=listed < count, other=-1)


@triton.jit
def block0_listed(at_indices, count, count2, capacity, BM: tl.constexpr):
    """Whether block 0 is on a row's list, which ascends: of one query block for all rows, of two [BM]."""
    listed = tl.load(at_indices, mask=count > 0, other=-1) == 0
    if BM == 128:
        listed2 = tl.load(at_indices + capacity, mask=count2 > 0, other=-1) == 0
        upper = tl.arange(0, BM) < 64
        return (upper & listed) | (~upper & listed2)
    else:
        return listed


@triton.jit
def sink_logits(
    sink_logits_ptr, q_block, r, seq_q_blocks, at_indices, count, count2, capacity, inside, position, keys, window, scale,
    BM: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Logits of the first token [BM], -inf where a row does not see it or has its block among the promoted ones.

    Without a soft cap they are yet to be multiplied by ``scale``.
    """
    at = q_block * 64 + tl.arange(0, BM)
    s = tl.load(sink_logits_ptr + at, mask=r * 64 + tl.arange(0, BM) < seq_q_blocks * 64, other=0.0)
    if CAP > 0.0:
        s = softcapped(s * scale, CAP)
    seen = inside & (position >= 0) & (keys > 0)
    if WINDOW:
        seen = seen & (position < window)
    if not RESIDUAL:  # a residual plane does not hold the first token
        seen = seen & ~block0_listed(at_indices, count, count2, capacity, BM)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def mean_logits(
    q,
    k_block_mean_ptr,
    first_block,
    n,
    end,
    D: tl.constexpr,
    DP: tl.constexpr,
    MEANS: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Products of 16-bit Q with c_b of the blocks from ``n`` on that lie before ``end``: [BM, MEANS]."""
    d = tl.arange(0, DP)
    block = n + tl.arange(0, MEANS)
    at = k_block_mean_ptr + (first_block + block)[None, :] * D + d[:, None]
    block_mean = tl.load(at, mask=(block < end)[None, :] & (d < D)[:, None], other=0.0)
    return dot(q, block_mean, PORTABLE)


@triton.jit
def load_base_q(
    q, qp_ptr, qs_ptr, row, there,
    D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr, QUANTISE_QP: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Q of the base format [BM, ...] in its form, and the encoded scales of its groups where there are some."""
    if not QUANTISE_QP:
        return q, q
    elif NATIVE and FORMAT != "fp8":
        G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
        half = tl.arange(0, DP // 2)[None, :]
        group = tl.arange(0, DP // G)[None, :]
        ql = tl.load(qp_ptr + row[:, None] * (D // 2) + half, mask=there & (half < D // 2), other=0)
        qs = tl.load(qs_ptr + row[:, None] * (D // G) + group, mask=there & (group < D // G), other=0)
        if FORMAT == "nvfp4":
            qs = qs.to(tl.float8e4nv, bitcast=True)
        return ql, qs
    else:
        d = tl.arange(0, DP)
        ql = tl.load(qp_ptr + row[:, None] * D + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        return ql, ql


@triton.jit
def base_logits(
    ql, qs, kp_ptr, ks_ptr, row, key_bias_ptr, head_block, token, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    KEY_BIAS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Products of packed Q with rows [BN] of packed K, and what the mean query makes of these tokens: [BM, BN]."""
    if KEY_BIAS:  # the sum of three parts as a product with 1
        third = tl.arange(0, 16)[:, None]
        ones = tl.full([BM, 16], 1.0, tl.float32).to(tl.bfloat16)
        at_bias = (head_block * 3 + third) * 64 + token[None, :]
        s = dot(ones, tl.load(key_bias_ptr + at_bias, mask=third < 3, other=0.0), PORTABLE)
    elif NATIVE and FORMAT != "fp8":
        # Zero at run time: Triton 3.6 cannot compile a scaled product for sm_100 without an accumulator.
        s = tl.zeros([BM, BN], tl.float32) + scale * 0.0
    else:
        s = None
    if NATIVE and FORMAT != "fp8":
        G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
        half = tl.arange(0, DP // 2)[None, :]
        group = tl.arange(0, DP // G)[None, :]
        kc = tl.load(kp_ptr + row[:, None] * (D // 2) + half, mask=half < D // 2, other=0)
        ks = tl.load(ks_ptr + row[:, None] * (D // G) + group, mask=group < D // G, other=0)
        if FORMAT == "nvfp4":
            ks = ks.to(tl.float8e4nv, bitcast=True)
        return tl.dot_scaled(ql, qs, "e2m1", tl.trans(kc), ks, "e2m1", s)
    else:
        d = tl.arange(0, DP)
        kc = tl.load(kp_ptr + row[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        return dot(ql, tl.trans(kc), PORTABLE, s)


@triton.jit
def add_base_values(
    acc, rounded_sum, p, factor, vp_ptr, vs_ptr, at, at_v, e, t,
    D: tl.constexpr, FORMAT: tl.constexpr, QUANTISE_QP: tl.constexpr, NATIVE: tl.constexpr, NORMALIZE_ROUNDED: tl.constexpr,
    CAST: tl.constexpr, PORTABLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Output times ``factor`` plus P V of tokens ``t`` [BN] of block ``at`` (native V: of rows ``at_v`` [COLUMNS], in
    blocks), and the sum of P as it is multiplied."""
    if NATIVE:
        UNIT: tl.constexpr = 64 if FORMAT == "fp8" else 32
        if FORMAT == "fp8":
            vt = tl.load(vp_ptr + at_v[:, None] * UNIT + t[None, :], mask=(e < D)[:, None], other=0.0)
            new = tl.dot((p * 448.0).to(tl.float8e4nv), tl.trans(vt))
            acc = acc * factor[:, None] + new * (tl.load(vs_ptr + at) * (1.0 / 448.0))
        else:
            G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
            pair = tl.arange(0, 32)[None, :]
            vt = tl.load(vp_ptr + at_v[:, None] * UNIT + pair, mask=(e < D)[:, None], other=0)
            g = tl.arange(0, 64 // G)[None, :]
            vs = tl.load(vs_ptr + at_v[:, None] * (64 // G) + g, mask=(e < D)[:, None], other=0)
            if FORMAT == "nvfp4":
                vs = vs.to(tl.float8e4nv, bitcast=True)
            pc, ps, more = p_native(p, FORMAT, CAST)
            if NORMALIZE_ROUNDED:
                rounded_sum = rounded_sum * factor + more
            acc = tl.dot_scaled(pc, ps, "e2m1", tl.trans(vt), vs, "e2m1", acc * factor[:, None])
    else:
        vc = tl.load(vp_ptr + (at * 64 + t)[:, None] * D + e[None, :], mask=(e < D)[None, :], other=0.0)
        if FORMAT == "fp8":
            unit_v = tl.load(vs_ptr + at)
            if QUANTISE_QP:
                unit_v *= 1.0 / 448.0
                if CAST:
                    p = (p * 448.0).to(tl.float8e4nv).to(tl.float32)
                else:
                    p = round_e4m3(p * 448.0)
            acc = acc * factor[:, None] + dot(p.to(DTYPE), vc, PORTABLE) * unit_v
        else:
            if QUANTISE_QP:
                p = p_decoded(p, FORMAT, CAST)
                if NORMALIZE_ROUNDED:
                    rounded_sum = rounded_sum * factor + tl.sum(p, 1)
            acc = acc * factor[:, None] + dot(p.to(DTYPE), vc, PORTABLE)
    return acc, rounded_sum


@triton.jit
def _logits(q, k_head, key, keys, stride_kt, D: tl.constexpr, DP: tl.constexpr, PORTABLE: tl.constexpr):
    """Products of 16-bit Q with the keys [BN] of a head: [BM, BN]."""
    d = tl.arange(0, DP)
    at_k = k_head + key.to(tl.int64)[:, None] * stride_kt + d[None, :]
    kc = tl.load(at_k, mask=(key < keys)[:, None] & (d < D)[None, :], other=0.0)
    return dot(q, tl.trans(kc), PORTABLE)


@triton.jit
def _residual_logits(
    q, kp_ptr, k_residual_ptr, k_block_mean_ptr, at, token,
    D: tl.constexpr, DP: tl.constexpr, CENTRED: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Products of 16-bit Q with tokens [BN] of block ``at``, of which there are packed data and a residual: [BM, BN]."""
    d = tl.arange(0, DP)
    at_k = (at * 64 + token)[:, None] * D + d[None, :]
    kc = tl.load(kp_ptr + at_k, mask=(d < D)[None, :], other=0.0)
    kr = tl.load(k_residual_ptr + at_k, mask=(d < D)[None, :], other=0.0)
    s = dot(q, tl.trans(kc), PORTABLE) + dot(q, tl.trans(kr), PORTABLE)
    if CENTRED:
        block_mean = tl.load(k_block_mean_ptr + at * D + d, mask=d < D, other=0.0)
        s += tl.sum(q.to(tl.float32) * block_mean.to(tl.float32)[None, :], 1)[:, None]
    return s


@triton.jit
def _add_values(acc, p, v_head, key, keys, e, stride_vt, D: tl.constexpr, PORTABLE: tl.constexpr):
    """Output plus P V of the keys [BN] of a head, V in 16 bits."""
    at_v = v_head + key.to(tl.int64)[:, None] * stride_vt + e[None, :]
    vc = tl.load(at_v, mask=(key < keys)[:, None] & (e < D)[None, :], other=0.0)
    acc += dot(p, vc, PORTABLE)
    return acc


@triton.jit
def _add_residual_values(acc, p, vp_ptr, v_residual_ptr, at, token, e, D: tl.constexpr, PORTABLE: tl.constexpr):
    """Output plus P V of tokens [BN] of block ``at``, V being packed data and a residual."""
    at_v = (at * 64 + token)[:, None] * D + e[None, :]
    vc = tl.load(vp_ptr + at_v, mask=(e < D)[None, :], other=0.0)
    vr = tl.load(v_residual_ptr + at_v, mask=(e < D)[None, :], other=0.0)
    acc += dot(p, vc, PORTABLE)
    acc += dot(p, vr, PORTABLE)
    return acc


@triton.jit
def promoted_logits(
    q, k_head, kp_ptr, k_residual_ptr, k_block_mean_ptr, n, at, token, position, keys, window, scale, stride_kt,
    D: tl.constexpr, DP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr, SINK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Logits of tokens [BN] of promoted block ``n``, which is ``at`` among packed blocks, -inf where unseen: [BM, BN].

    Without a soft cap they are yet to be multiplied by ``scale``.
    """
    key = n * 64 + token
    if RESIDUAL:
        s = _residual_logits(q, kp_ptr, k_residual_ptr, k_block_mean_ptr, at, token, D, DP, CENTRED, PORTABLE)
    else:
        s = _logits(q, k_head, key, keys, stride_kt, D, DP, PORTABLE)
    if CAP > 0.0:
        s = softcapped(s * scale, CAP)
    return visible(s, key, keys, position, window, CAUSAL, WINDOW, SINK and RESIDUAL)


@triton.jit
def promoted_values(
    acc, p, v_head, vp_ptr, v_residual_ptr, n, at, token, keys, e, stride_vt,
    D: tl.constexpr, RESIDUAL: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Output plus P V of tokens [BN] of promoted block ``n``, which is ``at`` among packed blocks."""
    if RESIDUAL:
        return _add_residual_values(acc, p, vp_ptr, v_residual_ptr, at, token, e, D, PORTABLE)
    else:
        return _add_values(acc, p, v_head, n * 64 + token, keys, e, stride_vt, D, PORTABLE)
