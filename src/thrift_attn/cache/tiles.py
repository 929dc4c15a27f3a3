"""A later part of a prompt over a cache, tile by tile: room for a few thousand tokens in 16 bits, however many the cache holds.

Over all of a sequence at once the prompt would be attended by the rules of prefill, which choose promoted blocks among all
that a query sees. Tiles cannot: what is chosen in one depends on the scores of the others. So what is attended in tiles is
attended exactly, over the plane of high precision, and no budget is spent; parts over disjoint keys merge to the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thrift_attn.cache.paged import PagedThriftCache
from thrift_attn.combine import merge
from thrift_attn.config import BLOCK, ThriftConfig, fraction
from thrift_attn.crossovers import EVERYWHERE
from thrift_attn.interface import attend

TILE = 8192
"""Tokens of a sequence that are widened to 16 bits at a time: 32 MiB of K and V for 8 heads of 128."""

EXACT = ThriftConfig(
    budget=fraction(1.0),
    promoted_storage="16bit",
    center="none",
    smooth="none",
    sink_token="none",
    exact_below=EVERYWHERE,
)
"""Every block in 16 bits, by whoever computes exact attention with its log-sum-exp: nothing is quantised."""


def attend_in_tiles(
    cache: PagedThriftCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tile: int = TILE,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact attention of many new tokens over what a cache holds and over themselves; append them afterwards.

    Args:
        cache: the cache, without the new tokens.
        q: ``[B, Hq, T, D]``, queries of the new tokens.
        k: ``[B, Hkv, T, D]``, their K as it came.
        v: likewise.
        tile: tokens of each sequence that are widened at a time, a multiple of 64: memory for K and V of so many.
        scale: factor of the logits; 1/sqrt(D) by default.
        softcap: logits become softcap * tanh(logits / softcap).
        backend: for `thrift_attn.attention`.

    Returns:
        The output ``[B, Hq, T, D]``, and the log-sum-exp ``[B, Hq, T]``, natural logarithm.

    Raises:
        ValueError: shapes that do not fit the cache, or a tile that is no multiple of 64.

    Source: partial results over disjoint keys, `thrift_attn.combine.merge`.
    """
    if tile < BLOCK or tile % BLOCK:
        raise ValueError(f"tile must be a multiple of {BLOCK} tokens, got {tile}")
    if k.shape[:2] != (cache.batch, cache.kv_heads) or k.shape[3] != cache.head_dim:
        want = f"[{cache.batch}, {cache.kv_heads}, T, {cache.head_dim}]"
        raise ValueError(f"k must have shape {want}, got {list(k.shape)}")
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    before = [cache.tokens(seq) for seq in range(cache.batch)]
    out, lse = attend_part(q, k, v, causal=True, **options)
    for start in range(0, max(before), tile):
        seqs = [seq for seq, tokens in enumerate(before) if tokens > start]
        held = [min(before[seq] - start, tile) for seq in seqs]
        index = torch.tensor(seqs, device=q.device)
        keys, values = (x[index] for x in cache.widen(start=start, most=tile))
        lengths = None if min(held) == keys.shape[2] else torch.tensor(held, device=q.device)
        part = attend_part(q[index], keys, values, kv_lengths=lengths, causal=False, **options)
        out[index], lse[index] = merge([out[index], part[0]], [lse[index], part[1]])
    return out.to(q.dtype), lse


def attend_part(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Exact attention to some of the keys, to be merged: at least in float32, so that parts are rounded to 16 bits once each.

    Args:
        q: ``[B, Hq, T, D]``.
        k: ``[B, Hkv, Tk, D]``.
        v: likewise.
        **options: of `thrift_attn.interface.attend`.

    Returns:
        The output ``[B, Hq, T, D]``, and the log-sum-exp ``[B, Hq, T]``, natural logarithm.
    """
    found = attend(q, k, v, config=EXACT, return_lse=True, **options)
    if found.lse is None:
        raise RuntimeError("attention was asked for its log-sum-exp and gave none")
    return found.out.to(torch.promote_types(found.out.dtype, torch.float32)), found.lse
