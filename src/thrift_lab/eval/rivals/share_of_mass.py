"""A budget by mass: each row promotes the fewest blocks that hold a share of its softmax mass, by an estimate of it.

The estimate is a row of `thrift_attn.reference.scores.SCORES`: ``mean`` is a logit for a block, whose tokens then weigh alike;
``fp4`` and ``oracle`` are masses, of 4-bit and of exact logits. Everything else is the default form of this package in nvfp4.

Source: top-p selection of blocks: Twilight, arXiv 2502.02770, section 4; FlexPrefill, arXiv 2502.20766, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thrift_attn.config import Compute, ThriftConfig, check_choice, fraction
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference.attention import Mask, attend_planes
from thrift_attn.reference.planes import build_planes
from thrift_attn.stats import Stats
from thrift_lab.eval.config_cost import config_cost
from thrift_lab.eval.rivals.rival import Cost, Rival, check_rate


def fewest_blocks(mass: Tensor, share: float) -> Tensor:
    """How many of the heaviest blocks of each row hold a share of its mass.

    Args:
        mass: ``[H, R, N]``, 0 where a block is not visible.
        share: in [0, 1]; 0 takes none, 1 all that weigh anything.

    Returns:
        int64 ``[H, R]``.
    """
    heaviest = mass.double().sort(-1, descending=True).values
    held = heaviest.cumsum(-1)
    lacking = held - heaviest < share * held[..., -1:] * (1 - 1e-12)
    return (lacking & (heaviest > 0)).sum(-1)


@dataclass(frozen=True)
class ShareOfMass(Rival):
    """Promote by mass, see the module.

    Args:
        mass: share of a row's softmax mass.
        score: the estimate: ``mean``, ``fp4`` or ``oracle``.
        compute: see `ThriftConfig`.
    """

    mass: float = 0.9
    score: str = "mean"
    compute: str = "fp4"

    def __post_init__(self) -> None:
        check_rate("mass", self.mass, 0, 1)
        check_choice("score", self.score, Literal["mean", "fp4", "oracle"])
        check_choice("compute", self.compute, Compute)

    @property
    def config(self) -> ThriftConfig:
        """What is computed, but for the number of blocks."""
        compute: Compute = "16bit" if self.compute == "16bit" else "fp4"
        return ThriftConfig(base_format="nvfp4", budget=fraction(0.5), score=self.score, compute=compute)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        numerics = PrefillNumerics.resolve(self.config)
        planes = build_planes(k, v, numerics, q)
        mask = Mask(q.shape[1], k.shape[1], causal=True, window=None)
        out, _, stats = attend_planes(q, planes, numerics, mask, scale, wanted=self._wanted)
        return out, stats

    def _wanted(self, scores: Tensor, visible: Tensor) -> Tensor:
        mass = scores
        if self.score == "mean":
            mass = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return fewest_blocks(mass.masked_fill(~visible, 0), self.mass)

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        if share is None:
            raise ValueError("what a budget by mass costs depends on the text: give the share of blocks it promoted")
        config = self.config
        return config_cost(config, share, head_dim)
