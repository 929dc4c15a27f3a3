"""Quantise for prefill: one pass over K and V, one over Q. The bytes are those of `thrift_attn.quant.quantise`.

What is written depends on what multiplies it. Letters: P parts, N blocks, R rows of 64 queries (`thrift_attn.seq_layout`),
G elements per scale. ``wide`` data are the decoded numbers in the dtype of K, which holds every product of an element and a
group scale (2 or 4 significant bits times 4), so ordinary 16-bit products compute what narrow units would; fp8 keeps its
float32 scale outside. (One exception: float16 has no numbers below 2^-24, which mxfp4 may encode.)

=======  ===========================  ==============  ==================================  ==============
form     k                            k_scale         v                                   v_scale
=======  ===========================  ==============  ==================================  ==============
wide     16-bit [P, Hkv, N*64, D]     none, or fp8's  16-bit [P, Hkv, N*64, D]            none, or fp8's
native   e2m1 [P, Hkv, N*64, D/2]     [..., N*64, G]  e2m1 [P, Hkv, D, N*32], transposed  [..., D, N*64/G]
         e4m3 [P, Hkv, N*64, D]       f32 [..., N]    e4m3 [P, Hkv, D, N*64], transposed  f32 [..., N]
=======  ===========================  ==============  ==================================  ==============

Native e2m1 has the even element in the low nibble. Native e4m3 V has the tokens of each 16 in the order of
`position_of`, in which an accumulator of a tensor core product already is the operand of the next: token bits 3 2 1 0
become position bits 2 1 3 0::

    token     0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
    position  0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.dispatch import Form, interpreted
from thrift_attn.kernels.groups import store_columns, store_rest, store_rows
from thrift_attn.kernels.rounding import bits, cut, from_bits
from thrift_attn.prefill.statistics import NO_LEVELS
from thrift_attn.reference.channel_scales import Fit
from thrift_attn.reference.formats import FORMATS, RESIDUALS
from thrift_attn.seq_layout import Sequences


class PackedKV(NamedTuple):
    """K and V as `quantise_kv` writes them; absent parts are None. ``centres`` is c_b ``[P, Hkv, N, D]``, 16-bit.

    ``k_rest`` and ``v_rest`` are what a nested plane adds to ``k`` and ``v``, wide. ``others``, where the first token of a
    sequence is exact, is the mean of its block without it ``[B, Hkv, D]``, 16-bit.
    """

    centres: Tensor
    k: Tensor | None = None
    k_scale: Tensor | None = None
    v: Tensor | None = None
    v_scale: Tensor | None = None
    k_rest: Tensor | None = None
    v_rest: Tensor | None = None
    others: Tensor | None = None


class PackedQ(NamedTuple):
    """Q as `quantise_q` writes it: mean queries float32 ``[P, Hq, R, D]``; codes and scales like those of K, or None.

    ``sink``, where the first token is exact, is the product of its key with every query, float32 ``[P, Hq, R*64]``, unscaled.
    """

    means: Tensor
    q: Tensor | None = None
    q_scale: Tensor | None = None
    sink: Tensor | None = None


def position_of(tokens: int) -> Tensor:
    """Where a token lies in native e4m3 V: int64 ``[tokens]``, in the order of tokens.

    Args:
        tokens: a multiple of 16.
    """
    t = torch.arange(tokens)
    return (t & ~15) | (t & 1) | ((t & 8) >> 2) | ((t & 6) << 1)


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
    RAGGED: tl.constexpr,  # all sequences in one part
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
    span = spans_ptr + b * 6
    start, length = tl.load(span + 2), tl.load(span + 3)
    if n * 64 < length:
        block = n + tl.load(span + 5)
        part = (b * (not RAGGED)).to(tl.int64)
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
                    token = (token & 0x31) | ((token & 2) << 2) | ((token & 12) >> 1)
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
    RAGGED: tl.constexpr,
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
    span = spans_ptr + b * 6
    start, length = tl.load(span), tl.load(span + 1)
    offset = length - length
    if CAUSAL:
        offset = tl.load(span + 3) - length
    first = ((offset >> 6) + r) * 64 - offset  # query of the row's first position; >> rounds down
    if first < length:
        part = (b * (not RAGGED)).to(tl.int64)
        head = part * HQ + h
        at = head * rows + r + tl.load(span + 4)
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
            block = (part * HKV + h // (HQ // HKV)) * blocks + tl.load(span + 5)
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


def _check(low: str, form: Form, dim: int) -> None:
    if form not in ("wide", "native"):
        raise ValueError(f"form must be 'wide' or 'native', got {form!r}")
    group = FORMATS[low].group
    if group is not None and dim % group:
        raise ValueError(f"{low} needs a head dim that is a multiple of {group}, got {dim}")


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
    RAGGED: tl.constexpr,
    SINK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Largest magnitude of V of every head and sequence; ``BLOCKS`` blocks of 64 tokens a program."""
    n = tl.program_id(0) * BLOCKS
    h = tl.program_id(1)
    b = tl.program_id(2)
    start, length = tl.load(spans_ptr + b * 6 + 2), tl.load(spans_ptr + b * 6 + 3)
    if n * 64 < length:
        d = tl.arange(0, DP)[None, :]
        at = v_ptr + (b * (not RAGGED)).to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
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


def _peaks(v: Tensor, sequences: Sequences, sink: bool) -> Tensor:
    """Largest magnitude of V, float32 ``[B, Hkv]``, the first token left out if ``sink``; NaN where one is not finite."""
    heads, dim = v.shape[1], v.shape[3]
    peaks = torch.zeros(sequences.batch, heads, dtype=torch.float32, device=v.device)
    peaks_kernel[(triton.cdiv(sequences.most_blocks, 8), heads, sequences.batch)](
        *(v, sequences.spans, peaks), *v.stride()[:3],
        HKV=heads, D=dim, DP=triton.next_power_of_2(dim), RAGGED=sequences.parts == 1, SINK=sink, BLOCKS=8,
    )  # fmt: skip
    return peaks


def _warps(width: int) -> int:
    """Enough lanes that nothing spills."""
    return max(4, width // 32)


def _tokens(low: str | None) -> int:
    """Tokens of a block that are quantised at a time: a group, of which two candidates are held, or what has one scale."""
    return (FORMATS[low].group if low in FORMATS else None) or BLOCK


def _casts(device: torch.device) -> bool:
    """Whether the device converts to e4m3 in hardware."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (8, 9)


def _planes(low: str, form: Form, shape: tuple[int, int, int], dim: int, turned: bool, like: Tensor):
    """Empty packed data and scales of ``shape`` = (parts, heads, blocks); ``turned`` for V."""
    parts, heads, blocks = shape
    fmt = FORMATS[low]

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(parts, heads, *size, dtype=dtype, device=like.device)

    scale = empty(blocks, dtype=torch.float32) if fmt.group is None else None
    if form == "wide":
        return empty(blocks * BLOCK, dim, dtype=like.dtype), scale
    if fmt.group is None:
        size = (dim, blocks * BLOCK) if turned else (blocks * BLOCK, dim)
        return empty(*size, dtype=torch.float8_e4m3fn), scale
    sizes = [
        (dim, blocks * BLOCK // n) if turned else (blocks * BLOCK, dim // n) for n in (2, fmt.group)
    ]  # codes, scales
    return empty(*sizes[0], dtype=torch.uint8), empty(*sizes[1], dtype=torch.uint8)


def quantise_kv(
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    low: str,
    form: Form,
    rest: str | None = None,
    centred: bool = True,
    sink: bool = False,
    best: bool = True,
    levels: Fit = NO_LEVELS,
    key_bias: Tensor | None = None,
) -> PackedKV:
    """Centre and quantise K and V.

    Args:
        k: 16-bit ``[B, Hkv, Tk, D]``, or ``[1, Hkv, tokens, D]`` for sequences end to end; contiguous in D.
        v: likewise.
        sequences: how they lie.
        low: ``"nvfp4"``, ``"mxfp4"`` or ``"fp8"``; ``"drop"`` for the centres alone.
        form: ``"wide"`` or ``"native"``, see above.
        rest: ``"nested"`` or ``"nested8"``: also write what the residual plane decodes to. Wide 4-bit formats only.
        centred: quantise K - c_b; else K itself.
        sink: c_0 is the first key of a sequence and its value counts as zero, both being exact elsewhere. Needs ``centred``.
        best: keep the better of the format's scales for each group.
        levels: of `thrift_attn.prefill.statistics.measure`; with mean queries goes ``key_bias``. Of 4-bit formats
        powers of two of
            K and V as well: native data keep them, of wide data they are taken out again.
        key_bias: bfloat16 ``[P, Hq, N, 3, 64]``, written where K is: the product of the mean query with each k - c_b, in
            float32 and cut into three parts, whose sum it is.

    Returns:
        `PackedKV`. Blocks beyond the end of a sequence, and elements beyond the end of its last block, are not written,
        or are zero.

    Raises:
        ValueError: a head dim that is no multiple of the group, an unknown form, powers of two of another format.
        NotImplementedError: a residual plane of native or fp8 data.
    """
    _, heads, _, dim = k.shape
    shape = (sequences.parts, heads, sequences.blocks)
    centres = torch.empty(*shape, dim, dtype=k.dtype, device=k.device)
    out = PackedKV(centres)
    if low != "drop":
        _check(low, form, dim)
        if levels.keys is not None and (low == "nvfp4") != (levels.values is not None):
            raise ValueError(f"powers of two of V go with nvfp4 alone, got base_format={low!r}")
        if rest is not None and (form == "native" or low == "fp8"):
            raise NotImplementedError(f"promoted_storage={rest!r} is decoded from wide 4-bit data, got {form} {low}")
        out = PackedKV(
            centres,
            *_planes(low, form, shape, dim, False, k),
            *_planes(low, form, shape, dim, True, k),
            *(_planes("nvfp4", "wide", shape, dim, False, k)[0] if rest else None for _ in range(2)),
            torch.empty(sequences.batch, heads, dim, dtype=k.dtype, device=k.device) if sink else None,
        )
    width = triton.next_power_of_2(dim)
    of_values = _peaks(v, sequences, sink) if low == "fp8" else levels.values
    quantise_kv_kernel[(sequences.most_blocks, heads, sequences.batch)](
        k,
        v,
        sequences.spans,
        centres,
        *(centres if x is None else x for x in out[1:]),
        *(centres if x is None else x for x in (levels.mean, key_bias, levels.keys, of_values)),
        *(x.stride(i) for x in (k, v) for i in range(3)),
        sequences.blocks,
        HKV=heads,
        GROUP=0 if levels.mean is None else levels.mean.shape[1] // heads,
        D=dim,
        DP=width,
        RAGGED=sequences.parts == 1,
        LOW=low,
        REST="none" if rest is None else RESIDUALS[rest].name,
        CENTRED=centred,
        SINK=sink and low != "drop",
        BALANCED=levels.keys is not None,
        BEST=best,
        NATIVE=form == "native",
        TOKENS=_tokens(low),
        CAST=_casts(k.device),
        num_warps=_warps(width),
    )
    return out


def quantise_q(
    q: Tensor,
    sequences: Sequences,
    *,
    low: str | None,
    form: Form,
    best: bool = True,
    levels: Fit = NO_LEVELS,
    centres: Tensor | None = None,
) -> PackedQ:
    """Mean queries of every row, and Q quantised.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``, or ``[1, Hq, tokens, D]`` for sequences end to end; contiguous in D.
        sequences: how they lie.
        low: the format; None writes the means alone.
        form: as of K.
        best: keep the better of the format's scales for each group.
        levels: of `thrift_attn.prefill.statistics.measure`: Q is quantised less its mean and divided by the powers
        of two of K; wide
            data are multiplied by them again.
        centres: c_b ``[P, Hkv, N, D]`` of `quantise_kv`, where c_0 is the first key: its logits are written as well.

    Returns:
        `PackedQ`. Queries before position 0 count as missing; missing queries of a row are zero.

    Raises:
        ValueError: a head dim that is no multiple of the group, an unknown form.
    """
    _, heads, _, dim = q.shape
    shape = (sequences.parts, heads, sequences.rows)
    means = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
    out = PackedQ(means)
    if low is not None:
        _check(low, form, dim)
        out = PackedQ(means, *_planes(low, form, shape, dim, False, q))
    if centres is not None:
        sink = torch.empty(*shape[:2], sequences.rows * BLOCK, dtype=torch.float32, device=q.device)
        out = out._replace(sink=sink)
    width = triton.next_power_of_2(dim)
    quantise_q_kernel[(sequences.most_rows, heads, sequences.batch)](
        q,
        sequences.spans,
        means,
        *(means if x is None else x for x in out[1:]),
        *(means if x is None else x for x in (centres, levels.mean, levels.keys)),
        *q.stride()[:3],
        sequences.rows,
        sequences.blocks,
        HQ=heads,
        HKV=next((x.shape[1] for x in (centres, levels.keys) if x is not None), heads),
        D=dim,
        DP=width,
        CAUSAL=sequences.causal,
        RAGGED=sequences.parts == 1,
        LOW=low or "none",
        SINK=centres is not None,
        REDUCED=levels.mean is not None,
        BALANCED=levels.keys is not None,
        BEST=best,
        NATIVE=form == "native",
        TOKENS=_tokens(low),
        CAST=_casts(q.device),
        num_warps=_warps(width),
    )
    return out
