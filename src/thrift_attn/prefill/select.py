"""Which KV blocks every query row promotes, on the device: scores, budget and the choice, without a matrix of all scores.

A row is one query block (`thrift_attn.seq_layout`). Its score for block b is mean(Q) . c_b. The choice equals
`thrift_attn.reference.budget.promote`, ties included.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from thrift_attn.config import BLOCK, Budget
from thrift_attn.crossovers import is_exact
from thrift_attn.dispatch import interpreted, multiprocessors
from thrift_attn.kernels.launcher import launch
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill.bundles import BlockLists, BlockPlan
from thrift_attn.prefill.pack import PackedKV
from thrift_attn.prefill.select_kernel import select_rows_kernel
from thrift_attn.reference.budget import blocks_per_row, list_capacity, promote
from thrift_attn.seq_layout import KeptTensors, SeqLayout

MAX_BLOCKS = 16384
"""Most KV blocks of one sequence: a program holds the scores of a row."""

Q_BLOCKS = 16
"""Query blocks whose scores one program works out at a time."""

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


def decode_bounds(queries: Tensor, keys: Tensor, *, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """First KV block that any query of a sequence sees, and one past the last: int64 ``[B]`` each."""
    queries, keys = queries.long(), keys.long()
    begin = torch.zeros_like(keys)
    if causal and window is not None:
        begin = ((keys - queries).clamp(min=0) + 1 - window).clamp(min=0) // BLOCK
    return begin, -(-keys // BLOCK)


def visible_counts(
    queries: Tensor, keys: Tensor, rows: int, *, shared: bool, causal: bool, window: int | None
) -> Tensor:
    """`visible_blocks`, or where all queries share one row that of this row ``[B, 1]``."""
    if not shared:
        return visible_blocks(queries, keys, rows, causal=causal, window=window)
    begin, end = decode_bounds(queries, keys, causal=causal, window=window)
    return (end - begin)[:, None]


def plan_blocks(
    numerics: PrefillNumerics, layout: SeqLayout, *, window: int | None = None, shared: bool = False
) -> BlockPlan:
    """Work out how many blocks every row of every sequence promotes.

    Args:
        numerics: budget, the least number of a row that sees any block, and which sequences are exact.
        layout: how the sequences lie.
        window: sliding window in tokens.
        shared: whether all queries of a sequence are one row.

    Returns:
        The plan. For sequences of one length ``wanted`` is shared with other calls where `KeptTensors` allows it.
    """
    least, below = numerics.min_blocks, numerics.exact_below
    capacity = max(least, list_capacity(numerics.budget, layout.max_blocks), _exact_capacity(below, layout))
    if layout.lengths is not None:
        rows, device = 1 if shared else layout.max_q_blocks, layout.spans.device
        sizes = numerics.budget, layout.lengths, rows, shared, layout.causal, window, least, below, device
        wanted = _WANTED.get(sizes, device, partial(_wanted_of_one_length, *sizes))
        if wanted is not None:
            return BlockPlan(wanted, capacity, shared)
    rules = {"shared": shared, "causal": layout.causal, "window": window}
    visible = visible_counts(layout.q_len, layout.k_len, layout.max_q_blocks, **rules)
    wanted = blocks_per_row(numerics.budget, visible, -(-layout.k_len.long() // BLOCK))
    if below:
        exact = is_exact(below, layout.k_len, None if layout.end_to_end else layout.q_len)
        wanted = torch.where(exact[:, None], visible, wanted)
    return BlockPlan(wanted.clamp(min=least).minimum(visible).int(), capacity, shared)


def _exact_capacity(exact_below: int, layout: SeqLayout) -> int:
    """Return room for the lists of exact sequences: all that the longest of those that may be exact sees."""
    if layout.lengths is not None:
        queries, keys = layout.lengths
        return layout.max_blocks if is_exact(exact_below, keys, queries) else 0
    fewest = (layout.max_q_blocks - 2) * BLOCK + 1  # queries of a batch with so many rows
    if not layout.end_to_end and is_exact(exact_below, layout.max_blocks * BLOCK, fewest):
        return layout.max_blocks
    return min(layout.max_blocks, -(-exact_below // BLOCK))


_WANTED = KeptTensors()


def _wanted_of_one_length(
    budget: Budget,
    lengths: tuple[int, int],
    rows: int,
    shared: bool,
    causal: bool,
    window: int | None,
    least: int,
    exact_below: int,
    device: torch.device,
) -> Tensor:
    queries, keys = (torch.tensor([x], device="cpu") for x in lengths)
    visible = visible_counts(queries, keys, rows, shared=shared, causal=causal, window=window)[0]
    wanted = blocks_per_row(budget, visible, -(-lengths[1] // BLOCK))
    if is_exact(exact_below, lengths[1], lengths[0]):
        wanted = visible
    return wanted.clamp(min=least).minimum(visible).int()[None].to(device)


def blocks_scored_at_once(dim: int, pad: int) -> int:
    """Return how many blocks are scored at a time: as many as 100 KB of shared memory hold three times over."""
    return min(64 if dim > 128 else 128, pad)


def select_rows(
    q_block_mean: Tensor,
    packed: PackedKV,
    *,
    layout: SeqLayout,
    plan: BlockPlan,
    force_first: int = 0,
    force_last: int = 0,
    window: int | None = None,
) -> BlockLists:
    """Lists of the promoted blocks of every query row.

    Args:
        q_block_mean: mean queries float32 ``[P, Hq, R, D]``.
        packed: read are c_b and, where the first token is exact, what stands for c_0.
        layout: how the sequences lie.
        plan: how many blocks each row promotes.
        force_first: so many first blocks come before all others.
        force_last: so many last visible blocks come next.
        window: sliding window in tokens.

    Raises:
        NotImplementedError: more than `MAX_BLOCKS` blocks in a sequence.
    """
    if layout.max_blocks > MAX_BLOCKS:
        raise NotImplementedError(
            f"blocks are chosen among at most {MAX_BLOCKS} ({MAX_BLOCKS * BLOCK} keys), got {layout.max_blocks}"
        )
    _, heads, q_blocks, dim = q_block_mean.shape
    k_block_mean, block0_mean = packed.k_block_mean, packed.block0_mean
    wanted, capacity, _ = plan
    pad = max(16, triton.next_power_of_2(layout.max_blocks))
    tiles = -(-layout.max_q_blocks // Q_BLOCKS)
    items = layout.batch * heads * tiles
    lists = BlockLists(
        torch.empty(*q_block_mean.shape[:3], capacity, dtype=torch.int32, device=q_block_mean.device),
        torch.zeros(q_block_mean.shape[:3], dtype=torch.int32, device=q_block_mean.device),
    )
    per_processor = 2 if pad <= HELD else 1  # as many as fit
    programs = min(items, per_processor * multiprocessors(q_block_mean.device))
    scratch = torch.empty(programs, Q_BLOCKS, pad, dtype=torch.float32, device=q_block_mean.device)
    launch(
        select_rows_kernel,
        (programs,),
        q_block_mean,
        k_block_mean,
        k_block_mean if block0_mean is None else block0_mean,
        layout.spans,
        wanted,
        scratch,
        *lists,
        0 if len(wanted) == 1 else wanted.stride(0),
        items,
        tiles,
        q_blocks,
        k_block_mean.shape[2],
        capacity,
        window or 0,
        HQ=heads,
        HKV=k_block_mean.shape[1],
        D=dim,
        DP=triton.next_power_of_2(dim),
        CAUSAL=layout.causal,
        ONE_BATCH=layout.packed_batch == 1,
        WINDOW=window is not None,
        FIRST=force_first,
        LAST=force_last,
        SINK=block0_mean is not None,
        PAD=pad,
        Q_BLOCKS=Q_BLOCKS,
        SUB=max(1, min(Q_BLOCKS, HELD // pad)),
        BN=blocks_scored_at_once(dim, pad),
        PORTABLE=interpreted(),
        num_warps=max(4, pad // 1024),
    )
    return lists


def select_shared(
    q: Tensor,
    packed: PackedKV,
    *,
    layout: SeqLayout,
    plan: BlockPlan,
    force_first: int = 0,
    force_last: int = 0,
    window: int | None = None,
) -> BlockLists:
    """`select_rows` for up to 16 new tokens: one list per KV head, by the largest score of all its queries.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``.
        packed: see `select_rows`; c_b is undefined beyond the end of a sequence.
        layout: of a batch.
        plan: see `select_rows`, with one column.
        force_first: see `select_rows`.
        force_last: see `select_rows`.
        window: see `select_rows`.

    Returns:
        The same list for every query head of a KV head. 16 queries may lie in two rows; with a window the second row
        leaves out blocks before those that it sees.
    """
    queries, keys = layout.q_len.long(), layout.k_len.long()
    k_block_mean = packed.k_block_mean
    heads, kv_heads = q.shape[1], k_block_mean.shape[1]
    if packed.block0_mean is not None:
        k_block_mean = torch.cat([packed.block0_mean[:, :, None], k_block_mean[:, :, 1:]], 2)
    index = torch.arange(k_block_mean.shape[2], device=q.device)
    begin, end = decode_bounds(queries, keys, causal=layout.causal, window=window)
    visible = (index >= begin[:, None]) & (index < end[:, None])  # [B, N]
    grouped = q.float().unflatten(1, (kv_heads, -1))  # [B, Hkv, G, Tq, D]
    scores = (grouped.flatten(2, 3) @ k_block_mean.float().mT).unflatten(2, grouped.shape[2:4])
    if layout.causal:  # queries before position 0 have no say
        hidden = torch.arange(q.shape[2], device=q.device) < (queries - keys)[:, None]
        scores = scores.masked_fill(hidden[:, None, None, :, None], -torch.inf)
    scores = scores.amax((2, 3)).nan_to_num(-torch.inf)  # [B, Hkv, N]
    counts = plan.wanted[:, 0].long().expand(layout.batch)
    chosen = promote(scores.transpose(0, 1), visible, counts, first=force_first, last=force_last).transpose(0, 1)
    chosen = chosen[:, :, None].expand(-1, -1, layout.q_blocks, -1)  # [B, Hkv, R, N]
    if layout.causal and window is not None:
        first_row = (keys - queries).div(BLOCK, rounding_mode="floor")
        row = (first_row[:, None] + torch.arange(layout.q_blocks, device=q.device)) * BLOCK
        row_begin = (row + 1 - window).clamp(min=0) // BLOCK  # [B, R], the first block that the attention kernel walks
        chosen = chosen & (index >= row_begin[..., None])[:, None]
    order = torch.where(chosen, index, len(index)).sort(-1).values.int()
    order = torch.nn.functional.pad(order, (0, max(0, plan.capacity - len(index))))[..., : plan.capacity]
    every_head = (order.repeat_interleave(heads // kv_heads, 1), chosen.sum(-1).repeat_interleave(heads // kv_heads, 1))
    return BlockLists(every_head[0].contiguous(), every_head[1].int().contiguous())
