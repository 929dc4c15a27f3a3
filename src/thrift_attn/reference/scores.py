"""How important a KV block is for a block of queries. Every score is float ``[H, R, N]``, higher is more important.

Shapes: H query heads, R query blocks, N KV blocks, G = H / Hkv query heads per KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn.config import BLOCK


def _per_kv_head(queries: Tensor, kv_heads: int) -> Tensor:
    """``[H, R, D]`` to ``[Hkv, G * R, D]``: query heads beside the KV head they read."""
    return queries.unflatten(0, (kv_heads, -1)).flatten(1, 2)


def mean_score(queries: Tensor, centres: Tensor, scale: float) -> Tensor:
    """Logit of the mean query with the block's mean key.

    Args:
        queries: mean query of each query block ``[H, R, D]``.
        centres: c_b ``[Hkv, N, D]``.
        scale: factor of the logits.

    Source: paper section 3.2.
    """
    logits = _per_kv_head(queries, len(centres)) @ centres.mT
    return logits.view(*queries.shape[:2], -1) * scale


def quest_score(queries: Tensor, low: Tensor, high: Tensor, scale: float) -> Tensor:
    """Upper bound of the logit from the block's channel-wise minimum and maximum of K.

    Args:
        queries: ``[H, R, D]``.
        low: channel-wise minimum of K in each block ``[Hkv, N, D]``.
        high: channel-wise maximum ``[Hkv, N, D]``.
        scale: factor of the logits.

    Source: Quest, arXiv 2406.10774, equation 1.
    """
    grouped = _per_kv_head(queries, len(low))
    # max(q*low, q*high) = relu(q)*high - relu(-q)*low, so the bound is two matrix products.
    bound = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
    return bound.view(*queries.shape[:2], -1) * scale


def local_score(heads: int, own: Tensor, blocks: int) -> Tensor:
    """Score the nearest blocks highest: minus the distance in blocks from the row's own.

    Args:
        heads: H.
        own: int64 ``[R]``, the block in which each row's last query sits.
        blocks: N.
    """
    index = torch.arange(blocks, device=own.device)
    return -(index - own[:, None]).abs().float().expand(heads, -1, -1)


def block_extremes(k: Tensor) -> tuple[Tensor, Tensor]:
    """Channel-wise minimum and maximum of every KV block: ``[Hkv, T, D]`` to two ``[Hkv, N, D]``."""
    blocks = -(-k.shape[-2] // BLOCK)
    pad = (0, 0, 0, blocks * BLOCK - k.shape[-2])

    def reduce(fill: float) -> Tensor:
        return torch.nn.functional.pad(k, pad, value=fill).unflatten(-2, (blocks, BLOCK))

    return reduce(torch.inf).amin(-2), reduce(-torch.inf).amax(-2)
