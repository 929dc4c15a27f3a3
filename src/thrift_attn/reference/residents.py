"""Which blocks of a cached sequence keep their plane of high precision: quota, past mass and the choice, in plain PyTorch.

A cache holds the base plane of every block and the plane of promoted blocks (a residual or a 16-bit copy) of a share of them:
the *residents* of each KV head. A block that is no resident is read in 4 bits. The rule, for kernels and reference alike:

- a sequence of n complete blocks has a quota of residents for each KV head (`quota_table`);
- a block is a resident when it is packed. Where that is one more than the quota, the resident with the least past mass is given
  up, the earlier of two equal ones; the newest `NEWEST` blocks stay;
- past mass is the attention that a block has had: a sum over queries of softmax(scores), which fades by `DECAY` in 64 queries;
- blocks that sequences share (a fork, a common prefix) stay what they are: they are neither given up nor does their mass move.

Source: keeping what attention has favoured: Heavy-Hitter Oracle (arXiv 2306.14048), which drops the others; measured here in
docs/method.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, Budget
from thrift_attn.reference.budget import decode_budget

FLOOR = 32
"""Blocks up to which all of a sequence are residents."""

NEWEST = 3
"""Newest complete blocks that are residents whatever their mass: few queries have seen them."""

OWN = NEWEST + 1
"""Residents that a sequence may have of the blocks that it alone holds, however many those that it shares have."""

DECAY = 0.97
"""What is left of past mass after 64 queries."""

CHUNK_BYTES = 2**28
"""Room for the scores of some query blocks at a time."""


def quota_table(share: float, budget: Budget, max_blocks: int) -> Tensor:
    """How many residents a sequence has for each KV head, by the number of its complete blocks.

    The share of them, rounded up, at least `FLOOR` blocks and as many as the budget promotes, or all; none for a share of 0.

    Returns:
        int32 ``[max_blocks + 1]``, never falling.
    """
    blocks = torch.arange(max_blocks + 1)
    if share == 0:
        return torch.zeros_like(blocks).int()
    quota = torch.ceil(blocks.double() * share - 1e-9).clamp(min=FLOOR)
    return quota.maximum(decode_budget(budget, max_blocks).cummax(0).values.double()).minimum(blocks.double()).int()


def slots_of_pool(quota: Tensor, pages: int, batch: int) -> int:
    """Slots for the residents of all sequences over ``pages`` pages.

    Enough for ``batch`` sequences that share nothing, of any lengths, with some over for forks; never more than pages.

    Args:
        quota: `quota_table`.
        pages: in the pool.
        batch: sequences.
    """
    quota = quota[: pages + 1]  # no sequence has more blocks than there are pages
    most = len(quota) - 1
    if not most or not int(quota[-1]):
        return 1 if most else 0  # a plane has at least one slot
    whole = int((quota == torch.arange(most + 1)).nonzero()[-1])  # blocks up to which all are residents
    share = int(quota[-1]) / most
    return min(pages, math.ceil(share * pages) + (batch - 1) * whole + 2 * OWN * batch)


def own_quota(quota: int, shared: int, own_blocks: int) -> int:
    """Residents that a sequence may have of the blocks that it alone holds.

    Args:
        quota: of the whole sequence.
        shared: residents that it has at most of those that others hold too: as many as it shares slots, or blocks.
        own_blocks: complete blocks that no other sequence holds.
    """
    return max(quota - shared, min(quota, own_blocks, OWN))


def fade(queries: int | Tensor) -> float | Tensor:
    """What is left of past mass after so many more queries."""
    return DECAY ** (queries / BLOCK)


def step_mass(scores: Tensor) -> Tensor:
    """What one query adds to the past mass of each block.

    Args:
        scores: ``[Hkv, N]``, the largest logit q.c_b of the query heads of each KV head, natural units.

    Returns:
        ``[Hkv, N]``, the softmax over blocks; numbers that are none count as 0.
    """
    return scores.float().softmax(-1).nan_to_num(0.0)


def group_scores(q: Tensor, k_block_mean: Tensor, scale: float) -> Tensor:
    """Largest logit of the query heads of each KV head: q ``[Hq, R, D]``, means ``[Hkv, N, D]`` to float32 ``[Hkv, R, N]``."""
    kv_heads = len(k_block_mean)
    grouped = q.float().unflatten(0, (kv_heads, -1)).flatten(1, 2)  # [Hkv, G * R, D]
    logits = grouped @ k_block_mean.float().mT * scale
    return logits.unflatten(1, (-1, q.shape[1])).amax(1)


def prompt_mass(mass: Tensor, q: Tensor, k_block_mean: Tensor, *, start: int, scale: float) -> Tensor:
    """Past mass after the queries of a prompt, or of a chunk of one.

    The queries of a block count by their mean, as they do in the selection of prefill, and see the complete blocks up to their
    own.

    Args:
        mass: float32 ``[Hkv, N]``, past mass of the N complete blocks, the new ones included (0).
        q: ``[Hq, T, D]``, queries of the tokens from ``start`` on.
        k_block_mean: ``[Hkv, N, D]``, what blocks are scored by.
        start: position of the first query.
        scale: factor of the logits.

    Returns:
        ``[Hkv, N]``.
    """
    blocks, tokens = mass.shape[1], q.shape[1]
    if not blocks or not tokens:
        return mass
    first, last = start // BLOCK, (start + tokens - 1) // BLOCK
    block = (start + torch.arange(tokens, device=q.device)) // BLOCK
    sizes = torch.bincount(block - first)  # [R] queries of each block
    sums = torch.zeros(len(q), last - first + 1, q.shape[-1], dtype=torch.float32, device=q.device)
    means = sums.index_add_(1, block - first, q.float()) / sizes[:, None]
    # A query block's own share fades by the queries that came after it.
    after = sizes.flip(0).cumsum(0).flip(0) - sizes
    weight = sizes * fade(after)
    mass = mass * fade(tokens)
    index = torch.arange(blocks, device=q.device)
    rows = max(1, CHUNK_BYTES // (4 * len(q) * blocks))
    for begin in range(0, last - first + 1, rows):
        part = slice(begin, begin + rows)
        scores = group_scores(means[:, part], k_block_mean, scale)
        own = first + torch.arange(begin, begin + scores.shape[1], device=q.device)
        scores = scores.masked_fill(index > own[:, None], -torch.inf)
        mass = mass + (scores.softmax(-1).nan_to_num(0.0) * weight[part, None]).sum(1)
    return mass


def keep(mass: Tensor, held: Tensor, *, new: int, shared: int, quota: int, shrink: bool = False) -> Tensor:
    """Which blocks are residents once new blocks are packed.

    Args:
        mass: float32 ``[Hkv, N]``, past mass of the complete blocks.
        held: bool ``[Hkv, N]``, the residents so far; False at the new blocks.
        new: how many of the last blocks are new.
        shared: how many of the first blocks other sequences hold too; they stay what they are.
        quota: `own_quota`.
        shrink: whether residents beyond the quota are given up; else a sequence keeps as many as it has.

    Returns:
        bool ``[Hkv, N]``.
    """
    blocks = mass.shape[1]
    index = torch.arange(blocks, device=mass.device)
    own = index >= shared
    candidates = (held | (index >= blocks - new)) & own
    room = (held & own).sum(-1, keepdim=True).clamp(min=quota, max=quota if shrink else None)
    rank_by = mass.masked_fill(index >= blocks - NEWEST, torch.inf).masked_fill(~candidates, -torch.inf)
    # Of equal ones the later stays: sorted from the end, stable.
    order = rank_by.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, index.expand_as(order).contiguous()).flip(-1)
    return (candidates & (rank < room)) | (held & ~own)
