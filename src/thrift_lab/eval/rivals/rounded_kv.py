"""A cache that rounds K and V of every token in one format and computes in 16 bits: FP8 and NVFP4 as servers have them.

fp8kv: e4m3. ``scales="head"`` gives each KV head of K and of V one scale, amax / 448 over all its tokens (a calibration that
has seen the text, which favours it); ``scales="one"`` stores the numbers as they are, which is what vLLM does without a
calibrated checkpoint.

nvfp4kv: e2m1 in groups of 16 along the head dim of one token, K and V alike, since a token is stored when it comes, with e4m3
scales under one float32 scale a head. ``scales="max"`` maps the largest of a group to 6; ``scales="best"`` is Four Over Six
(arXiv 2512.02010, section 3): each group takes 6 or 4, whichever has the smaller squared error, and the float32 scale leaves
room for that, 256 where the other has 448.

Sources: OCP 8-bit floating point 1.0; NVFP4 as in arXiv 2512.02010, section 2; vLLM's ``kv_cache_dtype``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thrift_attn.config import check_choice
from thrift_attn.reference.formats import E2M1_MAX, E4M3_MAX, FORMATS
from thrift_attn.reference.quantize import roundtrip
from thrift_attn.stats import Stats
from thrift_lab.eval.rivals.causal import attend_dense
from thrift_lab.eval.rivals.rival import Cost, Rival

_BEST_ROOM = 256.0
"""Largest e4m3 scale where a group may also map its largest element to 4: 256 * 6 / 4 = 384 is still an e4m3 number."""


def _peak(x: Tensor) -> Tensor:
    """Largest magnitude of each head ``[Hkv, 1, 1]``; 1 where a head is zero."""
    peak = x.float().abs().amax((-2, -1), keepdim=True)
    return torch.where(peak == 0, 1.0, peak)


@dataclass(frozen=True)
class Fp8KV(Rival):
    """K and V in e4m3, see the module."""

    scales: str = "head"

    def __post_init__(self) -> None:
        check_choice("scales", self.scales, Literal["head", "one"])

    def rounded(self, x: Tensor) -> Tensor:
        """What the cache holds of K or V ``[Hkv, T, D]``, float32."""
        scale = _peak(x) / E4M3_MAX if self.scales == "head" else torch.ones((), device=x.device)
        return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        return attend_dense(q, self.rounded(k), self.rounded(v), scale), None

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        return Cost(1.0, 0.5, 0.5)


@dataclass(frozen=True)
class Nvfp4KV(Rival):
    """K and V in nvfp4 along the head dim, see the module."""

    scales: str = "max"

    def __post_init__(self) -> None:
        check_choice("scales", self.scales, Literal["max", "best"])

    def rounded(self, x: Tensor) -> Tensor:
        """What the cache holds of K or V ``[Hkv, T, D]``, float32."""
        best = self.scales == "best"
        scale = _peak(x) / (E2M1_MAX * (_BEST_ROOM if best else E4M3_MAX))
        return roundtrip(x.float() / scale, FORMATS["nvfp4"], best=best) * scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        return attend_dense(q, self.rounded(k), self.rounded(v), scale), None

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        stored = FORMATS["nvfp4"].bits_per_element(head_dim) / 16
        return Cost(1.0, stored, stored)
