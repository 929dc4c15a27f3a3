"""The kernels that choose the promoted blocks; `thrift_attn.decode.select` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.packed_rows import length_seen, rows_of
from thrift_attn.kernels.arithmetic import threshold_of_largest


@triton.jit
def blocks_listed(length, tq, window, WINDOW: tl.constexpr):
    """Blocks that are chosen among, from the first number up to the second; blocks of the sequence, and blocks listed."""
    full = length // 64
    total = (length + 63) // 64
    start = full - full
    if WINDOW:
        start = tl.maximum(length - tq - window + 1, 0) // 64
    return start, full, total, tl.maximum(full - start, 0)


@triton.jit
def _slots(slot_of_page_ptr, page, there, h, HKV: tl.constexpr):
    """Slot of the residual of each block, below 0 where it has none. A kernel of this chain may have written it."""
    return tl.load(slot_of_page_ptr + page.to(tl.int64) * HKV + h, mask=there, other=-1, cache_modifier=".cg")


@triton.jit
def _slot_of_block(slot_of_page_ptr, page_table_ptr, block, start, full, h, HKV: tl.constexpr):
    """`_slots` of blocks by number."""
    there = (block >= start) & (block < full)
    page = tl.load(page_table_ptr + block, mask=there, other=0)
    return _slots(slot_of_page_ptr, page, there, h, HKV)


@triton.jit
def promotion_keys(score_ptr, block, start, full, total, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Integers in the order of promotion: forced first blocks, forced last ones from the end, by score, hidden ones."""
    there = (block >= start) & (block < full)
    score = tl.load(score_ptr + block, mask=there, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 and 0 compare equal through the addition
    key = tl.minimum(bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7F800000)  # infinity
    key = tl.where(block >= total - LAST, 0x7F800001 + block - (total - LAST), key)
    key = tl.where(block < FIRST, 0x7FC00000 + FIRST - block, key)
    return tl.where(there, tl.maximum(key, -0x7FFFFFF0), -0x7FFFFFFF)


@triton.jit
def _choose(
    score_ptr, page_table_ptr, budget_ptr, slot_of_page_ptr, block_indices_ptr, block_counts_ptr, blocks, bh, start, full,
    total, listed, FIRST: tl.constexpr, LAST: tl.constexpr, HKV: tl.constexpr, POOLED: tl.constexpr, PAD: tl.constexpr,
    KEYS: tl.constexpr, SEARCH: tl.constexpr, REGISTERS: tl.constexpr, PORTABLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The choice among no more than PAD blocks."""
    b = bh // HKV
    block = tl.arange(0, PAD)
    there = (block >= start) & (block < full)
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + block, mask=there, other=0)
    wanted = tl.load(budget_ptr + listed)
    can = there
    slot = page
    if POOLED:
        slot = _slots(slot_of_page_ptr, page, there, bh % HKV, HKV)
        can = there & (slot >= 0)
        wanted = tl.minimum(wanted, tl.sum(can.to(tl.int32), 0))
    # Not earlier, or the programs of the attention take places that the scores still need. The trigger stays behind the wait.
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    key = promotion_keys(score_ptr + bh.to(tl.int64) * blocks, block, start, full, total, FIRST, LAST)
    if POOLED:
        key = tl.where(can, key, -0x7FFFFFFF)

    wanted = tl.minimum(tl.maximum(wanted, 0), listed)

    # The largest threshold that at least `wanted` keys reach, bit by bit, or one that exactly so many reach.
    if PORTABLE:
        threshold = tl.sum(threshold_of_largest(key[None, :], wanted + tl.zeros([1], tl.int32), PAD), 0)
    else:
        threshold = tl.inline_asm_elementwise(
            SEARCH, REGISTERS, [key, wanted + tl.zeros([PAD], tl.int32)], dtype=tl.int32, is_pure=False, pack=KEYS
        )
    above = (key > threshold) & can & (wanted > 0)
    ties = (key == threshold) & can & (wanted > 0)
    room = wanted - tl.sum(above.to(tl.int32), 0)
    before = tl.cumsum(above.to(tl.int32) + (ties.to(tl.int32) << 16), 0)  # inclusive; both are less than 2^16
    tied = before >> 16
    chosen = above | (ties & (tied <= room))
    rank = (before & 0xFFFF) + tl.minimum(tied, room)
    place = tl.where(chosen, rank - 1, wanted + block - start - rank)
    out = block_indices_ptr + bh.to(tl.int64) * (3 if POOLED else 2) * blocks + place
    tl.store(out, block, mask=there)
    tl.store(out + blocks, page, mask=there)
    if POOLED:
        tl.store(out + 2 * blocks, slot, mask=there & (place < wanted))
    tl.store(block_counts_ptr + bh * 2, wanted)
    tl.store(block_counts_ptr + bh * 2 + 1, listed)


@triton.jit(do_not_specialize=["blocks", "window", "tq"])
def select_blocks_kernel(
    score_ptr,  # float32 [B, Hkv, NB]
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    starts_ptr,  # int32 [B + 1], with PACKED: the first query of each sequence
    budget_ptr,  # int32 [NB + 1]: promoted blocks where so many are listed
    slot_of_page_ptr,  # int32 [pages, Hkv], with POOLED: slot of the residual, below 0 for blocks that cannot be promoted
    block_indices_ptr,  # int32 [B, Hkv, 2, NB]: block numbers and page numbers, promoted ones first, each part in order; with
    # POOLED [B, Hkv, 3, NB]: slots, too
    block_counts_ptr,  # int32 [B, Hkv, 2]: promoted, all listed
    blocks,  # NB
    window,
    tq,
    FIRST: tl.constexpr,  # forced first and last blocks
    LAST: tl.constexpr,
    HKV: tl.constexpr,
    WINDOW: tl.constexpr,
    POOLED: tl.constexpr,  # not all blocks have a residual
    PAD: tl.constexpr,  # NB rounded up to a power of two
    KEYS: tl.constexpr,  # of one thread
    SEARCH: tl.constexpr,  # `_search_asm`, and its registers
    REGISTERS: tl.constexpr,
    SHORT: tl.constexpr,  # PAD for sequences of no more blocks, with the next three of its own
    SHORT_KEYS: tl.constexpr,
    SHORT_SEARCH: tl.constexpr,
    SHORT_REGISTERS: tl.constexpr,
    PORTABLE: tl.constexpr,
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    bh = tl.program_id(0)
    b = bh // HKV
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")  # not from an L1 line of the last replay of this chain
    _query, rows = rows_of(starts_ptr, b, tq, PACKED)
    length = length_seen(length, rows, tq, blocks, PACKED)
    start, full, total, listed = blocks_listed(length, rows, window, WINDOW)
    if SHORT < PAD:  # noqa: SIM102  (a constant: what is inside is not compiled without)
        if full <= SHORT:
            _choose(
                score_ptr, page_table_ptr, budget_ptr, slot_of_page_ptr, block_indices_ptr, block_counts_ptr, blocks, bh, start,
                full, total, listed, FIRST, LAST, HKV, POOLED, SHORT, SHORT_KEYS, SHORT_SEARCH, SHORT_REGISTERS, PORTABLE,
                OVERLAP,
            )  # fmt: skip
            return
    _choose(
        score_ptr, page_table_ptr, budget_ptr, slot_of_page_ptr, block_indices_ptr, block_counts_ptr, blocks, bh, start,
        full, total, listed, FIRST, LAST, HKV, POOLED, PAD, KEYS, SEARCH, REGISTERS, PORTABLE, OVERLAP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "window", "tq"])
def select_many_blocks_kernel(
    score_ptr,  # float32 [B, Hkv, NB]
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    starts_ptr,  # int32 [B + 1], with PACKED: the first query of each sequence
    budget_ptr,  # int32 [NB + 1]: promoted blocks where so many are listed
    slot_of_page_ptr,  # int32 [pages, Hkv], with POOLED
    block_indices_ptr,  # int32 [B, Hkv, 2, NB]: as `select_blocks_kernel` writes it
    block_counts_ptr,  # int32 [B, Hkv, 2]
    blocks,  # NB
    window,
    tq,
    FIRST: tl.constexpr,  # forced first and last blocks
    LAST: tl.constexpr,
    HKV: tl.constexpr,
    WINDOW: tl.constexpr,
    POOLED: tl.constexpr,
    CHUNK: tl.constexpr,  # blocks at a time
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`select_blocks_kernel` for more blocks than a program holds: every round reads the scores again, chunk by chunk."""
    bh = tl.program_id(0)
    b = bh // HKV
    length = tl.load(lengths_ptr + b, cache_modifier=".cg")
    _query, rows = rows_of(starts_ptr, b, tq, PACKED)
    length = length_seen(length, rows, tq, blocks, PACKED)
    start, full, total, listed = blocks_listed(length, rows, window, WINDOW)
    wanted = tl.minimum(tl.maximum(tl.load(budget_ptr + listed), 0), listed)
    begin = start // CHUNK * CHUNK
    pages = page_table_ptr + b.to(tl.int64) * blocks
    if POOLED:
        can_count = listed - listed
        for first in range(begin, full, CHUNK):
            block = first + tl.arange(0, CHUNK)
            slot = _slot_of_block(slot_of_page_ptr, pages, block, start, full, bh % HKV, HKV)
            can_count += tl.sum((slot >= 0).to(tl.int32), 0)
        wanted = tl.minimum(wanted, can_count)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    scores = score_ptr + bh.to(tl.int64) * blocks

    # The largest threshold that at least `wanted` keys reach, bit by bit, or one that exactly so many reach. Not
    # `threshold_of_largest`: it holds all keys in registers, and here there are more, so every round reads them again.
    threshold = wanted - wanted - 0x7FFFFFFF - 1
    bit = 31
    reached = wanted - wanted - 1
    while (bit >= 0) & (reached != wanted):
        # The sign bit counts the other way round.
        trial = tl.where(bit == 31, 0, threshold + (1 << tl.minimum(bit, 30)))
        reached = wanted - wanted
        for first in range(begin, full, CHUNK):
            block = first + tl.arange(0, CHUNK)
            key = promotion_keys(scores, block, start, full, total, FIRST, LAST)
            if POOLED:
                slot = _slot_of_block(slot_of_page_ptr, pages, block, start, full, bh % HKV, HKV)
                key = tl.where(slot >= 0, key, -0x7FFFFFFF)
            reached += tl.sum((key >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= wanted, trial, threshold)
        bit -= 1
    room = wanted
    for first in range(begin, full, CHUNK):
        block = first + tl.arange(0, CHUNK)
        key = promotion_keys(scores, block, start, full, total, FIRST, LAST)
        if POOLED:
            slot = _slot_of_block(slot_of_page_ptr, pages, block, start, full, bh % HKV, HKV)
            key = tl.where(slot >= 0, key, -0x7FFFFFFF)
        room -= tl.sum((key > threshold).to(tl.int32), 0)  # hidden keys are below every threshold of `wanted` keys
    room = tl.maximum(room, 0)  # nothing is wanted, so that there is no threshold

    out = block_indices_ptr + bh.to(tl.int64) * (3 if POOLED else 2) * blocks
    above_before = wanted - wanted
    ties_before = wanted - wanted
    for first in range(begin, full, CHUNK):
        block = first + tl.arange(0, CHUNK)
        there = (block >= start) & (block < full)
        page = tl.load(pages + block, mask=there, other=0)
        key = promotion_keys(scores, block, start, full, total, FIRST, LAST)
        can = there
        slot = page
        if POOLED:
            slot = _slots(slot_of_page_ptr, page, there, bh % HKV, HKV)
            can = there & (slot >= 0)
        above = (key > threshold) & can & (wanted > 0)
        ties = (key == threshold) & can & (wanted > 0)
        tied = ties_before + tl.cumsum(ties.to(tl.int32), 0)
        rank = above_before + tl.cumsum(above.to(tl.int32), 0) + tl.minimum(tied, room)
        chosen = above | (ties & (tied <= room))
        place = tl.where(chosen, rank - 1, wanted + block - start - rank)
        tl.store(out + place, block, mask=there)
        tl.store(out + blocks + place, page, mask=there)
        if POOLED:
            tl.store(out + 2 * blocks + place, slot, mask=there & (place < wanted))
        above_before += tl.sum(above.to(tl.int32), 0)
        ties_before += tl.sum(ties.to(tl.int32), 0)
    tl.store(block_counts_ptr + bh * 2, wanted)
    tl.store(block_counts_ptr + bh * 2 + 1, listed)
