"""Block scores q.c_b, on the device: part of every low-precision logit, and what blocks are promoted by."""

from __future__ import annotations

import triton

from thrift_attn.decode.score_kernel import block_scores_kernel
from thrift_attn.decode.tensors import WIDE_BLOCKS, DecodeStep, row_strides
from thrift_attn.dispatch import interpreted
from thrift_attn.kernels.arithmetic import LOG2E
from thrift_attn.kernels.launcher import check_planes, launch, on_device_of

BLOCKS_PER_PROGRAM = 64


def score_blocks(step: DecodeStep) -> None:
    """Write ``bias`` and ``scores`` of every complete block.

    The score of a block is the largest of its logits, over all new queries and the heads of the group
    (`thrift_attn.reference.budget.promoted_in_decode`).
    """
    q, cache, block0_mean = step.q, step.cache, step.block0_mean
    dim = step.dim
    check_planes(k_block_mean=cache.k_block_mean)
    grid = triton.cdiv(cache.max_blocks, BLOCKS_PER_PROGRAM), step.batch * cache.kv_heads
    with on_device_of(q):
        launch(
            block_scores_kernel,
            grid,
            q,
            q if step.starts is None else step.starts,
            cache.k_block_mean,
            cache.page_table,
            cache.lengths,
            step.bias,
            step.scores,
            q if block0_mean is None else block0_mean,
            step.first_scores,
            step.score_lse,
            step.scale * LOG2E,
            *row_strides(q),
            cache.max_blocks,
            step.tq,
            **cache.strides("mean", "first"),
            FIRST_IN_PAGE=cache.first_in_page,
            HKV=cache.kv_heads,
            GROUP=step.group,
            D=dim,
            DP=triton.next_power_of_2(dim),
            N=16 if step.q_rows % 16 == 0 else 8,
            RP=step.q_rows,
            BM=BLOCKS_PER_PROGRAM,
            SINK=block0_mean is not None,
            POOLED=cache.residents is not None,
            ONE=step.tq == 1,
            PACKED=step.starts is not None,
            WIDE=cache.max_blocks > WIDE_BLOCKS,
            PORTABLE=interpreted(),
            OVERLAP=step.overlap,
            launch_pdl=step.overlap,
            num_warps=4,
        )
