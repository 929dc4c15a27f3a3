"""Split-KV attention over two-precision pages; `thrift_attn.decode.combine_splits` combines the splits."""

from __future__ import annotations

from typing import NamedTuple

import triton

from thrift_attn.decode.attend_each_kernel import attend_each_kernel
from thrift_attn.decode.attend_kernel import attend_split_kernel
from thrift_attn.decode.tensors import DecodeStep, padded_queries, row_strides
from thrift_attn.dispatch import interpreted
from thrift_attn.kernels.arithmetic import LOG2E
from thrift_attn.kernels.launcher import check_planes, launch, on_device_of
from thrift_attn.reference.page_layout import HIGH, TILE, plane_size


def chunks(head_dim: int, largest: int) -> tuple[tuple[int, int], ...]:
    """How the tiles of a head are handled: (first tile, number of tiles), the numbers powers of two, none above ``largest``."""
    out, at, tiles = [], 0, head_dim // TILE
    while at < tiles:
        size = min(largest, 1 << ((tiles - at).bit_length() - 1))
        out.append((at, size))
        at += size
    return tuple(out)


def column_tile(group: int, tq: int, head_dim: int) -> int:
    """Query columns of one program: 8, or 16 where there are that many and the output of all of them fits the registers."""
    return 8 if group * padded_queries(tq) <= 8 or head_dim > 128 else 16


class Tuning(NamedTuple):
    """What was found to compile to fast code that does not spill.

    Args:
        maxnreg: registers per thread: 168 lets 12 programs run on a multiprocessor of 64k registers, 255 lets 8.
        chunk: tiles that are widened at a time: fewer need fewer registers, more are compiled faster.
    """

    maxnreg: int
    chunk: int

    @property
    def programs(self) -> int:
        """Programs (of one warp) that a multiprocessor runs at a time; its registers are dealt out in four equal parts."""
        return 4 * (16384 // (32 * -(-self.maxnreg // 8) * 8))


def tuning(head_dim: int, tile: int, masked: bool, plane: str | None) -> Tuning:
    """Registers and chunk for a head dimension, column tile, partly visible blocks, and plane of high precision."""
    if head_dim > 128:
        return Tuning(255, 4 if plane == "16bit" else 2)
    if tile > 8:
        return Tuning(255, 4)
    return Tuning(168, 2 if masked else 4)


SINGLE_BLOCKS = 128
"""Up to so many blocks of a sequence are attended by one program each."""


def a_program_each(max_blocks: int, batch: int, kv_heads: int, row_tiles: int, max_programs: int) -> bool:
    """Whether all blocks of a step get a program of their own that finds out what to do with it, and all run at a time.

    Args:
        max_blocks: see `choose_splits`.
        batch: likewise.
        kv_heads: likewise.
        row_tiles: likewise.
        max_programs: likewise, with the programs of `tuning_each`.
    """
    return max_blocks <= SINGLE_BLOCKS and max_blocks * batch * kv_heads * row_tiles <= max_programs


def choose_splits(max_blocks: int, batch: int, kv_heads: int, row_tiles: int, max_programs: int) -> int:
    """Splits per (sequence, KV head) such that no more than ``max_programs`` programs run.

    A short sequence is a matter of latency: every block gets a program, up to `SINGLE_BLOCKS` of them. Beyond, two blocks a
    program save what the combination of more splits would cost (docs/log.md). Lengths are not known here: a longer table never
    means fewer splits, and those that a sequence has no work for end at once.

    Args:
        max_blocks: most blocks of a sequence.
        batch: B.
        kv_heads: Hkv.
        row_tiles: programs that share a split: padded rows over `column_tile`.
        max_programs: programs the device runs at a time: its multiprocessors times `Tuning.programs`.
    """
    useful = max(max_blocks // 2, min(max_blocks, SINGLE_BLOCKS))
    return max(1, min(max_programs // max(1, batch * kv_heads * row_tiles), useful, 1024))


def tuning_of(group: int, tq: int, head_dim: int, window: int | None, plane: str | None) -> Tuning:
    """`tuning` for a step of ``tq`` new tokens."""
    return tuning(head_dim, column_tile(group, tq, head_dim), tq > 1 or window is not None, plane)


def tuning_each(masked: bool) -> Tuning:
    """`tuning` for a program per block, which has all of its block in registers."""
    return Tuning(255, 2 if masked else 4)


def attend_pages(step: DecodeStep, *, tuned: Tuning | None = None) -> None:
    """Write ``partial_out`` and ``partial_lse``: attention over the listed pages and the incomplete block, in splits.

    Only the first length % 64 tokens of the incomplete block are read.

    Args:
        step: the step.
        tuned: registers and chunk, by default `tuning` or `tuning_each`.

    Raises:
        ValueError: pages that do not fit.
    """
    q, cache, numerics, scaled = step.q, step.cache, step.numerics, step.cache.k_channel_scale is not None
    tq, dim = step.tq, step.dim
    words = plane_size(dim, 4).words
    if cache.base.shape[2] != words:
        raise ValueError(f"expected base [*, {cache.kv_heads}, {words}] for D {dim}, got {list(cache.base.shape)}")
    check_planes(base=cache.base, high=cache.base if cache.high is None else cache.high)
    plane, tile = numerics.promoted_storage, column_tile(step.group, tq, dim)
    if tuned is None:
        tuned = (
            tuning_each(tq > 1 or step.window is not None)
            if step.one_each
            else tuning_of(step.group, tq, dim, step.window, plane)
        )
    grid = step.partial_out.shape[2], step.q_rows // tile, step.batch * cache.kv_heads
    pages = cache.base, cache.base if cache.high is None else cache.high
    found = step.partial_out, step.partial_lse
    scales = (cache.k_channel_scale, cache.v_head_scale) if scaled else (step.bias, step.bias)
    numbers = step.scale * LOG2E, *row_strides(q), step.window or 0, cache.max_blocks, tq
    common = {
        **cache.strides("base", "high"),
        **cache.ring_constants,
        "HKV": cache.kv_heads,
        "GROUP": step.group,
        "TQ": padded_queries(tq),
        "D": dim,
        "CHUNKS": chunks(dim, tuned.chunk),
        "N": tile,
        "RP": step.q_rows,
        "HIGH": HIGH[plane],
        "CENTRED": numerics.centred,
        "WINDOW": step.window is not None,
        "CAP": (step.softcap or 0.0) * LOG2E,
        "SCALED": scaled,
        "FIXED": cache.scales_fixed,
        "PACKED": step.starts is not None,
        "PORTABLE": interpreted(),
        "OVERLAP": step.overlap,
        "launch_pdl": step.overlap,
        "num_warps": 1,
        "num_stages": 1,
        "maxnreg": tuned.maxnreg,
    }
    with on_device_of(q):
        if step.one_each:
            launch(
                attend_each_kernel,
                grid,
                q,
                q if step.starts is None else step.starts,
                *pages,
                cache.k_block_mean,
                cache.tail,
                cache.rings,
                step.scores,
                step.bias,
                cache.page_table,
                cache.budget,
                cache.lengths,
                *found,
                *scales,
                *numbers,
                **cache.strides("mean"),
                **common,
                FIRST=numerics.force_first,
                LAST=numerics.force_last,
                PAD=max(32, triton.next_power_of_2(cache.max_blocks)),
                SCORED=step.scored,
            )
            return
        launch(
            attend_split_kernel,
            grid,
            q,
            q if step.starts is None else step.starts,
            *pages,
            cache.tail,
            cache.rings,
            step.bias,
            step.block_indices,
            step.block_counts,
            cache.lengths,
            *found,
            *scales,
            *numbers,
            **common,
            POOLED=cache.residents is not None,
        )
