"""Steps of the attention kernel of prefill on one tile: what it loads, multiplies and adds. `attend_kernel` puts them together.

A tile is BM query rows and BN tokens of one block; D is the head dim and DP that rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.arithmetic import dot
from thrift_attn.kernels.online_softmax import p_decoded, p_native
from thrift_attn.kernels.rounding import round_e4m3


@triton.jit
def load_low_q(
    q, qp_ptr, qs_ptr, row, there,
    D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr, QUANTISE_QP: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Q of the low path [BM, ...] in its form, and the encoded scales of its groups where there are some."""
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
def low_logits(
    ql, qs, kp_ptr, ks_ptr, row, key_bias_ptr, head_block, token, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    KEY_BIAS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Products of low Q with the rows [BN] of packed K, and what the mean query makes of these tokens of a block: [BM, BN]."""
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
def low_values(
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
def logits(q, k_head, key, keys, stride_kt, D: tl.constexpr, DP: tl.constexpr, PORTABLE: tl.constexpr):
    """Products of 16-bit Q with the keys [BN] of a head: [BM, BN]."""
    d = tl.arange(0, DP)
    at_k = k_head + key.to(tl.int64)[:, None] * stride_kt + d[None, :]
    kc = tl.load(at_k, mask=(key < keys)[:, None] & (d < D)[None, :], other=0.0)
    return dot(q, tl.trans(kc), PORTABLE)


@triton.jit
def residual_logits(
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
def add_values(acc, p, v_head, key, keys, e, stride_vt, D: tl.constexpr, PORTABLE: tl.constexpr):
    """Output plus P V of the keys [BN] of a head, V in 16 bits."""
    at_v = v_head + key.to(tl.int64)[:, None] * stride_vt + e[None, :]
    vc = tl.load(at_v, mask=(key < keys)[:, None] & (e < D)[None, :], other=0.0)
    acc += dot(p, vc, PORTABLE)
    return acc


@triton.jit
def add_residual_values(acc, p, vp_ptr, v_residual_ptr, at, token, e, D: tl.constexpr, PORTABLE: tl.constexpr):
    """Output plus P V of tokens [BN] of block ``at``, V being packed data and a residual."""
    at_v = (at * 64 + token)[:, None] * D + e[None, :]
    vc = tl.load(vp_ptr + at_v, mask=(e < D)[None, :], other=0.0)
    vr = tl.load(v_residual_ptr + at_v, mask=(e < D)[None, :], other=0.0)
    acc += dot(p, vc, PORTABLE)
    acc += dot(p, vr, PORTABLE)
    return acc
