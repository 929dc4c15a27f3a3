"""The kernel that writes new tokens into the 16-bit blocks; `thrift_attn.decode.append` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.packed_rows import rows_of
from thrift_attn.reference import residents

_NEWEST = tl.constexpr(residents.NEWEST)
_OWN = tl.constexpr(residents.OWN)
_NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _take_slots(
    b, entry, page, slots_of_new_ptr, page_table_ptr, slot_of_page_ptr, block_of_slot_ptr, past_mass_ptr, slots_ptr,
    bounds_ptr, quota_ptr, HKV: tl.constexpr, HP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Make the block ``entry``, which is complete now, a resident of every KV head, in place of another where the quota is
    reached: the twin of `thrift_attn.reference.residents.keep`. The other loses its residual.

    ``page_table_ptr`` and ``slots_ptr`` are those of the sequence.
    """
    h = tl.arange(0, HP)
    shared_slots = tl.load(bounds_ptr + b * 3)
    granted = tl.load(bounds_ptr + b * 3 + 1)
    shared_blocks = tl.load(bounds_ptr + b * 3 + 2)
    quota = tl.load(quota_ptr + entry + 1)
    shared = tl.minimum(shared_slots, shared_blocks)
    quota = tl.maximum(quota - shared, tl.minimum(quota, tl.minimum(entry + 1 - shared_blocks, _OWN)))
    held = tl.zeros([HP], tl.int32)
    empty = tl.full([HP], 0x7FFFFFFF, tl.int32)  # the first own slot without a resident
    least = tl.full([HP], _NONE, tl.int64)  # mass and number of the resident that would be given up
    for first in range(shared_slots, granted, CHUNK):
        i = first + tl.arange(0, CHUNK)
        slot = tl.load(slots_ptr + i, mask=i < granted, other=0)
        there = (i < granted)[None, :] & (h < HKV)[:, None]  # [HP, CHUNK]
        block = tl.load(block_of_slot_ptr + slot.to(tl.int64)[None, :] * HKV + h[:, None], mask=there, other=-1)
        named = there & (block >= 0) & (block < entry)
        at = tl.load(page_table_ptr + block, mask=named, other=0).to(tl.int64) * HKV + h[:, None]
        resident = named & (tl.load(slot_of_page_ptr + at, mask=named, other=-1) == slot[None, :])
        held += tl.sum((resident & (block >= shared_blocks)).to(tl.int32), 1)
        empty = tl.minimum(empty, tl.min(tl.where(there & ~resident, i[None, :], 0x7FFFFFFF), 1))
        old = resident & (block <= entry - _NEWEST) & (block >= shared_blocks)
        mass = tl.load(past_mass_ptr + at, mask=old, other=0.0)  # never negative: ordered like its bits
        key = (mass.to(tl.int32, bitcast=True).to(tl.int64) << 32) | block.to(tl.int64)
        least = tl.minimum(least, tl.min(tl.where(old, key, _NONE), 1))
    inside = h < HKV
    grow = (held < quota) & (empty < granted)
    evict = inside & ~grow & (least != _NONE)
    victim = (least & 0x7FFFFFFF).to(tl.int32)
    victim_at = tl.load(page_table_ptr + victim, mask=evict, other=0).to(tl.int64) * HKV + h
    slot = tl.load(slots_ptr + empty, mask=inside & grow, other=-1)
    slot = tl.where(evict, tl.load(slot_of_page_ptr + victim_at, mask=evict, other=-1), slot)
    new_at = page.to(tl.int64) * HKV + h
    tl.debug_barrier()  # every warp has read what changes now
    tl.store(slot_of_page_ptr + victim_at, -1, mask=evict)
    tl.store(slot_of_page_ptr + new_at, slot, mask=inside)
    tl.store(past_mass_ptr + new_at, 0.0, mask=inside)
    tl.store(block_of_slot_ptr + slot.to(tl.int64) * HKV + h, entry, mask=inside & (slot >= 0))
    tl.store(slots_of_new_ptr + h, slot, mask=inside)


@triton.jit(do_not_specialize=["blocks", "tokens", "width"])
def write_tail_kernel(
    k_ptr,  # [B, Hkv, T, D], or [tokens, Hkv, D] with PACKED
    v_ptr,
    tail_ptr,  # [rings, 2, Hkv, RING, D], token t at t mod RING
    rings_ptr,  # int32 [B]: the ring of each sequence
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    pages_ptr,  # int32 [B]: the page of the block that this step completes, or -1
    numbers_ptr,  # int32 [B]: the number of that block in its sequence
    starts_ptr,  # int32 [B + 1], with PACKED: the first token of each sequence
    counts_ptr,  # int32 [B]: how many of the T tokens each sequence takes, with RAGGED
    overrun_ptr,  # int32 [1], set where a sequence has no page for the block that it would complete, or brings too many tokens
    slots_of_new_ptr,  # int32 [B, Hkv], with POOLED: the slot for the residual of the block of that page, or -1
    slot_of_page_ptr,  # int32 [pages, Hkv]
    block_of_slot_ptr,  # int32 [slots, Hkv]
    past_mass_ptr,  # float32 [pages, Hkv]
    slots_ptr,  # int32 [B, W]
    bounds_ptr,  # int32 [B, 3]
    quota_ptr,  # int32 [NB + 1]
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    blocks,  # NB
    tokens,  # T, at most 64
    width,  # W
    RING: tl.constexpr,
    TAIL_RING: tl.constexpr,  # strides of the tail
    TAIL_KV: tl.constexpr,
    TAIL_HEAD: tl.constexpr,
    TAIL_TOKEN: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    ROWS: tl.constexpr,  # (token, head) pairs at a time
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    POOLED: tl.constexpr,
    HP: tl.constexpr,  # Hkv rounded up to a power of two
    CHUNK: tl.constexpr,  # slots at a time
):
    b = tl.program_id(0)
    length = tl.load(lengths_ptr + b)
    first, count = rows_of(starts_ptr, b, tokens, PACKED)
    if RAGGED:
        count = tl.load(counts_ptr + b)
    ring = tail_ptr + tl.load(rings_ptr + b).to(tl.int64) * TAIL_RING
    # At most 64 tokens complete at most one block: the one that held the old end. Where it has no page, or where more tokens
    # come than the caller said, nothing is written or counted, so that the sequence stays what it was.
    fits = (count >= 0) & (count <= tokens)
    count = tl.where(fits, count, 0)
    entry = length // 64
    full = (length % 64 + count) >= 64
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + entry, mask=full & (entry < blocks), other=-1)
    lost = (tl.where(full, page, 0) < 0) | ~fits
    kept = tl.where(lost, 0, count)
    d = tl.arange(0, DP)[None, :]
    for start in range(0, count * HKV, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        token, head = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
        there = (row < count * HKV) & (d < D)
        k = tl.load(k_ptr + b.to(tl.int64) * stride_kb + head * stride_kh + (first + token) * stride_kt + d, mask=there)
        v = tl.load(v_ptr + b.to(tl.int64) * stride_vb + head * stride_vh + (first + token) * stride_vt + d, mask=there)
        at = length + token
        out = ring + head * TAIL_HEAD + at % RING * TAIL_TOKEN + d
        stored = (row < kept * HKV) & (d < D)
        tl.store(out, k, mask=stored)
        tl.store(out + TAIL_KV, v, mask=stored)
    tl.store(pages_ptr + b, page)
    tl.store(numbers_ptr + b, entry)
    if POOLED:  # noqa: SIM102  (a constant: what is inside is not compiled without)
        if full & (page >= 0):
            _take_slots(
                b, entry, page, slots_of_new_ptr + b * HKV, page_table_ptr + b.to(tl.int64) * blocks,
                slot_of_page_ptr, block_of_slot_ptr, past_mass_ptr, slots_ptr + b.to(tl.int64) * width, bounds_ptr,
                quota_ptr, HKV, HP, CHUNK,
            )  # fmt: skip
    tl.debug_barrier()  # every warp has read the old length
    tl.store(lengths_ptr + b, length + kept)  # no other program reads it
    if lost:
        tl.store(overrun_ptr, 1)
