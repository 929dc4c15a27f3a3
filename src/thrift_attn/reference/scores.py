"""How important a KV block is for a block of queries. Every score is float ``[H, R, N]``, higher is more important.

Shapes: H query heads, R query blocks, N KV blocks, G = H / Hkv query heads per KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, use_scores
from thrift_attn.reference.formats import FORMATS
from thrift_attn.reference.quantize import roundtrip


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


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may look at. Where the first token is exact, it is replaced by the mean of the others of its block.

    Args:
        queries: mean query of each query block ``[H, R, D]``; in decode every query by itself ``[H, Tq, D]``.
        k_block_mean: c_b ``[Hkv, N, D]``.
        keys: K in high precision ``[Hkv, T, D]``.
        own: int64 ``[R]``, the block in which each row's last query sits.
        scale: factor of the logits.
        true_mass: works out the softmax mass of every pair under exact attention ``[H, R, N]``, or with ``(queries, keys)``
            under attention whose Q and K these functions have rounded.
    """

    queries: Tensor
    k_block_mean: Tensor
    keys: Tensor
    own: Tensor
    scale: float
    true_mass: Callable[..., Tensor]


def four_bit_mass(inputs: ScoreInputs) -> Tensor:
    """Softmax mass of every pair ``[H, R, N]`` under the logits of 4-bit Q and K.

    K is rounded less its mean over all tokens, which softmax does not see.

    Source: SALE, arXiv 2505.24179, section 3.2; there in int4, here in nvfp4.
    """
    shared = inputs.keys.mean(-2, keepdim=True)
    return inputs.true_mass(
        lambda queries: roundtrip(queries, FORMATS["nvfp4"]), lambda keys: roundtrip(keys - shared, FORMATS["nvfp4"])
    )


@dataclass(frozen=True)
class Score:
    """One row of the table of scores.

    Args:
        of: the score of `ScoreInputs`, ``[H, R, N]``; in decode ``[H, Tq, N]`` or ``[H, 1, N]``.
        in_decode: how the query heads and new tokens of a KV head, which share one list, are taken together.
    """

    of: Callable[[ScoreInputs], Tensor]
    in_decode: Literal["max", "sum"] = "max"


SCORES: dict[str, Score] = {
    "mean": Score(lambda x: mean_score(x.queries, x.k_block_mean, x.scale)),
    "quest": Score(lambda x: quest_score(x.queries, *block_extremes(x.keys), x.scale)),
    "local": Score(lambda x: local_score(len(x.queries), x.own, x.k_block_mean.shape[1])),
    "oracle": Score(lambda x: x.true_mass(), in_decode="sum"),
    "fp4": Score(four_bit_mass, in_decode="sum"),
}
"""Scores by the name that ``ThriftConfig(score=)`` takes. A new score is a function of this file and a row here."""

use_scores(SCORES)
