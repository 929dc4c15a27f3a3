"""Launches the attention kernel of prefill (`thrift_attn.prefill.attend_kernel`) with settings for the GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.dispatch import Form, interpreted
from thrift_attn.kernels.arithmetic import LOG2E
from thrift_attn.kernels.launcher import check_rows, launch
from thrift_attn.prefill.attend_kernel import attend_prefill_kernel
from thrift_attn.prefill.bundles import BlockLists, KernelNumerics, LogitRules, PrefillOutput, PrefillTensors
from thrift_attn.prefill.pack import PackedKV, PackedQ, casts_to_e4m3
from thrift_attn.seq_layout import SeqLayout


class Tuning(NamedTuple):
    """How a program works: query rows, tokens at a time, warps, loop stages, blocks whose q.c_b is worked out at a time,
    and the most columns of the output; where there are more, several programs work out the same P.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    means: int = 16
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
    # On 9.0 the product of 8 means is no `wgmma`: one in a branch made ptxas wait after each of the others at head dim 64.
    return Tuning(64, 64, 8 if capability[0] == 12 else 4, 2, 8 if dim == 64 else 16)


def attend_prefill(
    tensors: PrefillTensors,
    *,
    packed_q: PackedQ,
    packed_kv: PackedKV,
    lists: BlockLists,
    layout: SeqLayout,
    numerics: KernelNumerics,
    rules: LogitRules,
    into: PrefillOutput,
    v_head_scale: Tensor | None = None,
    tuned: Tuning | None = None,
) -> None:
    """Attend to low-precision blocks and promoted ones.

    Args:
        tensors: of the call.
        packed_q: Q in the base format if ``numerics.quantise_qp``; with logits of the first token, that one is attended
            exactly. With a ``key_bias`` of K, Q lacks its mean.
        packed_kv: K and V in the base format, then without the first token; with a residual plane, promoted blocks are read
            from it and not from the 16-bit K and V.
        lists: the promoted blocks.
        layout: how the sequences lie.
        numerics: what is computed.
        rules: scale, window and softcap.
        into: where the results are written; the high fraction if there is room for it.
        v_head_scale: float32 ``[B, Hkv]``, the powers of two that V was packed with, see `thrift_attn.prefill.statistics`;
            they are taken out of native data here. Those of Q and K cancel out, and decoded data lack them already.
        tuned: settings to use in place of `tuning`.

    Raises:
        NotImplementedError: native data without quantised Q.
        ValueError: tensors that are not contiguous in their last dimension.
    """
    q, k, v = tensors
    check_rows(q=q, k=k, v=v, out=into.out, lse=into.lse)
    base, native = numerics.base_format, numerics.form == "native"
    if native and not numerics.quantise_qp and base != "drop":
        raise NotImplementedError("native low-precision products need quantised Q and P, compute='fp4'")
    heads, dim = q.shape[1], q.shape[3]
    portable = interpreted()
    tuned = tuned or tuning(
        dim, base, numerics.form, (0, 0) if portable else torch.cuda.get_device_capability(q.device)
    )
    unused = packed_kv.k_block_mean
    width = triton.next_power_of_2(dim)
    columns = min(width, tuned.columns)
    with_fraction = into.high_fraction.numel() > 0
    launch(
        attend_prefill_kernel,
        (-(-layout.max_q_blocks // (tuned.rows // BLOCK)), heads * (width // columns), layout.batch),
        *(q, k, v, layout.spans),
        *(unused if x is None else x for x in (packed_q.q, packed_q.q_scale)),
        *(unused if x is None else x for x in packed_kv[1:7]),  # k, v, their scales and residuals
        packed_kv.k_block_mean,
        *(unused if x is None else x for x in (packed_kv.key_bias, v_head_scale)),
        *lists,
        *(into.out, into.lse, into.high_fraction if with_fraction else into.lse),
        into.lse if packed_q.sink_logits is None else packed_q.sink_logits,
        *(x.stride(i) for x in (q, k, v, into.out) for i in range(3)),
        *into.lse.stride()[:2],
        layout.max_q_blocks,
        lists.block_indices.shape[2],
        packed_kv.k_block_mean.shape[2],
        lists.block_indices.shape[3],
        rules.window or 0,
        max(rules.scale * LOG2E, 1e-30),  # above 0 in float32: hidden logits are -inf times this
        HQ=heads,
        HKV=k.shape[1],
        D=dim,
        DP=width,
        CAUSAL=layout.causal,
        ONE_BATCH=layout.packed_batch == 1,
        WINDOW=rules.window is not None,
        CAP=(rules.softcap or 0.0) * LOG2E,
        FORMAT=base,
        QUANTISE_QP=numerics.quantise_qp,
        NATIVE=native,
        CENTRED=numerics.centred,
        KEY_BIAS=packed_kv.key_bias is not None,
        V_SCALED=v_head_scale is not None and native,
        NORMALIZE_ROUNDED=numerics.normalize_rounded,
        RESIDUAL=packed_kv.k_residual is not None,
        HIGH_FRACTION=with_fraction,
        SINK=packed_q.sink_logits is not None,
        BM=tuned.rows,
        BN=tuned.tokens,
        COLUMNS=columns,
        MEANS=tuned.means,
        STAGES=tuned.stages,
        CAST=casts_to_e4m3(q.device),
        PORTABLE=portable,
        num_warps=tuned.warps,
        num_stages=tuned.stages,
    )
