"""Combine what the splits of a decode step found.

A split leaves a normalised output and its LSE for every row of a KV head: a row is a query head of the group at one of the new
tokens, and their number is padded (`thrift_attn.decode.tensors.padded_rows`).

The V of an exact first token is missing from what the splits found, since no page holds it; its weight is in their sums. It is
added here.

Beside that, the step's query is added to the past mass of the blocks where that decides which keep their residual.
"""

from __future__ import annotations

import triton

from thrift_attn.decode.combine_splits_kernel import combine_splits_kernel
from thrift_attn.decode.tensors import DecodeStep, row_strides
from thrift_attn.kernels.arithmetic import LOG2E
from thrift_attn.kernels.launcher import launch, on_device_of

MASS_CHUNK = 512
"""Blocks whose past mass a program changes at a time."""


def combine_splits(step: DecodeStep) -> None:
    """Write ``out`` and ``lse`` from ``partial_out`` and ``partial_lse``, and add to the past mass of blocks.

    The first token is added where it is exact and its block is complete; its logit is the bias of block 0.
    """
    cache, out, sink, residents = step.cache, step.out, step.numerics.exact_sink, step.cache.residents
    pooled = residents is not None
    dim = step.dim
    num_splits = step.partial_out.shape[2]
    block_d = 32 if num_splits > 16 else min(triton.next_power_of_2(dim), 128)
    with on_device_of(out):
        launch(
            combine_splits_kernel,
            (step.group * step.tq + pooled, step.batch * cache.kv_heads, triton.cdiv(dim, block_d)),
            step.partial_out,
            step.partial_lse,
            out,
            step.lse,
            cache.lengths if step.starts is None else step.starts,
            cache.sink_value,
            step.bias,
            cache.lengths,
            step.first_scores,
            step.score_lse,
            residents.past_mass if residents is not None else step.bias,
            cache.page_table,
            residents.bounds if residents is not None else cache.lengths,
            *row_strides(out),
            num_splits,
            step.window or 0,
            cache.max_blocks,
            step.tq,
            **cache.strides("first"),
            FIRST_IN_PAGE=cache.first_in_page,
            HKV=cache.kv_heads,
            GROUP=step.group,
            D=dim,
            RP=step.q_rows,
            PAD=triton.next_power_of_2(num_splits),
            BLOCK_D=block_d,
            SINK=sink,
            WINDOW=sink and step.window is not None,
            CAP=(step.softcap or 0.0) * LOG2E if sink else 0.0,
            POOLED=pooled,
            CHUNK=MASS_CHUNK,
            PACKED=step.starts is not None,
            OVERLAP=step.overlap,
            launch_pdl=step.overlap,
            num_warps=4,
        )
