"""Which KV blocks every query row promotes, on the device: scores, budget and the choice, without a matrix of all scores.

A row is 64 queries (`thrift_attn.seq_layout`). Its score for block b is mean(Q) . c_b. The choice equals
`thrift_attn.reference.budget.promote`, ties included.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.config import BLOCK, Budget
from thrift_attn.dispatch import interpreted, multiprocessors
from thrift_attn.reference.budget import blocks_per_row, promote
from thrift_attn.seq_layout import Sequences

MAX_BLOCKS = 16384
"""Most KV blocks of one sequence: a program holds the scores of a row."""

ROWS = 16
"""Query rows whose scores one program works out at a time."""

HELD = 4096
"""Scores a program holds in registers at a time."""


def visible_blocks(queries: Tensor, keys: Tensor, rows: int, *, causal: bool, window: int | None) -> Tensor:
    """How many KV blocks every query row sees.

    Args:
        queries: int64 ``[B]``, length of q of each sequence.
        keys: int64 ``[B]``, length of k.
        rows: R, rows to return; those a sequence does not have see nothing.
        causal: see `thrift_attn.attention`.
        window: likewise.

    Returns:
        int64 ``[B, R]``.
    """
    queries, keys = queries.long()[:, None], keys.long()[:, None]
    offset = keys - queries if causal else torch.zeros_like(keys)
    start = (offset.div(BLOCK, rounding_mode="floor") + torch.arange(rows, device=keys.device)) * BLOCK
    first = start.maximum(offset).clamp(min=0)  # position of the row's first query
    last = (start + BLOCK).minimum(offset + queries)  # one past the position of its last
    end = last.minimum(keys) if causal else keys
    begin = (first + 1 - window).clamp(min=0) if window else torch.zeros_like(first)
    count = -(-end // BLOCK) - begin // BLOCK
    return torch.where(first < last, count, 0)


def budget_rows(budget: Budget, visible: Tensor, blocks: Tensor) -> Tensor:
    """`blocks_per_row` of several sequences at once, without a copy to the host.

    Args:
        budget: the budget.
        visible: int64 ``[B, R]``; rows that a sequence does not have see 0 blocks.
        blocks: int64 ``[B]``, N of each sequence.

    Returns:
        int64 ``[B, R]``.
    """
    if budget.kind == "top_k":
        return visible.clamp(max=int(budget.value))
    if budget.kind == "paper":
        return visible.minimum((blocks // BLOCK).clamp(min=1)[:, None])
    counts = visible.double()
    total = budget.value * counts.sum(1, keepdim=True)
    ordered = counts.sort(1).values
    rows = counts.shape[1]
    below = ordered.cumsum(1) - ordered
    left = torch.arange(rows, 0, -1, device=counts.device, dtype=counts.dtype)
    first = (below + ordered * left < total).sum(1, keepdim=True)  # rows that the level exceeds
    at = first.clamp(max=rows - 1)
    level = (total - below.gather(1, at)) / (rows - at)
    level = torch.where(first == rows, ordered[:, -1:], level)
    ends = (counts.minimum(level).cumsum(1) + 0.5).floor().long()
    return torch.diff(ends, prepend=torch.zeros_like(ends[:, :1])).minimum(visible)


def capacity(budget: Budget, blocks: int) -> int:
    """Upper limit of the promoted blocks of a row that sees at most ``blocks`` blocks.

    The share of rows grows concavely with the level, so the level is at most fraction * blocks; carried rounding adds 1.
    """
    if budget.kind == "top_k":
        most = int(budget.value)
    elif budget.kind == "paper":
        most = max(1, blocks // BLOCK)
    else:
        most = math.floor(budget.value * blocks) + 2
    return max(1, min(most, blocks))


def decode_bounds(queries: Tensor, keys: Tensor, *, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """First KV block that any query of a sequence sees, and one past the last: int64 ``[B]`` each."""
    queries, keys = queries.long(), keys.long()
    begin = torch.zeros_like(keys)
    if causal and window is not None:
        begin = ((keys - queries).clamp(min=0) + 1 - window).clamp(min=0) // BLOCK
    return begin, -(-keys // BLOCK)


def visible_counts(queries: Tensor, keys: Tensor, rows: int, decode: bool, causal: bool, window: int | None) -> Tensor:
    """`visible_blocks`, or for ``decode`` that of the one row that all queries share ``[B, 1]``."""
    if not decode:
        return visible_blocks(queries, keys, rows, causal=causal, window=window)
    begin, end = decode_bounds(queries, keys, causal=causal, window=window)
    return (end - begin)[:, None]


@lru_cache(maxsize=256)
def _wanted_dense(
    budget: Budget,
    lengths: tuple[int, int],
    rows: int,
    decode: bool,
    causal: bool,
    window: int | None,
    least: int,
    device: torch.device,
) -> Tensor:
    queries, keys = (torch.tensor([x]) for x in lengths)
    visible = visible_counts(queries, keys, rows, decode, causal, window)[0]
    wanted = blocks_per_row(budget, visible, -(-lengths[1] // BLOCK))
    return wanted.clamp(min=least).minimum(visible).int()[None].to(device)


def wanted_blocks(
    budget: Budget, sequences: Sequences, *, window: int | None = None, least: int = 0, decode: bool = False
) -> Tensor:
    """Blocks to promote in every row of every sequence.

    Args:
        budget: the budget.
        sequences: how the sequences lie.
        window: sliding window in tokens.
        least: at least so many in a row that sees any.
        decode: all queries of a sequence are one row.

    Returns:
        int32 ``[B, most_rows]`` (1 for decode), ``[1, ...]`` when all sequences have one length; that tensor is kept for the
        next call.
    """
    if sequences.lengths is not None:
        return _wanted_dense(
            budget,
            sequences.lengths,
            sequences.most_rows,
            decode,
            sequences.causal,
            window,
            least,
            sequences.spans.device,
        )
    queries, keys = sequences.spans[:, 1], sequences.spans[:, 3]
    visible = visible_counts(queries, keys, sequences.most_rows, decode, sequences.causal, window)
    wanted = budget_rows(budget, visible, -(-keys.long() // BLOCK))
    return wanted.clamp(min=least).minimum(visible).int()


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
    RAGGED: tl.constexpr,
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
        part = (b * (not RAGGED)).to(tl.int64)
        span = spans_ptr + b * 6
        queries, keys = tl.load(span + 1), tl.load(span + 3)
        row_start, block_start = tl.load(span + 4), tl.load(span + 5)
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
                # Forced blocks: from the beginning, then from the end; the scores decide about what is left.
                size = end - begin
                wanted = tl.minimum(wanted, size)
                leading = tl.minimum(wanted, tl.minimum(tl.maximum(FIRST - begin, 0), size))
                rest = tl.maximum(end - tl.maximum(begin, FIRST), 0)
                trailing = tl.minimum(wanted - leading, tl.minimum(rest, LAST))
                forced = (index < (begin + leading)[:, None]) | (index >= (end - trailing)[:, None])
                room = wanted - leading - trailing
                open_ = seen & ~forced
                key = tl.where(open_, key, -0x7FFFFFFF - 1)
                # The largest threshold that at least `room` keys reach, bit by bit (the sign bit counts the other way
                # round), or one that exactly so many reach.
                reached = tl.sum((key >= 0).to(tl.int32), 1)
                threshold = tl.where(reached >= room, 0, -0x7FFFFFFF - 1)
                held = tl.where(reached >= room, reached, PAD)
                bit = 30
                while (bit >= 0) & (tl.max((held != room).to(tl.int32), 0) > 0):
                    trial = threshold + (1 << bit)
                    reached = tl.sum((key >= trial[:, None]).to(tl.int32), 1)
                    threshold = tl.where(reached >= room, trial, threshold)
                    held = tl.where(reached >= room, reached, held)
                    bit -= 1
                above = open_ & (key > threshold[:, None])
                ties = open_ & (key == threshold[:, None])
                need = room - tl.sum(above.to(tl.int32), 1)
                chosen = (seen & forced) | above | (ties & (tl.cumsum(ties.to(tl.int32), 1) <= need[:, None]))
                place = tl.cumsum(chosen.to(tl.int32), 1) - 1
                out = (head * rows + row_start + r) * most
                tl.store(list_ptr + out[:, None] + place, index + tl.zeros_like(place), mask=chosen & (place < most))
                tl.store(counts_ptr + head * rows + row_start + r, wanted, mask=r < own)
            tl.debug_barrier()


def scored(dim: int, pad: int) -> int:
    """Blocks scored at a time: as many as 100 KB of shared memory hold three times over."""
    return min(64 if dim > 128 else 128, pad)


def select_rows(
    means: Tensor,
    centres: Tensor,
    sequences: Sequences,
    wanted: Tensor,
    most: int,
    *,
    others: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists of the promoted blocks of every query row.

    Args:
        means: mean queries float32 ``[P, Hq, R, D]``.
        centres: c_b ``[P, Hkv, N, D]``, 16-bit.
        sequences: how the sequences lie.
        wanted: blocks to promote, see `wanted_blocks`.
        most: K, room in a list; at least the largest of ``wanted``.
        others: 16-bit ``[B, Hkv, D]``, what stands for c_0 in the scores, or None.
        first: so many first blocks come before all others.
        last: so many last visible blocks come next.
        window: sliding window in tokens.

    Returns:
        Block numbers, ascending, int32 ``[P, Hq, R, K]``, undefined from the count on, and counts int32 ``[P, Hq, R]``.
        Rows that no sequence has promote nothing.

    Raises:
        NotImplementedError: more than `MAX_BLOCKS` blocks in a sequence.
    """
    if sequences.most_blocks > MAX_BLOCKS:
        raise NotImplementedError(
            f"blocks are chosen among at most {MAX_BLOCKS} ({MAX_BLOCKS * BLOCK} keys), got {sequences.most_blocks}"
        )
    parts, heads, rows, dim = means.shape
    pad = max(16, triton.next_power_of_2(sequences.most_blocks))
    tiles = -(-sequences.most_rows // ROWS)
    items = sequences.batch * heads * tiles
    chosen = torch.empty(parts, heads, rows, most, dtype=torch.int32, device=means.device)
    counts = torch.zeros(parts, heads, rows, dtype=torch.int32, device=means.device)
    per_processor = 2 if pad <= HELD else 1  # as many as fit
    programs = min(items, per_processor * multiprocessors(means.device))
    scratch = torch.empty(programs, ROWS, pad, dtype=torch.float32, device=means.device)
    select_rows_kernel[(programs,)](
        means,
        centres,
        centres if others is None else others,
        sequences.spans,
        wanted,
        scratch,
        chosen,
        counts,
        0 if len(wanted) == 1 else wanted.stride(0),
        items,
        tiles,
        rows,
        centres.shape[2],
        most,
        window or 0,
        HQ=heads,
        HKV=centres.shape[1],
        D=dim,
        DP=triton.next_power_of_2(dim),
        CAUSAL=sequences.causal,
        RAGGED=parts == 1,
        WINDOW=window is not None,
        FIRST=first,
        LAST=last,
        SINK=others is not None,
        PAD=pad,
        ROWS=ROWS,
        SUB=max(1, min(ROWS, HELD // pad)),
        BN=scored(dim, pad),
        PORTABLE=interpreted(),
        num_warps=max(4, pad // 1024),
    )
    return chosen, counts


def select_decode(
    q: Tensor,
    centres: Tensor,
    sequences: Sequences,
    wanted: Tensor,
    most: int,
    *,
    others: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`select_rows` for up to 16 new tokens: one list per KV head, by the largest score of all its queries.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``.
        centres: c_b ``[B, Hkv, N, D]``; undefined beyond the end of a sequence.
        sequences: a batch.
        wanted: int32 ``[B or 1, 1]``, see `wanted_blocks`.
        most: K, room in a list.
        others: see `select_rows`.
        first: see `select_rows`.
        last: see `select_rows`.
        window: see `select_rows`.

    Returns:
        As `select_rows`, the same list for every query head of a KV head and both rows that 16 queries may lie in.
    """
    queries, keys = sequences.spans[:, 1].long(), sequences.spans[:, 3].long()
    heads, kv_heads = q.shape[1], centres.shape[1]
    if others is not None:
        centres = torch.cat([others[:, :, None], centres[:, :, 1:]], 2)
    index = torch.arange(centres.shape[2], device=q.device)
    begin, end = decode_bounds(queries, keys, causal=sequences.causal, window=window)
    visible = (index >= begin[:, None]) & (index < end[:, None])  # [B, N]
    grouped = q.float().unflatten(1, (kv_heads, -1))  # [B, Hkv, G, Tq, D]
    scores = (grouped.flatten(2, 3) @ centres.float().mT).unflatten(2, grouped.shape[2:4])
    if sequences.causal:  # queries before position 0 have no say
        hidden = torch.arange(q.shape[2], device=q.device) < (queries - keys)[:, None]
        scores = scores.masked_fill(hidden[:, None, None, :, None], -torch.inf)
    scores = scores.amax((2, 3)).nan_to_num(-torch.inf)  # [B, Hkv, N]
    counts = wanted[:, 0].long().expand(sequences.batch)
    chosen = promote(scores.transpose(0, 1), visible, counts, first=first, last=last).transpose(0, 1)
    order = torch.where(chosen, index, len(index)).sort(-1).values.int()
    order = torch.nn.functional.pad(order, (0, max(0, most - len(index))))[..., :most]
    shape = (sequences.batch, heads, sequences.rows)
    lists = order.repeat_interleave(heads // kv_heads, 1)[:, :, None].expand(*shape, most).contiguous()
    return lists, counts.int()[:, None, None].expand(shape).contiguous()
