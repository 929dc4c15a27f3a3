"""The kernel that writes new tokens into the 16-bit blocks; `thrift_attn.decode.append` launches it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks", "batch", "tokens"])
def write_tail_kernel(
    k_ptr,  # [B, Hkv, T, D]
    v_ptr,
    tail_ptr,  # [2, B, 2, Hkv, 64, D], contiguous
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    pages_ptr,  # int32 [B, 2]: the page of the block that this step completes in each of the two tail blocks, or -1
    seqs_ptr,  # int32 [B, 2]: the sequence
    numbers_ptr,  # int32 [B, 2]: the number of that block in its sequence
    counts_ptr,  # int32 [B]: how many of the T tokens each sequence takes, with RAGGED
    overrun_ptr,  # int32 [1], set where a sequence has no page for the block that it would complete
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    blocks,  # NB
    batch,  # B
    tokens,  # T, at most 64
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    ROWS: tl.constexpr,  # (token, head) pairs at a time
    RAGGED: tl.constexpr,
):
    b = tl.program_id(0)
    length = tl.load(lengths_ptr + b)
    count = tokens
    if RAGGED:
        count = tl.load(counts_ptr + b)
    # At most 64 tokens complete at most one block: the one that held the old end. Where it has no page, nothing is written or
    # counted, so that the sequence stays what it was.
    entry = length // 64
    full = (length % 64 + count) >= 64
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + entry, mask=full & (entry < blocks), other=-1)
    lost = tl.where(full, page, 0) < 0
    kept = tl.where(lost, 0, count)
    d = tl.arange(0, DP)[None, :]
    for start in range(0, count * HKV, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        token, head = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
        there = (row < count * HKV) & (d < D)
        k = tl.load(k_ptr + b.to(tl.int64) * stride_kb + head * stride_kh + token * stride_kt + d, mask=there)
        v = tl.load(v_ptr + b.to(tl.int64) * stride_vb + head * stride_vh + token * stride_vt + d, mask=there)
        at = length + token
        out = (((b.to(tl.int64) * 2 + at // 64 % 2) * HKV + head) * 64 + at % 64) * D + d
        stored = (row < kept * HKV) & (d < D)
        tl.store(tail_ptr + out, k, mask=stored)
        tl.store(tail_ptr + batch.to(tl.int64) * 2 * HKV * 64 * D + out, v, mask=stored)
    slot = entry % 2
    tl.store(pages_ptr + b * 2 + slot, page)
    tl.store(pages_ptr + b * 2 + 1 - slot, -1)
    tl.store(numbers_ptr + b * 2 + slot, entry)
    tl.store(numbers_ptr + b * 2 + 1 - slot, entry)
    tl.store(seqs_ptr + b * 2, b)
    tl.store(seqs_ptr + b * 2 + 1, b)
    tl.debug_barrier()  # every warp has read the old length
    tl.store(lengths_ptr + b, length + kept)  # no other program reads it
    if lost:
        tl.store(overrun_ptr, 1)
