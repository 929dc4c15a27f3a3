"""The choice of promoted blocks, on the device."""

from __future__ import annotations

import triton

from thrift_attn.decode.select_kernel import select_blocks_kernel, select_many_blocks_kernel
from thrift_attn.decode.tensors import WIDE_BLOCKS, DecodeStep
from thrift_attn.dispatch import interpreted
from thrift_attn.kernels.launcher import launch, on_device_of

HELD_BLOCKS = 16384
"""Most entries of a page table whose scores one program holds in registers; for more it reads them in every round."""

SHORT_BLOCKS = 1024
"""Blocks up to which a sequence in a page table of more than `WIDE_BLOCKS` entries is chosen among as in a short table."""

CHUNK = 4096
"""Blocks of a longer page table at a time."""


def _search_asm(keys: int) -> str:
    """PTX of the search for a threshold, one bit per round, by threads that hold ``keys`` keys each.

    All that a round waits for is a barrier that counts the threads whose predicate is true, one for every bit of a thread's own
    count. In: the keys and, for each, the wanted number; out: for each the threshold.
    """
    wanted = f"${2 * keys}"
    count = [line for i in range(keys) for line in (f"setp.ge.s32 p, ${keys + i}, trial;", "@p add.s32 own, own, 1;")]
    total = []
    for i in range(keys.bit_length()):
        total += [f"and.b32 part, own, {1 << i};", "setp.ne.b32 p, part, 0;", "bar.red.popc.u32 part, 0, p;"]
        total += [f"shl.b32 part, part, {i};", "add.s32 all, all, part;"]
    return "\n".join(
        [
            "{ .reg .pred p; .reg .b32 threshold, bit, trial, own, part, all;",
            "mov.b32 threshold, 0x80000000; mov.b32 bit, 0x80000000;",
            "next: xor.b32 trial, threshold, bit;",  # clears the sign first, then sets one bit after the other
            *("mov.b32 own, 0;", *count, "mov.b32 all, 0;", *total),
            f"setp.ge.s32 p, all, {wanted}; @p mov.b32 threshold, trial; shr.u32 bit, bit, 1;",
            f"setp.ne.s32 p, all, {wanted}; setp.ne.and.b32 p, bit, 0, p; @p bra.uni next;",
            *(f"mov.b32 ${i}, threshold;" for i in range(keys)),
            "}",
        ]
    )


def _registers(keys: int) -> str:
    """Registers of `_search_asm`."""
    return ",".join(["=r"] * keys + ["r"] * (2 * keys))


def select_blocks(step: DecodeStep) -> None:
    """Write ``block_indices`` and ``block_counts``: forced blocks first, then the highest scores, ties to the lower index.

    The rule is that of `thrift_attn.reference.budget.promoted_in_decode`, among the blocks that have a residual.
    """
    cache, numerics, residents = step.cache, step.numerics, step.cache.residents
    batch, kv_heads, capacity = step.scores.shape
    slot_of_page = cache.page_table if residents is None else residents.slot_of_page
    tensors = (
        step.scores, cache.page_table, cache.lengths, cache.lengths if step.starts is None else step.starts, cache.budget,
        slot_of_page, step.block_indices, step.block_counts, capacity, step.window or 0, step.tq,
    )  # fmt: skip
    options = {
        "FIRST": numerics.force_first,
        "LAST": numerics.force_last,
        "HKV": kv_heads,
        "WINDOW": step.window is not None,
        "POOLED": residents is not None,
        "PACKED": step.starts is not None,
        "OVERLAP": step.overlap,
        "launch_pdl": step.overlap,
    }
    grid = (batch * kv_heads,)
    with on_device_of(step.q):
        if capacity > HELD_BLOCKS:
            launch(select_many_blocks_kernel, grid, *tensors, **options, CHUNK=CHUNK, num_warps=16)
            return
        pad = max(32, triton.next_power_of_2(capacity))
        warps = max(1, min(16, pad // 64))
        keys = pad // (32 * warps)
        short = SHORT_BLOCKS if pad > WIDE_BLOCKS else pad
        short_keys = short // (32 * warps)
        launch(
            select_blocks_kernel,
            grid,
            *tensors,
            **options,
            PAD=pad,
            KEYS=keys,
            SEARCH=_search_asm(keys),
            REGISTERS=_registers(keys),
            SHORT=short,
            SHORT_KEYS=short_keys,
            SHORT_SEARCH=_search_asm(short_keys),
            SHORT_REGISTERS=_registers(short_keys),
            PORTABLE=interpreted(),
            num_warps=warps,
        )
