"""What `thrift_attn.reference.channel_scales.fit` takes from a call, on the device: samples summed by many programs,
then one program a head.

Lengths are read on the device. Sums run in another order than in PyTorch: a power of two may differ by one step where an
exponent lies halfway, which changes nothing but 4-bit noise.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.kernels.launcher import launch
from thrift_attn.prefill.statistics_kernel import levels_kernel, sum_keys_kernel, sum_queries_kernel
from thrift_attn.reference import channel_scales as fit
from thrift_attn.seq_layout import Sequences

NO_LEVELS = fit.Fit()
"""Nothing is taken."""


def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    centred: bool,
    less_mean: bool,
    balanced: bool,
    of_values: bool = True,
) -> fit.Fit:
    """Mean queries and powers of two of every sequence, see `thrift_attn.reference.channel_scales`.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``, or ``[1, Hq, tokens, D]`` for sequences end to end; contiguous in D.
        k: ``[B, Hkv, Tk, D]`` likewise.
        v: likewise.
        sequences: how they lie.
        centred: whether K is quantised less its block means.
        less_mean: whether Q is quantised less its mean.
        balanced: whether powers of two are wanted.
        of_values: whether of V as well.

    Returns:
        `Fit` of all sequences ``[B, ...]``, float32, with the parts that are wanted; ``mean`` is 0 for those of up to
        `DECODE_ROWS` queries.
    """
    if not balanced and not less_mean:
        return NO_LEVELS
    (_, heads, _, dim), kv_heads, batch = q.shape, k.shape[1], sequences.batch
    width, most = triton.next_power_of_2(dim), max(1, fit.SAMPLE // BLOCK)
    meta = {"D": dim, "DP": width}

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.float32, device=q.device)

    of_keys = triton.next_power_of_2(min(most, sequences.most_blocks)) if balanced else 0
    of_queries = triton.next_power_of_2(min(most, sequences.most_rows)) if less_mean else 0
    levels = fit.Fit(
        empty(heads, dim) if less_mean else None,
        empty(kv_heads, dim) if balanced else None,
        empty(kv_heads) if balanced and of_values else None,
    )
    squares = totals = sums = empty(1)
    if balanced:
        squares, totals = empty(kv_heads, of_keys, width), empty(kv_heads, of_keys, 2)
        launch(
        sum_keys_kernel,
        (of_keys, kv_heads, batch),
            *(k, v, sequences.spans, squares, totals), *k.stride()[:3], *v.stride()[:3], most,
            HKV=kv_heads, S=of_keys, RAGGED=sequences.parts == 1, CENTRED=centred, **meta,
        )  # fmt: skip
    if less_mean:
        sums = empty(heads, of_queries, width)
        launch(
        sum_queries_kernel,
        (of_queries, heads, batch),
            *(q, sequences.spans, sums), *q.stride()[:3], most * BLOCK,
            HQ=heads, S=of_queries, CAUSAL=sequences.causal, RAGGED=sequences.parts == 1, **meta,
        )  # fmt: skip
    launch(
        levels_kernel,
        (kv_heads, batch),
        *(sequences.spans, squares, totals, sums), *(sums if x is None else x for x in levels),
        *(most, most * BLOCK, DECODE_ROWS),
        HKV=kv_heads, GROUP=heads // kv_heads, SK=of_keys, SQ=of_queries, CAUSAL=sequences.causal,
        LESS_MEAN=less_mean, BALANCED=balanced, OF_VALUES=of_values, **meta,
    )  # fmt: skip
    return levels
