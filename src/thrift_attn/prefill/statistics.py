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
from thrift_attn.prefill.statistics_kernel import levels_kernel, sum_keys_kernel, sum_queries_kernel
from thrift_attn.reference.channel_scales import SAMPLE, CallStatistics
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
    width, most = triton.next_power_of_2(dim), max(1, SAMPLE // BLOCK)
    meta = {"D": dim, "DP": width}
    parts = {"ONE_PART": layout.packed_batch == 1}

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.float32, device=q.device)

    of_keys = triton.next_power_of_2(min(most, layout.max_blocks)) if numerics.channel_scales else 0
    of_queries = triton.next_power_of_2(min(most, layout.max_rows)) if numerics.subtract_query_mean else 0
    statistics = CallStatistics(
        empty(heads, dim) if numerics.subtract_query_mean else None,
        empty(kv_heads, dim) if numerics.channel_scales else None,
        empty(kv_heads) if numerics.v_head_scales else None,
    )
    squares = totals = sums = empty(1)
    if numerics.channel_scales:
        squares, totals = empty(kv_heads, of_keys, width), empty(kv_heads, of_keys, 2)
        launch(
            sum_keys_kernel,
            (of_keys, kv_heads, batch),
            *(k, v, layout.spans, squares, totals),
            *(*k.stride()[:3], *v.stride()[:3], most),
            **{"HKV": kv_heads, "S": of_keys, "CENTRED": numerics.centred, **meta, **parts},
        )
    if numerics.subtract_query_mean:
        sums = empty(heads, of_queries, width)
        launch(
            sum_queries_kernel,
            (of_queries, heads, batch),
            *(q, layout.spans, sums),
            *(*q.stride()[:3], most * BLOCK),
            **{"HQ": heads, "S": of_queries, "CAUSAL": layout.causal, **meta, **parts},
        )
    launch(
        levels_kernel,
        (kv_heads, batch),
        *(layout.spans, squares, totals, sums),
        *(sums if x is None else x for x in statistics),
        *(most, most * BLOCK, DECODE_ROWS),
        HKV=kv_heads,
        GROUP=heads // kv_heads,
        SK=of_keys,
        SQ=of_queries,
        CAUSAL=layout.causal,
        LESS_MEAN=numerics.subtract_query_mean,
        BALANCED=numerics.channel_scales,
        OF_VALUES=numerics.v_head_scales,
        **meta,
    )
    return statistics
