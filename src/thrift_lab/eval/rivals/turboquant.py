"""TurboQuant: a random rotation makes every channel of a token nearly normal, and one codebook fits all.

A token's K (or V) is stored as its length in 16 bits and, after the rotation, the nearest entry of a codebook for each channel
of the direction. The codebook is that of Lloyd and Max for a normal distribution of variance 1 / D, which the channels of a
random direction approach.

Source: TurboQuant, arXiv 2504.19874, section 3.1 and algorithm 1 (the quantiser of least squared error). Its second quantiser,
unbiased for inner products, gives one of its bits to signs of a projection; with the same bits its squared error is larger.
Expected squared error of a unit vector: 0.117, 0.0345 and 0.0095 for 2, 3 and 4 bits (theorem 1: 0.117, 0.03 and 0.009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from thrift_attn.stats import Stats
from thrift_lab.eval.rivals.causal import attend_dense
from thrift_lab.eval.rivals.rival import Cost, Rival, check_rate


@lru_cache(maxsize=8)
def codebook(bits: int) -> tuple[float, ...]:
    """Lloyd's and Max's 2^bits levels for the normal distribution of variance 1, ascending."""
    normal = torch.distributions.Normal(0.0, 1.0)
    count = 2**bits
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(2) * torch.erfinv(2 * at - 1)
    edge = torch.full((1,), 40.0, dtype=torch.float64)
    for _ in range(5000):
        edges = torch.cat([-edge, (levels[1:] + levels[:-1]) / 2, edge])
        density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
        moved = (density[:-1] - density[1:]) / normal.cdf(edges).diff()
        done = float((moved - levels).abs().max()) < 1e-12
        levels = moved
        if done:
            break
    return tuple(levels.tolist())


@lru_cache(maxsize=8)
def rotation(head_dim: int, seed: int) -> Tensor:
    """A random orthogonal matrix ``[D, D]``, float32, the same on every machine."""
    drawn = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).float()


@dataclass(frozen=True)
class TurboQuant(Rival):
    """TurboQuant with ``bits`` a channel; ``seed`` of its rotation."""

    bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate("bits", self.bits, 1, 6)

    def rounded(self, x: Tensor) -> Tensor:
        """What the cache holds of K or V ``[..., T, D]``, float32."""
        turn = rotation(x.shape[-1], self.seed).to(x.device)
        levels = torch.tensor(codebook(self.bits), dtype=torch.float32, device=x.device)
        length = x.float().norm(dim=-1, keepdim=True)
        turned = (x.float() / torch.where(length == 0, 1, length)) @ turn.mT * x.shape[-1] ** 0.5
        nearest = levels[torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)]
        return (nearest * x.shape[-1] ** -0.5) @ turn * length.half().float()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        return attend_dense(q, self.rounded(k), self.rounded(v), scale), None

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        stored = (self.bits + 16 / head_dim) / 16
        return Cost(1.0, stored, stored)
