"""The kernel that scores blocks for every query row and chooses the promoted ones (`thrift_attn.prefill.select`)."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.arithmetic import dot, threshold_of_largest
from thrift_attn.kernels.spans import BLOCK_START, K_LEN, Q_BLOCK_START, Q_LEN, SPAN


@triton.jit(do_not_specialize=["items", "tiles", "q_blocks", "blocks", "capacity", "window"])
def select_rows_kernel(
    q_block_mean_ptr,  # float32 [P, Hq, R, D]
    k_block_mean_ptr,  # 16-bit [P, Hkv, N, D]
    block0_mean_ptr,  # 16-bit [B, Hkv, D], what stands for c_0
    spans_ptr,  # int32 [B, 6]
    wanted_ptr,  # int32 [B or 1, most_rows]
    scratch_ptr,  # float32 [programs, Q_BLOCKS, PAD]
    block_indices_ptr,  # int32 [P, Hq, R, K], written up to the count
    block_counts_ptr,  # int32 [P, Hq, R]
    stride_wanted,  # 0 when all sequences share one row of counts
    items,  # B * Hq * tiles
    tiles,  # of Q_BLOCKS query blocks, per sequence
    q_blocks,  # R
    blocks,  # N
    capacity,  # K
    window,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    CAUSAL: tl.constexpr,
    ONE_BATCH: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,  # forced first and last blocks
    LAST: tl.constexpr,
    SINK: tl.constexpr,  # c_0 is the first key and tells nothing about the others
    PAD: tl.constexpr,  # most_blocks rounded up to a power of two
    Q_BLOCKS: tl.constexpr,
    SUB: tl.constexpr,  # query blocks chosen at a time
    BN: tl.constexpr,  # blocks scored at a time
    PORTABLE: tl.constexpr,  # float32 products, for the interpreter
):
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * (Q_BLOCKS * PAD)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        bh = item // tiles
        b = bh // HQ
        h = bh % HQ
        batch = (b * (not ONE_BATCH)).to(tl.int64)
        span = spans_ptr + b * SPAN
        queries, keys = tl.load(span + Q_LEN), tl.load(span + K_LEN)
        q_block_start, block_start = tl.load(span + Q_BLOCK_START), tl.load(span + BLOCK_START)
        offset = keys - keys
        if CAUSAL:
            offset = keys - queries
        base = offset >> 6  # absolute block of row 0, rounded down
        seq_q_blocks = (offset - base * 64 + queries + 63) // 64  # of this sequence
        q_block0 = item % tiles * Q_BLOCKS
        if q_block0 < seq_q_blocks:
            total = (keys + 63) // 64
            # What the query blocks of the tile see together.
            low = total - total
            high = total
            if CAUSAL:
                high = tl.minimum(total, base + q_block0 + Q_BLOCKS)
            if WINDOW:
                low = tl.maximum((base + q_block0) * 64 + 1 - window, 0) // 64
            row = q_block0 + tl.arange(0, Q_BLOCKS)
            d = tl.arange(0, DP)
            head = batch * HQ + h
            at = (head * q_blocks + q_block_start + row) * D
            mean = tl.load(
                q_block_mean_ptr + at[:, None] + d[None, :],
                mask=(row < seq_q_blocks)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            DTYPE: tl.constexpr = k_block_mean_ptr.dtype.element_ty
            upper = mean.to(DTYPE)  # the mean in two parts, so that products of 16-bit data are almost float32
            lower = (mean - upper.to(tl.float32)).to(DTYPE)
            block_means = k_block_mean_ptr + ((batch * HKV + h // (HQ // HKV)) * blocks + block_start) * D
            for n0 in range(low // BN * BN, high, BN):
                n = n0 + tl.arange(0, BN)
                at_c = block_means + n[None, :] * D + d[:, None]
                if SINK:
                    at_block0 = block0_mean_ptr + (b * HKV + h // (HQ // HKV)).to(tl.int64) * D + d[:, None]
                    at_c = tl.where((n == 0)[None, :], at_block0, at_c)
                c = tl.load(at_c, mask=(n < high)[None, :] & (d < D)[:, None], other=0.0)
                if PORTABLE:
                    s = dot(mean, c, PORTABLE)
                else:
                    s = tl.dot(upper, c, tl.dot(lower, c))  # [Q_BLOCKS, BN]
                tl.store(scratch + tl.arange(0, Q_BLOCKS)[:, None] * PAD + n[None, :], s + 0.0, mask=(n < PAD)[None, :])
            tl.debug_barrier()
            for s0 in range(0, Q_BLOCKS, SUB):
                mine = s0 + tl.arange(0, SUB)
                r = q_block0 + mine
                start = (base + r) * 64
                last = tl.minimum(start + 64, offset + queries)
                first = tl.maximum(tl.maximum(start, offset), 0)
                begin = r - r
                end = begin + total
                if CAUSAL:
                    end = (tl.minimum(last, keys) + 63) // 64
                if WINDOW:
                    begin = tl.maximum(first + 1 - window, 0) // 64
                there = (r < seq_q_blocks) & (first < last)
                end = tl.where(there, end, begin)
                wanted = tl.load(wanted_ptr + b.to(tl.int64) * stride_wanted + r, mask=r < seq_q_blocks, other=0)
                index = tl.arange(0, PAD)[None, :]
                seen = (index >= begin[:, None]) & (index < end[:, None])
                score = tl.load(scratch + mine[:, None] * PAD + index, mask=seen, other=0.0)
                key = score.to(tl.int32, bitcast=True)
                key = key ^ ((key >> 31) & 0x7FFFFFFF)
                # Forced blocks: from the beginning, then nearest to the row's own; the scores decide about what is left.
                size = end - begin
                wanted = tl.minimum(wanted, size)
                leading = tl.minimum(wanted, tl.minimum(tl.maximum(FIRST - begin, 0), size))
                unforced = tl.maximum(end - tl.maximum(begin, FIRST), 0)
                trailing = tl.minimum(wanted - leading, tl.minimum(unforced, LAST))
                if CAUSAL:
                    forced = (index < (begin + leading)[:, None]) | (index >= (end - trailing)[:, None])
                else:  # around the block of the row's last query, of two equally near the earlier one
                    near = tl.minimum(tl.maximum(keys - queries + last - 1, 0) // 64 - trailing // 2, end - trailing)
                    near = tl.maximum(near, tl.maximum(begin, FIRST))[:, None]
                    forced = (index < (begin + leading)[:, None]) | (
                        (index >= near) & (index < near + trailing[:, None])
                    )
                room = wanted - leading - trailing
                open_ = seen & ~forced
                key = tl.where(open_, key, -0x7FFFFFFF - 1)
                threshold = threshold_of_largest(key, room, PAD)
                above = open_ & (key > threshold[:, None])
                ties = open_ & (key == threshold[:, None])
                need = room - tl.sum(above.to(tl.int32), 1)
                chosen = (seen & forced) | above | (ties & (tl.cumsum(ties.to(tl.int32), 1) <= need[:, None]))
                place = tl.cumsum(chosen.to(tl.int32), 1) - 1
                out = (head * q_blocks + q_block_start + r) * capacity
                tl.store(
                    block_indices_ptr + out[:, None] + place,
                    index + tl.zeros_like(place),
                    mask=chosen & (place < capacity),
                )
                tl.store(block_counts_ptr + head * q_blocks + q_block_start + r, wanted, mask=r < seq_q_blocks)
            tl.debug_barrier()
