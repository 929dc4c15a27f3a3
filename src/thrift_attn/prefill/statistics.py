"""What `thrift_attn.reference.channel_scales.measure_call` takes from a call, on the device: many programs sum samples,
then one program a head.

Lengths are read on the device. Sums run in another order than in PyTorch: a power of two may differ by one step where an
exponent lies halfway, which changes nothing but 4-bit noise.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.kernels.launcher import check_rows, launch
from thrift_attn.prefill.bundles import KernelNumerics, PrefillTensors
from thrift_attn.prefill.statistics_kernel import channel_scales_kernel, sum_keys_kernel, sum_queries_kernel
from thrift_attn.reference import channel_scales
from thrift_attn.reference.channel_scales import CallStatistics
from thrift_attn.seq_layout import SeqLayout

NO_STATISTICS = CallStatistics()
"""No mean query, no scales."""


def measure(tensors: PrefillTensors, *, layout: SeqLayout, numerics: KernelNumerics) -> CallStatistics:
    """Take mean queries and powers of two from every sequence, see `thrift_attn.reference.channel_scales`.

    Args:
        tensors: of the call.
        layout: how the sequences lie.
        numerics: what is wanted.

    Returns:
        Statistics of all sequences ``[B, ...]``, float32, with the parts that are wanted; the mean query is 0 for sequences
        of up to `DECODE_ROWS` queries.

    Raises:
        ValueError: tensors that are not contiguous in D.
    """
    if not numerics.channel_scales and not numerics.subtract_query_mean:
        return NO_STATISTICS
    q, k, v = tensors
    check_rows(q=q, k=k, v=v)
    (_, heads, _, dim), kv_heads, batch = q.shape, k.shape[1], layout.batch
    width, max_blocks = triton.next_power_of_2(dim), max(1, channel_scales.SAMPLE // BLOCK)
    meta = {"D": dim, "DP": width}
    batch_of = {"ONE_BATCH": layout.packed_batch == 1}

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.float32, device=q.device)

    k_samples = triton.next_power_of_2(min(max_blocks, layout.max_blocks)) if numerics.channel_scales else 0
    q_samples = triton.next_power_of_2(min(max_blocks, layout.max_q_blocks)) if numerics.subtract_query_mean else 0
    statistics = CallStatistics(
        empty(heads, dim) if numerics.subtract_query_mean else None,
        empty(kv_heads, dim) if numerics.channel_scales else None,
        empty(kv_heads) if numerics.v_head_scales else None,
    )
    squares = totals = sums = empty(1)
    if numerics.channel_scales:
        squares, totals = empty(kv_heads, k_samples, width), empty(kv_heads, k_samples, 2)
        launch(
            sum_keys_kernel,
            (k_samples, kv_heads, batch),
            *(k, v, layout.spans, squares, totals),
            *(*k.stride()[:3], *v.stride()[:3], max_blocks),
            **{"HKV": kv_heads, "S": k_samples, "CENTRED": numerics.centred, **meta, **batch_of},
        )
    if numerics.subtract_query_mean:
        sums = empty(heads, q_samples, width)
        launch(
            sum_queries_kernel,
            (q_samples, heads, batch),
            *(q, layout.spans, sums),
            *(*q.stride()[:3], max_blocks * BLOCK),
            **{"HQ": heads, "S": q_samples, "CAUSAL": layout.causal, **meta, **batch_of},
        )
    launch(
        channel_scales_kernel,
        (kv_heads, batch),
        *(layout.spans, squares, totals, sums),
        *(sums if x is None else x for x in statistics),
        *(max_blocks, max_blocks * BLOCK, DECODE_ROWS),
        HKV=kv_heads,
        GROUP=heads // kv_heads,
        SK=k_samples,
        SQ=q_samples,
        CAUSAL=layout.causal,
        SUBTRACT_QUERY_MEAN=numerics.subtract_query_mean,
        CHANNEL_SCALES=numerics.channel_scales,
        V_HEAD_SCALES=numerics.v_head_scales,
        **meta,
    )
    return statistics
