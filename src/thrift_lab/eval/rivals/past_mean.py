"""This package's form with the mean of earlier queries alone: what it costs not to look ahead.

The default quantises Q less its mean over the whole call, so the noise of a query depends a little on later ones. Here a tile
of queries is quantised less the mean of all queries before it, and the first tile as it is. Everything else is the default form
of this package in nvfp4, whose powers of two of K and V still come from the whole text.

Source of the mean: SageAttention2, arXiv 2411.10958, section 3.1, there of each tile by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, ThriftConfig, fraction
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference.attention import Mask, attend_planes
from thrift_attn.reference.budget import blocks_per_row
from thrift_attn.reference.channel_scales import key_bias
from thrift_attn.reference.planes import Planes, build_planes
from thrift_attn.stats import Stats
from thrift_lab.eval.config_cost import config_cost
from thrift_lab.eval.rivals.rival import Cost, Rival, check_rate


@dataclass(frozen=True)
class PastMean(Rival):
    """See the module.

    Args:
        promoted: share of the blocks that are promoted.
        tile: queries that share a mean, a multiple of 64.
    """

    promoted: float = 0.05
    tile: int = 512

    def __post_init__(self) -> None:
        check_rate("promoted", self.promoted, 0, 1)
        if self.tile < BLOCK or self.tile % BLOCK:
            raise ValueError(f"tile must be a positive multiple of {BLOCK}, got {self.tile!r}")

    @property
    def config(self) -> ThriftConfig:
        """What is computed, but for the mean."""
        return ThriftConfig(base_format="nvfp4", budget=fraction(self.promoted))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        numerics = PrefillNumerics.resolve(self.config)
        whole = build_planes(k, v, numerics)
        work = whole.high_k.dtype
        offset, out, stats = k.shape[1] - q.shape[1], q.new_empty(q.shape, dtype=work), Stats()
        before = q.new_zeros((len(q), q.shape[2]), dtype=work)  # sum of the queries before the tile
        first = offset // BLOCK  # blocks that the first row sees, less one
        seen = torch.arange(first + 1, -(-k.shape[1] // BLOCK) + 1, device=q.device)
        counts = blocks_per_row(self.config.budget, seen, len(whole.k_block_mean[0]))  # of the call: tiles only cut it

        def wanted(scores: Tensor, visible: Tensor) -> Tensor:
            return counts[visible.sum(-1) - 1 - first].expand(scores.shape[:2])

        start = 0
        while start < q.shape[1]:
            stop = min(q.shape[1], (start + offset) // self.tile * self.tile + self.tile - offset)
            planes = _less(whole, k, before / start if start else None, stop + offset)
            mask = Mask(stop - start, stop + offset, causal=True, window=None, decode=False)
            out[:, start:stop], _, found = attend_planes(q[:, start:stop], planes, numerics, mask, scale, wanted=wanted)
            stats += found
            before += q[:, start:stop].to(work).sum(1)
            start = stop
        return out, stats

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        config, share = self.config, self.promoted if share is None else share
        return config_cost(config, share, head_dim)


def _less(whole: Planes, k: Tensor, mean: Tensor | None, keys: int) -> Planes:
    """The planes of the first keys, for queries that are quantised less a mean ``[H, D]``."""
    assert whole.low_k is not None
    assert whole.low_v is not None
    blocks = -(-keys // BLOCK)
    end = blocks * BLOCK
    bias = None
    if mean is not None:
        bias = key_bias(mean, whole.high_k[:, :end], whole.k_block_mean[:, :blocks])
        bias[:, k.shape[1] :] = 0  # padding
    return replace(
        whole,
        low_k=whole.low_k[:, :end],
        low_v=whole.low_v[:, :end],
        high_k=whole.high_k[:, :end],
        high_v=whole.high_v[:, :end],
        k_block_mean=whole.k_block_mean[:, :blocks],
        query_mean=mean,
        key_bias=bias,
    )
