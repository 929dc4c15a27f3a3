"""A band along the diagonal in MXFP8, and the first tile too; NVFP4 elsewhere; V and P in 16 bits.

Q and K are quantised twice: in MXFP8 (e4m3 in groups of 32 with scales that are powers of two) for tiles of 128 x 128 within
``band`` tokens of the diagonal or among the first ``first`` keys, and in NVFP4 for the others, there under a float32 scale for
each token that maps its largest channel to 448 * 6.

Source: Diagonal-Tiled Mixed-Precision Attention, arXiv 2604.03950, section 3, and its kernels, which keep V in 16 bits.
A cache has to hold K in both formats only for what a tile of new queries can still see in the band.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thrift_attn.reference.formats import E2M1_MAX, E4M3_MAX, FORMATS
from thrift_attn.reference.quantize import roundtrip
from thrift_attn.stats import Stats
from thrift_lab.eval.rivals.causal import Sides, attend_sides
from thrift_lab.eval.rivals.rival import Cost, Rival

TILE = 128


def mxfp8(x: Tensor) -> Tensor:
    """Round ``[..., D]`` to MXFP8: e4m3, groups of 32, scales 2^(floor(log2 amax) - 8) (OCP MX 1.0); float32."""
    groups = x.float().unflatten(-1, (-1, min(32, x.shape[-1])))
    amax = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, (amax.log2().floor() - 8).exp2())
    return ((groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def nvfp4_by_token(x: Tensor) -> Tensor:
    """Round ``[..., T, D]`` to NVFP4 under a float32 scale for each token; float32."""
    peak = x.float().abs().amax(-1, keepdim=True)
    scale = torch.where(peak == 0, 1.0, peak / (E4M3_MAX * E2M1_MAX))
    return roundtrip(x.float() / scale, FORMATS["nvfp4"]) * scale


@dataclass(frozen=True)
class DiagonalBand(Rival):
    """MXFP8 within ``band`` tokens of the diagonal and among the first ``first`` keys, whole tiles; NVFP4 elsewhere."""

    band: int = 128
    first: int = 128

    def __post_init__(self) -> None:
        for name in ("band", "first"):
            value = getattr(self, name)
            if value < 0 or value % TILE:
                raise ValueError(f"{name} must be a multiple of {TILE} tokens, got {value}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        visible = in_band = 0

        def better(position: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal visible, in_band
            tile = position // TILE - column // TILE
            chosen = (tile < self.band // TILE) | (column < self.first)
            seen = column <= position
            visible += len(q) * int(seen.sum())
            in_band += len(q) * int((seen & chosen).sum())
            return chosen, torch.ones_like(chosen)

        value = v.float()
        sides = Sides(nvfp4_by_token(k), value, mxfp8(k), value)
        out = attend_sides(mxfp8(q), sides, scale, better, low_q=nvfp4_by_token(q))
        return out, Stats(visible=visible, promoted=in_band, asked=in_band, rows=len(q) * q.shape[1])

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        held = min(1.0, (self.band + self.first) / tokens)
        share = held if share is None else share
        logits = share / 2 + (1 - share) / 4  # rates of FP8 and FP4
        low = FORMATS["nvfp4"].bits_per_element(head_dim) + 32 / head_dim
        k_read = held * 8.25 + (1 - held) * low
        return Cost((logits + 1) / 2, (low + held * 8.25 + 16) / 32, (k_read + 16) / 32)
