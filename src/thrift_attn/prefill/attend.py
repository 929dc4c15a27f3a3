"""Launches the attention kernel of prefill (`thrift_attn.prefill.attend_kernel`) with settings for the GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.dispatch import Form, interpreted
from thrift_attn.kernels.launcher import launch
from thrift_attn.kernels.online_softmax import LOG2E
from thrift_attn.prefill.attend_kernel import attend_prefill_kernel
from thrift_attn.prefill.pack import PackedKV, PackedQ, casts_to_e4m3
from thrift_attn.seq_layout import Sequences


class Tuning(NamedTuple):
    """How a program works: query rows, tokens at a time, warps, loop stages, blocks whose q.c_b is worked out at a time,
    and the most columns of the output; where there are more, several programs work out the same P.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    centres: int = 16
    columns: int = 256


def tuning(dim: int, low: str, form: Form, capability: tuple[int, int]) -> Tuning:
    """Settings for a head dim and a GPU of this compute capability.

    Shared memory is 100 KB on 8.6, 8.9 and 12.x; block-scaled products have 128 rows on 10.x. Timed on 9.0 alone, the others
    are chosen so that little or nothing spills (`thrift bench compile`).
    """
    small = capability in ((8, 6), (8, 9), (12, 0), (12, 1))
    fp4 = form == "native" and low != "fp8"
    if capability[0] == 10 and (fp4 or dim <= 128):
        stages = 2 if dim == 64 or (dim == 128 and not fp4) else 1
        return Tuning(128, 64, 8, stages, columns=128)
    if fp4:
        warps, stages = 4 if dim <= 64 and low == "nvfp4" else 8, 1 if dim > 128 else 2
        return Tuning(64, 64, warps, stages, 16 if dim == 64 else 8, 128)
    if dim > 128:
        return Tuning(64, 32, 8, 1 if small else 2)
    # On 9.0 the product of 8 centres is no `wgmma`: one in a branch made ptxas wait after each of the others at head dim 64.
    return Tuning(64, 64, 8 if capability[0] == 12 else 4, 2, 8 if dim == 64 else 16)


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
        key_bias: bfloat16 ``[P, Hq, N, 3, 64]`` of `quantise_kv`, when packed Q lacks the mean query; else None.
        values: float32 ``[B, Hkv]``, the powers of two of V that data were packed with, see
        `thrift_attn.prefill.statistics`. Those
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
        raise NotImplementedError("native low-precision products need quantised Q and P, compute='fp4'")
    heads, dim = q.shape[1], q.shape[3]
    rest = packed.k_rest is not None
    portable = interpreted()
    capability = (0, 0) if portable else torch.cuda.get_device_capability(q.device)
    tuned = tuned or tuning(dim, low, form, capability)
    fill = packed.centres
    width = triton.next_power_of_2(dim)
    columns = min(width, tuned.columns)
    grid = (-(-sequences.most_rows // (tuned.rows // BLOCK)), heads * (width // columns), sequences.batch)
    launch(
        attend_prefill_kernel,
        grid,
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
        max(scale * LOG2E, 1e-30),  # above 0 in float32: hidden logits are -inf times this
        HQ=heads,
        HKV=k.shape[1],
        D=dim,
        DP=width,
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
        COLUMNS=columns,
        CENTRES=tuned.centres,
        STAGES=tuned.stages,
        CAST=casts_to_e4m3(q.device),
        PORTABLE=portable,
        num_warps=tuned.warps,
        num_stages=tuned.stages,
    )
