"""Which KV blocks every query row promotes, on the device: scores, budget and the choice, without a matrix of all scores.

A row is 64 queries (`thrift_attn.seq_layout`). Its score for block b is mean(Q) . c_b. The choice equals
`thrift_attn.reference.budget.promote`, ties included.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from thrift_attn.config import BLOCK, Budget
from thrift_attn.dispatch import interpreted, multiprocessors
from thrift_attn.kernels.launcher import launch
from thrift_attn.prefill.select_kernel import select_rows_kernel
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
    launch(
        select_rows_kernel,
        (programs,),
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
