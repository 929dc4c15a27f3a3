"""From a budget to the number of promoted KV blocks of each query row."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, Budget


def blocks_per_row(budget: Budget, visible: Tensor, blocks: int | Tensor) -> Tensor:
    """Return the number of promoted KV blocks of each query row: the one rule of budgets, for prefill and decode.

    A `fraction` gives every row of a sequence the same real-valued number of blocks, the level (as far as the row sees that
    many), such that the total is the asked share of all visible pairs. Rounding is carried from row to row, so that the
    total is right within half a block. The level solves ``sum(min(level, visible)) == total`` exactly, since the sum is
    piecewise linear in it. Nothing is copied to the host.

    A `floored` budget gives every row what its share gives, and at least its floor or all that the row sees, whichever is less.
    Where the level is above the floor that is the fraction, exact in total; below it every row has the floor.

    Args:
        budget: the budget.
        visible: int64 ``[..., R]``, the number of KV blocks each row of query blocks sees, in order; rows that a sequence
            does not have see 0.
        blocks: N, the number of KV blocks of each sequence (for the paper's rule), an int or int64 ``[...]``.

    Returns:
        int64 ``[..., R]``, between 0 and ``visible``.

    Source: design of the budget: paper section 3; `fraction`: docs/method.md.
    """
    if budget.kind == "top_k":
        return visible.clamp(max=int(budget.value))
    if budget.kind == "paper":
        whole = torch.as_tensor(blocks, device=visible.device)
        return visible.minimum((whole // BLOCK).clamp(min=1).unsqueeze(-1))
    counts = visible.double()
    ends = (_real_blocks(budget.value, counts).cumsum(-1) + 0.5).floor().long()
    shared = torch.diff(ends, prepend=torch.zeros_like(ends[..., :1])).minimum(visible)
    return shared.maximum(visible.clamp(max=budget.blocks))


def _real_blocks(share: float, counts: Tensor) -> Tensor:
    """Blocks of each row before rounding: the level, or all that it sees, float64 like ``counts`` ``[..., R]``."""
    total = share * counts.sum(-1, keepdim=True)
    ordered = counts.sort(-1).values
    rows = counts.shape[-1]
    below = ordered.cumsum(-1) - ordered
    left = torch.arange(rows, 0, -1, device=counts.device, dtype=counts.dtype)
    first = (below + ordered * left < total).sum(-1, keepdim=True)  # rows that the level exceeds
    at = first.clamp(max=rows - 1)
    level = (total - below.gather(-1, at)) / (rows - at)
    return counts.minimum(torch.where(first == rows, ordered[..., -1:], level))


def list_capacity(budget: Budget, blocks: int) -> int:
    """Return an upper limit of `blocks_per_row` for rows that see at most ``blocks`` blocks, at least 1.

    The share of rows grows concavely with the level, so the level is at most fraction * blocks; carried rounding adds 1.
    """
    if budget.kind in ("fraction", "floored"):
        return max(1, min(max(math.floor(budget.value * blocks) + 2, budget.blocks), blocks))
    return max(1, int(blocks_per_row(budget, torch.tensor([blocks]), blocks)))


def decode_budget(budget: Budget, max_blocks: int) -> Tensor:
    """Promoted blocks of a single query row by the number of blocks it sees, as the kernels look it up.

    Returns:
        int32 ``[max_blocks + 1]``: entry n equals ``blocks_per_row(budget, [n], n)``.
    """
    seen = torch.arange(max_blocks + 1)
    return blocks_per_row(budget, seen[:, None], seen)[:, 0].int()


def blocks_in_decode(tokens: int, *, new_tokens: int = 1, window: int | None = None) -> range:
    """The complete KV blocks of a cached sequence that its newest tokens see: what decode lists and counts.

    Args:
        tokens: length of the sequence, the new tokens included.
        new_tokens: Tq; the query of the first of them sees furthest back.
        window: tokens that a query sees, itself included; None for all.
    """
    start = 0 if window is None else max(tokens - new_tokens - window + 1, 0) // BLOCK
    return range(start, max(start, tokens // BLOCK))


def promoted_in_decode(budget: Budget, tokens: int, *, new_tokens: int = 1, window: int | None = None) -> int:
    """How many complete KV blocks of a cached sequence each KV head promotes in one step of decode.

    The rule, for kernels and references alike: each KV head has one list, which all its query heads and all new tokens
    share. Of the n complete blocks that any new token sees (`blocks_in_decode`) it promotes as many as the budget gives to a
    row that sees n blocks (`blocks_per_row`). Which ones: the forced first blocks; then the forced last ones; then those of
    the largest score, ties to the lower index. The score of a block is the *largest* logit q.c_b over all query heads of
    the KV head and all new tokens, whether or not a window shows the block to each of them; where the first token is
    exact, block 0 is scored by the mean of its other tokens.

    The incomplete newest block is held in 16 bits and attended exactly: it costs no budget and is not counted. It does count
    as the newest of the forced last blocks, so that with ``force_last=1`` the last complete block is forced only where no
    incomplete one follows it. An exact first token is no block: it neither costs budget nor changes the count.

    Args:
        budget: the budget.
        tokens: length of the sequence, the new tokens included.
        new_tokens: Tq.
        window: tokens that a query sees, or None.
    """
    return _single_row(budget, len(blocks_in_decode(tokens, new_tokens=new_tokens, window=window)))[0]


def asked_in_decode(budget: Budget, tokens: int, *, new_tokens: int = 1, window: int | None = None) -> float:
    """How many blocks the budget asks for where `promoted_in_decode` gives whole ones."""
    return _single_row(budget, len(blocks_in_decode(tokens, new_tokens=new_tokens, window=window)))[1]


@lru_cache(maxsize=4096)
def _single_row(budget: Budget, seen: int) -> tuple[int, float]:
    """Blocks of the only row of a sequence that sees ``seen``: promoted, and asked for. Every layer asks in every step."""
    visible = torch.tensor([seen])
    return int(blocks_per_row(budget, visible, seen)), seen * asked_share(budget, visible, seen)


def asked_share(budget: Budget, visible: Tensor, blocks: int) -> float:
    """The share of visible pairs that the budget asks for, before rounding to whole blocks."""
    if budget.kind == "fraction":
        return float(budget.value)
    if budget.kind == "floored":
        counts = visible.double()
        asked = _real_blocks(budget.value, counts).maximum(counts.clamp(max=budget.blocks))
        return float(asked.sum() / counts.sum().clamp(min=1))
    return float(blocks_per_row(budget, visible, blocks).sum() / visible.sum().clamp(min=1))


def promote(
    scores: Tensor,
    visible: Tensor,
    counts: Tensor,
    *,
    first: int = 0,
    last: int = 0,
    own: Tensor | None = None,
    can: Tensor | None = None,
) -> Tensor:
    """Choose the promoted KV blocks: forced ones first, then the highest scores, ties to the lower index.

    Where the budget is below the forced blocks, those nearest to the beginning go first, then those nearest to the row's own.

    Args:
        scores: float ``[H, R, N]``, higher is more important.
        visible: bool ``[R, N]``.
        counts: int64 ``[R]`` or ``[H, R]``, blocks to promote in each row, see `blocks_per_row`.
        first: the blocks with an index below this come before all others wherever they are visible.
        last: so many of the other blocks come next, those nearest to the row's own, of two equally near the earlier one.
            Under a causal mask these are the last visible ones.
        own: int64 ``[R]``, the block in which each row's last query sits; by default the last visible one.
        can: bool ``[H, R, N]``, the visible blocks that can be promoted at all; by default all of them.

    Returns:
        bool ``[H, R, N]``, True where the block is promoted.
    """
    blocks = scores.shape[-1]
    index = torch.arange(blocks, device=scores.device)
    if own is None:
        own = torch.where(visible, index, -1).amax(-1)
    distance = 2 * (index - own[:, None]).abs() - (index < own[:, None]).long()  # the earlier of two is nearer
    distance = torch.where(visible & (index >= first), distance, 2 * blocks + 2)
    rank = distance.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    tier = 1 + (last - rank).clamp(min=0)  # [R, N]: 1 by score, above it the forced near ones
    tier = torch.where(index < first, first - index + last + 1, tier)
    can = visible.expand_as(scores) if can is None else can
    tier = torch.where(can, tier, 0)  # 0 hidden
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_tier = tier.expand_as(scores).gather(-1, by_score).argsort(dim=-1, descending=True, stable=True)
    order = by_score.gather(-1, by_tier)
    chosen = (index < counts[..., None]).expand_as(scores)
    return torch.zeros_like(chosen).scatter(-1, order, chosen) & can
