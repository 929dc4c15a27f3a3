"""KIVI: K in groups of tokens by channel, V in groups of channels by token, asymmetric integers, the newest tokens in 16 bits.

Source: KIVI, arXiv 2402.02750, section 3.2 and algorithm 1: ``x^ = round((x - min) / s) * s + min`` with
``s = (max - min) / (2^bits - 1)``, groups of 32, a residual of 128 tokens. Of K the residual is what is left over of whole runs
of 128 tokens; of V it is always the last 128. Minimum and step are 16-bit numbers: one bit an element more in groups of 32.

The rule is applied to every query of a text as it would be when its token is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thrift_attn.stats import Stats
from thrift_lab.eval.rivals.causal import Sides, attend_sides
from thrift_lab.eval.rivals.rival import Cost, Rival, check_rate


@dataclass(frozen=True)
class Kivi(Rival):
    """KIVI with ``bits`` an element, groups of ``group`` and ``residual`` newest tokens in 16 bits."""

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        check_rate("bits", self.bits, 1, 8)
        check_rate("group", self.group, 2, 128)
        check_rate("residual", self.residual, self.group, 4096)
        if self.residual % self.group:
            raise ValueError(f"residual must be a multiple of group, got {self.residual} and {self.group}")

    def rounded(self, x: Tensor, dim: int) -> Tensor:
        """Round ``[..., T, D]`` in groups along a dimension, float32; a last group that is not whole stays as it is."""
        x = x.float().movedim(dim, -1)
        whole = x.shape[-1] // self.group * self.group
        groups = x[..., :whole].unflatten(-1, (-1, self.group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        low, step = low.half().float(), ((high - low) / (2**self.bits - 1)).half().float()
        codes = ((groups - low) / torch.where(step == 0, 1, step)).round().clamp(0, 2**self.bits - 1)
        return torch.cat([(codes * step + low).flatten(-2), x[..., whole:]], -1).movedim(-1, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        if k.shape[-1] % self.group:
            raise NotImplementedError(f"KIVI needs a head dim that is a multiple of {self.group}, got {k.shape[-1]}")

        def newest(position: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
            tokens = position + 1
            return column >= tokens // self.residual * self.residual, column >= tokens - self.residual

        sides = Sides(self.rounded(k, -2), self.rounded(v, -1), k.float(), v.float())
        return attend_sides(q.float(), sides, scale, newest), None

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        packed = (self.bits + 32 / self.group) / 16
        newest = min(
            1.0, (self.residual / 2 + self.residual) / 2 / tokens
        )  # of K half of a run on average, of V a whole one
        held = packed + (1 - packed) * newest
        return Cost(1.0, held, held)
