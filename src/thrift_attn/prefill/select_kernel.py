"""The kernel that scores blocks for every query row and chooses the promoted ones (`thrift_attn.prefill.select`)."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.arithmetic import threshold_of_largest
from thrift_attn.kernels.spans import BLOCK_START, K_LEN, Q_LEN, ROW_START, SPAN


@triton.jit(do_not_specialize=["items", "tiles", "rows", "blocks", "most", "window"])
def select_rows_kernel(
    mean_ptr,  # float32 [P, Hq, R, D]
    centre_ptr,  # 16-bit [P, Hkv, N, D]
    others_ptr,  # 16-bit [B, Hkv, D], what stands for c_0
    spans_ptr,  # int32 [B, 6]
    wanted_ptr,  # int32 [B or 1, most_rows]
    scratch_ptr,  # float32 [programs, ROWS, PAD]
    list_ptr,  # int32 [P, Hq, R, K], written up to the count
    counts_ptr,  # int32 [P, Hq, R]
    stride_wanted,  # 0 when all sequences share one row of counts
    items,  # B * Hq * tiles
    tiles,  # of ROWS query rows, per sequence
    rows,  # R
    blocks,  # N
    most,  # K
    window,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    CAUSAL: tl.constexpr,
    ONE_PART: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,  # forced first and last blocks
    LAST: tl.constexpr,
    SINK: tl.constexpr,  # c_0 is the first key and tells nothing about the others
    PAD: tl.constexpr,  # most_blocks rounded up to a power of two
    ROWS: tl.constexpr,
    SUB: tl.constexpr,  # rows chosen at a time
    BN: tl.constexpr,  # blocks scored at a time
    PORTABLE: tl.constexpr,  # float32 products, for the interpreter
):
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * (ROWS * PAD)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        bh = item // tiles
        b = bh // HQ
        h = bh % HQ
        part = (b * (not ONE_PART)).to(tl.int64)
        span = spans_ptr + b * SPAN
        queries, keys = tl.load(span + Q_LEN), tl.load(span + K_LEN)
        row_start, block_start = tl.load(span + ROW_START), tl.load(span + BLOCK_START)
        offset = keys - keys
        if CAUSAL:
            offset = keys - queries
        base = offset >> 6  # absolute block of row 0, rounded down
        own = (offset - base * 64 + queries + 63) // 64  # rows of this sequence
        row0 = item % tiles * ROWS
        if row0 < own:
            total = (keys + 63) // 64
            # What the rows of the tile see together.
            low = total - total
            high = total
            if CAUSAL:
                high = tl.minimum(total, base + row0 + ROWS)
            if WINDOW:
                low = tl.maximum((base + row0) * 64 + 1 - window, 0) // 64
            row = row0 + tl.arange(0, ROWS)
            d = tl.arange(0, DP)
            head = part * HQ + h
            at = (head * rows + row_start + row) * D
            mean = tl.load(mean_ptr + at[:, None] + d[None, :], mask=(row < own)[:, None] & (d < D)[None, :], other=0.0)
            DTYPE: tl.constexpr = centre_ptr.dtype.element_ty
            upper = mean.to(DTYPE)  # the mean in two parts, so that products of 16-bit data are almost float32
            lower = (mean - upper.to(tl.float32)).to(DTYPE)
            centres = centre_ptr + ((part * HKV + h // (HQ // HKV)) * blocks + block_start) * D
            for n0 in range(low // BN * BN, high, BN):
                n = n0 + tl.arange(0, BN)
                at_c = centres + n[None, :] * D + d[:, None]
                if SINK:
                    at_others = others_ptr + (b * HKV + h // (HQ // HKV)).to(tl.int64) * D + d[:, None]
                    at_c = tl.where((n == 0)[None, :], at_others, at_c)
                c = tl.load(at_c, mask=(n < high)[None, :] & (d < D)[:, None], other=0.0)
                if PORTABLE:
                    s = tl.dot(mean, c.to(tl.float32), input_precision="ieee")
                else:
                    s = tl.dot(upper, c, tl.dot(lower, c))  # [ROWS, BN]
                tl.store(scratch + tl.arange(0, ROWS)[:, None] * PAD + n[None, :], s + 0.0, mask=(n < PAD)[None, :])
            tl.debug_barrier()
            for s0 in range(0, ROWS, SUB):
                mine = s0 + tl.arange(0, SUB)
                r = row0 + mine
                start = (base + r) * 64
                last = tl.minimum(start + 64, offset + queries)
                first = tl.maximum(tl.maximum(start, offset), 0)
                begin = r - r
                end = begin + total
                if CAUSAL:
                    end = (tl.minimum(last, keys) + 63) // 64
                if WINDOW:
                    begin = tl.maximum(first + 1 - window, 0) // 64
                there = (r < own) & (first < last)
                end = tl.where(there, end, begin)
                wanted = tl.load(wanted_ptr + b.to(tl.int64) * stride_wanted + r, mask=r < own, other=0)
                index = tl.arange(0, PAD)[None, :]
                seen = (index >= begin[:, None]) & (index < end[:, None])
                score = tl.load(scratch + mine[:, None] * PAD + index, mask=seen, other=0.0)
                key = score.to(tl.int32, bitcast=True)
                key = key ^ ((key >> 31) & 0x7FFFFFFF)
                # Forced blocks: from the beginning, then nearest to the row's own; the scores decide about what is left.
                size = end - begin
                wanted = tl.minimum(wanted, size)
                leading = tl.minimum(wanted, tl.minimum(tl.maximum(FIRST - begin, 0), size))
                rest = tl.maximum(end - tl.maximum(begin, FIRST), 0)
                trailing = tl.minimum(wanted - leading, tl.minimum(rest, LAST))
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
                out = (head * rows + row_start + r) * most
                tl.store(list_ptr + out[:, None] + place, index + tl.zeros_like(place), mask=chosen & (place < most))
                tl.store(counts_ptr + head * rows + row_start + r, wanted, mask=r < own)
            tl.debug_barrier()
