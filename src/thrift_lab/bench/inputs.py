"""Q, K and V of a case: random, but with the shape of real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_lab.bench.cases import Case

BIAS, TOPIC, NOISE, QUERY = 1.0, 1.0, 0.5, 2.0
"""Standard deviations: of the constant part of K, of what a block of K has in common, of the rest of K, and of Q."""

WORDS = (
    f"normal V; K = constant per head (std {BIAS}) + topic per block (std {TOPIC}) + noise (std {NOISE}); Q of std {QUERY}: "
    "the block sums of softmax mass are log-normal, so a few blocks hold most of it. No kernel's work depends on the values."
)


@dataclass(frozen=True)
class Inputs:
    """Several independent sets of the same case, so that repeated steps do not find their data in L2.

    Args:
        case: the case.
        q: per set ``[B, Hq, Tq, D]``.
        k: per set ``[B, pages * 64, Hkv, D]``; tokens from ``case.kv`` on are not part of the sequence.
        v: like ``k``.
    """

    case: Case
    q: list[Tensor] = field(repr=False)
    k: list[Tensor] = field(repr=False)
    v: list[Tensor] = field(repr=False)

    @property
    def sets(self) -> int:
        """Number of sets."""
        return len(self.q)


def sets_for(case: Case, l2: int, most: int = 48) -> int:
    """Sets needed so that even the smallest cache (about 0.28 of the 16-bit one) is four times the L2 in all.

    Args:
        case: the case.
        l2: bytes of L2.
        most: upper limit.
    """
    smallest = 0.28 * 2 * case.plain_elements
    return min(most, max(1, math.ceil(4 * l2 / smallest)))


def make_inputs(case: Case, *, sets: int = 1, device: torch.device | str = "cuda", seed: int = 0) -> Inputs:
    """Random inputs, the same for the same seed and device.

    Args:
        case: the case.
        sets: independent copies.
        device: where.
        seed: of the first set.
    """
    queries, keys, values = [], [], []
    for at in range(sets):
        generator = torch.Generator(device).manual_seed(seed + at)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=case.torch_dtype)

        shape = (case.batch, case.blocks, BLOCK, case.kv_heads, case.head_dim)
        k = normal(*shape).mul_(NOISE)
        k += TOPIC * normal(case.batch, case.blocks, 1, case.kv_heads, case.head_dim)
        k += BIAS * normal(case.kv_heads, case.head_dim)
        keys.append(k.flatten(1, 2))
        values.append(normal(*shape).flatten(1, 2))
        queries.append(QUERY * normal(case.batch, case.q_heads, case.tq, case.head_dim))
    return Inputs(case, queries, keys, values)
