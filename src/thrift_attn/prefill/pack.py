"""Quantise for prefill: one pass over K and V, one over Q. The bytes are those of `thrift_attn.reference.quantize.quantise`.

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
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.dispatch import Form, interpreted
from thrift_attn.kernels.launcher import launch
from thrift_attn.prefill.pack_kernel import peaks_kernel, quantise_kv_kernel, quantise_q_kernel
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


def _check(low: str, form: Form, dim: int) -> None:
    if form not in ("wide", "native"):
        raise ValueError(f"form must be 'wide' or 'native', got {form!r}")
    group = FORMATS[low].group
    if group is not None and dim % group:
        raise ValueError(f"{low} needs a head dim that is a multiple of {group}, got {dim}")


def _peaks(v: Tensor, sequences: Sequences, sink: bool) -> Tensor:
    """Largest magnitude of V, float32 ``[B, Hkv]``, the first token left out if ``sink``; NaN where one is not finite."""
    heads, dim = v.shape[1], v.shape[3]
    peaks = torch.zeros(sequences.batch, heads, dtype=torch.float32, device=v.device)
    launch(
        peaks_kernel,
        (triton.cdiv(sequences.most_blocks, 8), heads, sequences.batch),
        *(v, sequences.spans, peaks), *v.stride()[:3],
        HKV=heads, D=dim, DP=triton.next_power_of_2(dim), RAGGED=sequences.parts == 1, SINK=sink, BLOCKS=8,
    )  # fmt: skip
    return peaks


def warps_for(width: int) -> int:
    """Enough lanes that nothing spills."""
    return max(4, width // 32)


def tokens_at_a_time(low: str | None) -> int:
    """Tokens of a block that are quantised at a time: a group, of which two candidates are held, or what has one scale."""
    return (FORMATS[low].group if low in FORMATS else None) or BLOCK


def casts_to_e4m3(device: torch.device) -> bool:
    """Whether the device converts to e4m3 in hardware."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (8, 9)


def _planes(
    low: str, form: Form, shape: tuple[int, int, int], dim: int, turned: bool, like: Tensor
) -> tuple[Tensor, Tensor | None]:
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
        (k_data, k_scale), (v_data, v_scale) = (_planes(low, form, shape, dim, turned, k) for turned in (False, True))
        k_rest, v_rest = (_planes("nvfp4", "wide", shape, dim, False, k)[0] if rest else None for _ in range(2))
        others = torch.empty(sequences.batch, heads, dim, dtype=k.dtype, device=k.device) if sink else None
        out = PackedKV(centres, k_data, k_scale, v_data, v_scale, k_rest, v_rest, others)
    width = triton.next_power_of_2(dim)
    of_values = _peaks(v, sequences, sink) if low == "fp8" else levels.values
    launch(
        quantise_kv_kernel,
        (sequences.most_blocks, heads, sequences.batch),
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
        TOKENS=tokens_at_a_time(low),
        CAST=casts_to_e4m3(k.device),
        num_warps=warps_for(width),
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
    launch(
        quantise_q_kernel,
        (sequences.most_rows, heads, sequences.batch),
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
        TOKENS=tokens_at_a_time(low),
        CAST=casts_to_e4m3(q.device),
        num_warps=warps_for(width),
    )
    return out
