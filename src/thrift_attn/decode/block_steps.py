"""Steps of decode on one block, in four quarters of 16 tokens, and on the chunks of a head.

`thrift_attn.decode.attend` puts them together. Units are its own: N query columns, logits S^T [16, N] per quarter, output
O^T [16 * C, N] per chunk of C tiles.
"""

# ruff: noqa: RUF005  (kernels know tuples by `+` alone)

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.fragments import (
    k_operand,
    load_codes,
    load_scales,
    next_operand,
    query_index,
    v_operand,
    widen4,
    widen8,
)
from thrift_attn.kernels.arithmetic import softcapped
from thrift_attn.kernels.powers_of_two import inverse


@triton.jit
def cap_block(s0, s1, s2, s3, factor, CAP: tl.constexpr):
    """What turns accumulators into logits, and the factor that is left to apply."""
    if CAP > 0:
        s0 = softcapped(s0 * factor, CAP)
        s1 = softcapped(s1 * factor, CAP)
        s2 = softcapped(s2 * factor, CAP)
        s3 = softcapped(s3 * factor, CAP)
        return s0, s1, s2, s3, 1.0
    else:
        return s0, s1, s2, s3, factor


@triton.jit
def hide(s, token, position, first):
    return tl.where((token[:, None] <= position[None, :]) & (token[:, None] >= first[None, :]), s, float("-inf"))


@triton.jit
def hide_block(s0, s1, s2, s3, token, position, first):
    """`hide` for the four quarters of a block; ``token`` are the 16 tokens of the first."""
    s0 = hide(s0, token, position, first)
    s1 = hide(s1, token + 16, position, first)
    s2 = hide(s2, token + 32, position, first)
    s3 = hide(s3, token + 48, position, first)
    return s0, s1, s2, s3


@triton.jit
def operands(p0, p1, p2, p3, N: tl.constexpr, DTYPE: tl.constexpr, ORDER: tl.constexpr, PORTABLE: tl.constexpr):
    """`next_operand` for the four quarters of a block."""
    b0 = next_operand(p0, N, DTYPE, ORDER, PORTABLE)
    b1 = next_operand(p1, N, DTYPE, ORDER, PORTABLE)
    b2 = next_operand(p2, N, DTYPE, ORDER, PORTABLE)
    b3 = next_operand(p3, N, DTYPE, ORDER, PORTABLE)
    return b0, b1, b2, b3


@triton.jit
def softmax_step(s0, s1, s2, s3, factor, m, total):
    """Running maximum and sum with four quarters of a block; weights p0..p3 and the factor for earlier results."""
    peak = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0)
    new = tl.maximum(m, peak * factor)
    decay = tl.exp2(m - new)
    p0 = tl.exp2(s0 * factor - new[None, :])
    p1 = tl.exp2(s1 * factor - new[None, :])
    p2 = tl.exp2(s2 * factor - new[None, :])
    p3 = tl.exp2(s3 * factor - new[None, :])
    total = total * decay[None, :] + ((p0 + p1) + (p2 + p3))
    return p0, p1, p2, p3, new, total, decay


@triton.jit
def load_queries(
    q_ptr, rows, stride_qh, stride_qt, tq, GROUP: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Queries of N columns as given, per chunk, in the order of `query_index`."""
    given = ()
    for i in tl.static_range(len(CHUNKS)):
        row, dim = query_index(CHUNKS[i][1], N)
        row += rows
        at = row // GROUP * stride_qt + row % GROUP * stride_qh + CHUNKS[i][0] * 16 + dim
        given = given + (tl.load(q_ptr + at, mask=row < GROUP * tq, other=0.0),)
    return given


@triton.jit
def over_scales(given, k_scale_ptr, N: tl.constexpr, CHUNKS: tl.constexpr):
    """Queries of `load_queries` over powers of two [D], float32."""
    divided = ()
    for i in tl.static_range(len(CHUNKS)):
        _row, dim = query_index(CHUNKS[i][1], N)
        power = tl.load(k_scale_ptr + CHUNKS[i][0] * 16 + dim, cache_modifier=".cg")
        divided = divided + (given[i].to(tl.float32) * inverse(power),)
    return divided


@triton.jit
def load_chunk(ptr, SCALES: tl.constexpr, WIDE: tl.constexpr, AT: tl.constexpr, C: tl.constexpr, CACHE: tl.constexpr):
    """Codes and scales of the tiles AT to AT + C of one plane's K or V; ``SCALES`` is the place of the scales.

    A CACHE of ".cg" leaves out L1, "" does not: for what an earlier kernel of the chain writes and that is read before it is
    waited for.
    """
    return load_codes(ptr + AT * WIDE * 128, C * WIDE, CACHE), load_scales(ptr + SCALES + AT * 16, C, CACHE)


@triton.jit
def load_half(ptr, SCALES: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr):
    """`load_chunk` for all chunks of one plane's K or V, not through L1."""
    codes = ()
    for i in tl.static_range(len(CHUNKS)):
        codes = codes + (load_chunk(ptr, SCALES, WIDE, CHUNKS[i][0], CHUNKS[i][1], ".cg"),)
    return codes


@triton.jit
def _widen(codes, WIDE: tl.constexpr, C: tl.constexpr, PORTABLE: tl.constexpr):
    if WIDE == 1:
        return widen4(codes[0], codes[1], C, PORTABLE)
    else:
        return widen8(codes[0], codes[1], C, PORTABLE)


@triton.jit
def _add_k_chunk(
    s0, s1, s2, s3, codes, queries, WIDE: tl.constexpr, C: tl.constexpr, PORTABLE: tl.constexpr
):  # fmt: skip
    a, b, c, d = _widen(codes, WIDE, C, PORTABLE)
    s0 = tl.dot(k_operand(a, C), queries, s0)
    s1 = tl.dot(k_operand(b, C), queries, s1)
    s2 = tl.dot(k_operand(c, C), queries, s2)
    s3 = tl.dot(k_operand(d, C), queries, s3)
    return s0, s1, s2, s3


@triton.jit
def add_k_half(
    s0, s1, s2, s3, codes, queries, WIDE: tl.constexpr, CHUNKS: tl.constexpr, PORTABLE: tl.constexpr
):  # fmt: skip
    """Four quarters [16, N] plus K Q^T, K from `load_half`."""
    for i in tl.static_range(len(CHUNKS)):
        s0, s1, s2, s3 = _add_k_chunk(s0, s1, s2, s3, codes[i], queries[i], WIDE, CHUNKS[i][1], PORTABLE)
    return s0, s1, s2, s3


@triton.jit
def _add_v_chunk(o, codes, b0, b1, b2, b3, WIDE: tl.constexpr, C: tl.constexpr, PORTABLE: tl.constexpr):
    a, b, c, d = _widen(codes, WIDE, C, PORTABLE)
    o = tl.dot(v_operand(a, C), b0, o)
    o = tl.dot(v_operand(b, C), b1, o)
    o = tl.dot(v_operand(c, C), b2, o)
    return tl.dot(v_operand(d, C), b3, o)


@triton.jit
def add_v_half(out, codes, b0, b1, b2, b3, WIDE: tl.constexpr, CHUNKS: tl.constexpr, PORTABLE: tl.constexpr):
    """Output chunks [16 * C, N] plus V^T P^T, V from `load_half`."""
    grown = ()
    for i in tl.static_range(len(CHUNKS)):
        grown = grown + (_add_v_chunk(out[i], codes[i], b0, b1, b2, b3, WIDE, CHUNKS[i][1], PORTABLE),)
    return grown


@triton.jit
def add_k(
    s0, s1, s2, s3, codes, queries, next_ptr,
    WIDE: tl.constexpr, NEXT_SCALES: tl.constexpr, NEXT_WIDE: tl.constexpr, CHUNKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Four quarters [16, N] plus K Q^T.

    As soon as the registers of a chunk are free, the same chunk of what comes next is loaded into them.
    """
    loaded = ()
    for i in tl.static_range(len(CHUNKS)):
        s0, s1, s2, s3 = _add_k_chunk(s0, s1, s2, s3, codes[i], queries[i], WIDE, CHUNKS[i][1], PORTABLE)
        loaded = loaded + (load_chunk(next_ptr, NEXT_SCALES, NEXT_WIDE, CHUNKS[i][0], CHUNKS[i][1], ""),)
    return s0, s1, s2, s3, loaded


@triton.jit
def add_v(
    out, codes, decay, b0, b1, b2, b3, next_ptr,
    WIDE: tl.constexpr, NEXT_SCALES: tl.constexpr, NEXT_WIDE: tl.constexpr, CHUNKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Output chunks [16 * C, N] times ``decay`` plus V^T P^T; loads what comes next like `add_k`."""
    grown = ()
    loaded = ()
    for i in tl.static_range(len(CHUNKS)):
        o = out[i] * decay[None, :]
        grown = grown + (_add_v_chunk(o, codes[i], b0, b1, b2, b3, WIDE, CHUNKS[i][1], PORTABLE),)
        loaded = loaded + (load_chunk(next_ptr, NEXT_SCALES, NEXT_WIDE, CHUNKS[i][0], CHUNKS[i][1], ""),)
    return grown, loaded


@triton.jit
def scaled(out, factor, CHUNKS: tl.constexpr):
    """Output chunks times one number per query."""
    new = ()
    for i in tl.static_range(len(CHUNKS)):
        new = new + (out[i] * factor[None, :],)
    return new


@triton.jit
def nth_unpromoted(i, even_rounds, even, short, split, splits):
    """Place of the i-th block of a split among the blocks that are not promoted.

    The first ``even`` are dealt to all splits in turn, ``even_rounds`` of them to this one, and the rest to
    those from ``short`` on.
    """
    last = even - even_rounds * (splits - short) + split - short
    return tl.where(i < even_rounds, split + i * splits, last + i * (splits - short))
