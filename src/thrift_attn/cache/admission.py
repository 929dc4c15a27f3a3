"""What attention has favoured so far, and which new blocks are residents by it, where the kernels of a step do not decide.

Prompts and chunks bring their queries when they are appended; steps on a CPU when they attend. The rule is that of
`thrift_attn.reference.residents`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn.cache.sequences import CacheSequences
from thrift_attn.config import BLOCK
from thrift_attn.reference.quantize import block_means, mean_of_others
from thrift_attn.reference.residents import fade, group_scores, prompt_mass, step_mass


def admit_blocks(cache: CacheSequences, seq: int, k: Tensor, queries: Tensor | None, scale: float) -> Tensor | None:
    """Decide which of the blocks that a sequence is about to complete are residents.

    Args:
        cache: with pages for these blocks, its length still that before them.
        seq: the sequence.
        k: ``[Hkv, n * 64, D]``, keys of the n blocks.
        queries: ``[Hq, T, D]`` of all new tokens, or None: then no block gains past mass, and the last of the new are favoured.
        scale: factor of the logits.

    Returns:
        int64 ``[n, Hkv]``, the slots of the blocks, below 0 for those that are no residents; None where every block is one.
    """
    slots = cache.residual_slots
    if slots is None:
        return None
    tokens, new = cache.table.tokens(seq), k.shape[1] // BLOCK
    old = tokens // BLOCK
    pages = cache.table.table[seq, : old + new].long()
    mass = torch.nn.functional.pad(slots.mass(pages[:old]), (0, new))
    if queries is not None:
        means = block_means(k)
        if not old and cache.numerics.exact_sink:
            means = torch.cat([mean_of_others(k)[:, None], means[:, 1:]], 1)
        means = torch.cat([_scored_means(cache, seq, pages[:old]), means], 1)
        mass = prompt_mass(mass, queries, means, start=tokens, scale=scale)
    return slots.admit(seq, pages, new, mass)


def note_queries(cache: CacheSequences, seq: int, queries: Tensor, scale: float) -> None:
    """Let the queries of tokens that are about to be appended count for the complete blocks.

    Args:
        cache: before it holds the tokens.
        seq: the sequence.
        queries: ``[Hq, T, D]``.
        scale: factor of the logits.
    """
    slots, pages = cache.residual_slots, cache.table.pages(seq)
    if slots is None or not len(pages):
        return
    means = _scored_means(cache, seq, pages)
    start = cache.table.tokens(seq)
    slots.set_mass(seq, pages, prompt_mass(slots.mass(pages), queries, means, start=start, scale=scale))


def note_step(cache: CacheSequences, seq: int, q: Tensor, scale: float) -> None:
    """Let a step of decode count by its first query, which is never a draft: q ``[Hq, Tq, D]``."""
    slots = cache.residual_slots
    pages = cache.table.pages(seq)
    if slots is None or not len(pages):
        return
    scores = group_scores(q[:, :1], _scored_means(cache, seq, pages), scale)[:, 0]
    slots.set_mass(seq, pages, slots.mass(pages) * fade(1) + step_mass(scores))


def _scored_means(cache: CacheSequences, seq: int, pages: Tensor) -> Tensor:
    """What the first blocks of a sequence are scored by, ``[Hkv, n, D]``."""
    means = cache.pool.k_block_mean[pages].transpose(0, 1)
    if not len(pages) or not cache.numerics.exact_sink:
        return means
    return torch.cat([cache.per_sequence.block0_mean[seq][:, None], means[:, 1:]], 1)
