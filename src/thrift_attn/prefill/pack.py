"""Quantise for prefill: one pass over K and V, one over Q. The bytes are those of `thrift_attn.reference.quantize.quantise`.

What is written depends on what multiplies it. Letters: P leading size, N blocks, R blocks of 64 queries
(`thrift_attn.seq_layout`), G elements per scale. ``decoded`` data are the decoded numbers in the dtype of K, which holds every
product of an element and a group scale (2 or 4 significant bits times 4), so ordinary 16-bit products compute what narrow
units would; fp8 keeps its float32 scale outside. (One exception: float16 has no numbers below 2^-24, which mxfp4 may encode.)

=======  ===========================  ==============  ==================================  ==============
form     k                            k_scale         v                                   v_scale
=======  ===========================  ==============  ==================================  ==============
decoded  16-bit [P, Hkv, N*64, D]     none, or fp8's  16-bit [P, Hkv, N*64, D]            none, or fp8's
native   e2m1 [P, Hkv, N*64, D/2]     [..., N*64, G]  e2m1 [P, Hkv, D, N*32], transposed  [..., D, N*64/G]
         e4m3 [P, Hkv, N*64, D]       f32 [..., N]    e4m3 [P, Hkv, D, N*64], transposed  f32 [..., N]
=======  ===========================  ==============  ==================================  ==============

Native e2m1 has the even element in the low nibble. Native e4m3 V has its tokens in the order of
`thrift_attn.kernels.token_order`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.dispatch import Form, interpreted
from thrift_attn.kernels.launcher import check_rows, launch
from thrift_attn.prefill.bundles import KernelNumerics
from thrift_attn.prefill.pack_kernel import peaks_kernel, quantise_kv_kernel, quantise_q_kernel
from thrift_attn.prefill.statistics import NO_STATISTICS
from thrift_attn.reference.channel_scales import CallStatistics
from thrift_attn.reference.formats import FORMATS, RESIDUALS
from thrift_attn.seq_layout import SeqLayout


class PackedKV(NamedTuple):
    """K and V as `quantise_kv` writes them; absent parts are None.

    Args:
        k_block_mean: c_b ``[P, Hkv, N, D]``, 16-bit; where the first token of a sequence is exact, c_0 is its key.
        k: see the table above.
        k_scale: likewise.
        v: likewise.
        v_scale: likewise.
        k_residual: what a nested plane adds to ``k``, decoded.
        v_residual: what it adds to ``v``.
        block0_mean: the mean of block 0 without an exact first token ``[B, Hkv, D]``, 16-bit.
        key_bias: the product of the mean query with each k - c_b, bfloat16 ``[P, Hq, N, 3, 64]``: a float32 cut into three
            parts, whose sum it is.
    """

    k_block_mean: Tensor
    k: Tensor | None = None
    k_scale: Tensor | None = None
    v: Tensor | None = None
    v_scale: Tensor | None = None
    k_residual: Tensor | None = None
    v_residual: Tensor | None = None
    block0_mean: Tensor | None = None
    key_bias: Tensor | None = None


class PackedQ(NamedTuple):
    """Q as `quantise_q` writes it; absent parts are None.

    Args:
        q_block_mean: mean queries float32 ``[P, Hq, R, D]``.
        q: codes, like those of K.
        q_scale: scales, like those of K.
        sink_logits: where the first token is exact, the product of its key with every query, float32 ``[P, Hq, R*64]``,
            unscaled.
    """

    q_block_mean: Tensor
    q: Tensor | None = None
    q_scale: Tensor | None = None
    sink_logits: Tensor | None = None


def _check(numerics: KernelNumerics, dim: int) -> None:
    """Raise where packed data of this form cannot be."""
    low, form = numerics.base_format, numerics.form
    if form not in ("decoded", "native"):
        raise ValueError(f"form must be 'decoded' or 'native', got {form!r}")
    group = FORMATS[low].group
    if group is not None and dim % group:
        raise ValueError(f"{low} needs a head dim that is a multiple of {group}, got {dim}")


def _head_peaks(v: Tensor, layout: SeqLayout, exact_sink: bool) -> Tensor:
    """Largest magnitude of V, float32 ``[B, Hkv]``, an exact first token left out; NaN where one is not finite."""
    heads, dim = v.shape[1], v.shape[3]
    peaks = torch.zeros(layout.batch, heads, dtype=torch.float32, device=v.device)
    launch(
        peaks_kernel,
        (triton.cdiv(layout.max_blocks, 8), heads, layout.batch),
        *(v, layout.spans, peaks),
        *v.stride()[:3],
        HKV=heads,
        D=dim,
        DP=triton.next_power_of_2(dim),
        ONE_BATCH=layout.packed_batch == 1,
        SINK=exact_sink,
        BLOCKS=8,
    )
    return peaks


def warps_for(width: int) -> int:
    """Return how many warps quantise rows of ``width`` numbers: enough that nothing spills."""
    return max(4, width // 32)


def tokens_at_a_time(base_format: str | None) -> int:
    """Return how many tokens of a block are quantised at a time: a group, of which two candidates are held, or what has one
    scale."""
    return (FORMATS[base_format].group if base_format in FORMATS else None) or BLOCK


def casts_to_e4m3(device: torch.device) -> bool:
    """Return whether the device converts to e4m3 in hardware."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (8, 9)


def _empty_plane(
    base_format: str, form: Form, shape: tuple[int, int, int], dim: int, like: Tensor, *, transposed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Empty packed data and scales of ``shape`` = (P, heads, blocks); ``transposed`` for V."""
    fmt, blocks = FORMATS[base_format], shape[2]

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape[:2], *size, dtype=dtype, device=like.device)

    scale = empty(blocks, dtype=torch.float32) if fmt.group is None else None
    if form == "decoded":
        return empty(blocks * BLOCK, dim, dtype=like.dtype), scale
    if fmt.group is None:
        size = (dim, blocks * BLOCK) if transposed else (blocks * BLOCK, dim)
        return empty(*size, dtype=torch.float8_e4m3fn), scale
    codes, scales = ((dim, blocks * BLOCK // n) if transposed else (blocks * BLOCK, dim // n) for n in (2, fmt.group))
    return empty(*codes, dtype=torch.uint8), empty(*scales, dtype=torch.uint8)


def _empty_kv(k: Tensor, layout: SeqLayout, numerics: KernelNumerics, q_heads: int | None) -> PackedKV:
    """Empty `PackedKV`, with ``key_bias`` if there are ``q_heads`` with mean queries."""
    heads, dim = k.shape[1], k.shape[3]
    shape = (layout.packed_batch, heads, layout.blocks)
    mean = torch.empty(*shape, dim, dtype=k.dtype, device=k.device)
    base, form = numerics.base_format, numerics.form
    if base == "drop":
        return PackedKV(mean)
    _check(numerics, dim)
    if numerics.residual is not None and (form == "native" or base == "fp8"):
        raise NotImplementedError(
            f"promoted_storage={numerics.residual!r} is decoded from decoded 4-bit data, got {form} {base}"
        )
    packed = PackedKV(
        mean,
        *_empty_plane(base, form, shape, dim, k),
        *_empty_plane(base, form, shape, dim, k, transposed=True),
    )  # pyright: ignore[reportCallIssue]
    if numerics.residual is not None:
        residuals = (_empty_plane("nvfp4", "decoded", shape, dim, k)[0] for _ in range(2))
        packed = packed._replace(**dict(zip(("k_residual", "v_residual"), residuals, strict=True)))
    if numerics.exact_sink:
        packed = packed._replace(block0_mean=torch.empty(layout.batch, heads, dim, dtype=k.dtype, device=k.device))
    if q_heads is not None:
        size = (layout.packed_batch, q_heads, layout.blocks, 3, BLOCK)
        packed = packed._replace(key_bias=torch.empty(size, dtype=torch.bfloat16, device=k.device))
    return packed


def quantise_kv(
    k: Tensor, v: Tensor, *, layout: SeqLayout, numerics: KernelNumerics, statistics: CallStatistics = NO_STATISTICS
) -> PackedKV:
    """Centre and quantise K and V.

    Args:
        k: 16-bit ``[B, Hkv, Tk, D]``, or ``[1, Hkv, tokens, D]`` for sequences end to end; contiguous in D.
        v: likewise.
        layout: how the sequences lie.
        numerics: what is written. An exact first token is the centre of its block and its value counts as zero; that needs
            ``centred``. A residual plane goes with decoded 4-bit formats only.
        statistics: of `thrift_attn.prefill.statistics.measure`. With mean queries goes a ``key_bias``. Scales of K and V are
            kept in native data, and taken out of decoded data again.

    Returns:
        `PackedKV`. Blocks beyond the end of a sequence, and elements beyond the end of its last block, are not written,
        or are zero.

    Raises:
        ValueError: a head dim that is no multiple of the group, an unknown form, scales of V with another format than nvfp4,
            K or V that are not contiguous in D.
        NotImplementedError: a residual plane of native or fp8 data.
    """
    check_rows(k=k, v=v)
    heads, dim = k.shape[1], k.shape[3]
    base = numerics.base_format
    query_mean, k_channel_scale, v_head_scale = statistics
    if k_channel_scale is not None and (base == "nvfp4") != (v_head_scale is not None):
        raise ValueError(f"scales of V go with base_format='nvfp4' and no other, got base_format={base!r}")
    q_heads = None if query_mean is None else query_mean.shape[1]
    packed = _empty_kv(k, layout, numerics, q_heads)
    unused = packed.k_block_mean
    per_head = _head_peaks(v, layout, numerics.exact_sink) if base == "fp8" else v_head_scale
    width = triton.next_power_of_2(dim)
    launch(
        quantise_kv_kernel,
        (layout.max_blocks, heads, layout.batch),
        *(k, v, layout.spans),
        *(unused if x is None else x for x in packed[:-1]),
        *(unused if x is None else x for x in (query_mean, packed.key_bias, k_channel_scale, per_head)),
        *(x.stride(i) for x in (k, v) for i in range(3)),
        layout.blocks,
        HKV=heads,
        GROUP=0 if q_heads is None else q_heads // heads,
        D=dim,
        DP=width,
        ONE_BATCH=layout.packed_batch == 1,
        FORMAT=base,
        RESIDUAL="none" if numerics.residual is None else RESIDUALS[numerics.residual].name,
        CENTRED=numerics.centred,
        SINK=numerics.exact_sink and base != "drop",
        CHANNEL_SCALES=k_channel_scale is not None,
        BEST_SCALES=numerics.best_scales,
        NATIVE=numerics.form == "native",
        TOKENS=tokens_at_a_time(base),
        CAST=casts_to_e4m3(k.device),
        num_warps=warps_for(width),
    )
    return packed


def quantise_q(
    q: Tensor,
    *,
    layout: SeqLayout,
    numerics: KernelNumerics,
    statistics: CallStatistics = NO_STATISTICS,
    k_block_mean: Tensor | None = None,
) -> PackedQ:
    """Mean queries of every row, and where ``numerics`` asks for it, Q quantised.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``, or ``[1, Hq, tokens, D]`` for sequences end to end; contiguous in D.
        layout: how the sequences lie.
        numerics: what is written.
        statistics: of `thrift_attn.prefill.statistics.measure`: Q is quantised less its mean and divided by the scales of K;
            decoded data are multiplied by them again.
        k_block_mean: of `quantise_kv`; needed for the logits of an exact first token, whose key is c_0.

    Returns:
        `PackedQ`. Queries before position 0 count as missing; missing queries of a row are zero.

    Raises:
        ValueError: a head dim that is no multiple of the group, an unknown form, Q that is not contiguous in D.
    """
    check_rows(q=q)
    heads, dim = q.shape[1], q.shape[3]
    base = numerics.base_format if numerics.quantise_qp and numerics.base_format != "drop" else None
    query_mean, k_channel_scale, _ = statistics
    shape = (layout.packed_batch, heads, layout.q_blocks)
    packed = PackedQ(torch.empty(*shape, dim, dtype=torch.float32, device=q.device))
    if base is not None:
        _check(numerics, dim)
        codes, scales = _empty_plane(base, numerics.form, shape, dim, q)
        packed = packed._replace(q=codes, q_scale=scales)
    if numerics.exact_sink and k_block_mean is not None:
        logits = torch.empty(*shape[:2], layout.q_blocks * BLOCK, dtype=torch.float32, device=q.device)
        packed = packed._replace(sink_logits=logits)
    sink = packed.sink_logits is not None
    unused = packed.q_block_mean
    kv_heads = next((x.shape[1] for x in (k_block_mean, k_channel_scale) if x is not None), heads)
    width = triton.next_power_of_2(dim)
    launch(
        quantise_q_kernel,
        (layout.max_q_blocks, heads, layout.batch),
        *(q, layout.spans),
        *(unused if x is None else x for x in packed),
        *(unused if x is None else x for x in (k_block_mean if sink else None, query_mean, k_channel_scale)),
        *q.stride()[:3],
        layout.q_blocks,
        layout.blocks,
        HQ=heads,
        HKV=kv_heads,
        D=dim,
        DP=width,
        CAUSAL=layout.causal,
        ONE_BATCH=layout.packed_batch == 1,
        FORMAT=base or "none",
        SINK=sink,
        SUBTRACT_QUERY_MEAN=query_mean is not None,
        CHANNEL_SCALES=k_channel_scale is not None,
        BEST_SCALES=numerics.best_scales,
        NATIVE=numerics.form == "native",
        TOKENS=tokens_at_a_time(base),
        CAST=casts_to_e4m3(q.device),
        num_warps=warps_for(width),
    )
    return packed
