"""What the kernels that were released with the paper compute where they differ from its text.

- P is rounded to e2m1 in units of a sixth of the row's *running* maximum, with one constant scale: a group's own maximum is
  never looked at. A weight below a 24th of the largest so far becomes 0. The text's two-level scale (section 3.3) is `paper`.
- The blocks that are not promoted come first, in order; the maximum that P is rounded under is that of those seen so far.
- Every query block promotes the same number of blocks, at least one: the root k of f N (N + 1) = k (2 N + 1 - k), rounded.
- Decode promotes that number, fixed when the prompt was read, however long the answer becomes; the incomplete newest block is
  never promoted.
- A sequence is filled up with keys of zero to a multiple of 64, and in decode nothing hides them: each adds exp(0 - max) to
  the sum.
- mxfp4 takes scales rounded up, 2^ceil(log2(amax / 6)), where OCP MX 1.0 rounds down.

Read from github.com/joesharratt1229/ThriftAttention (csrc/cuda/sm120, src/thriftattention/selection,
integrations/transformers_cache.py); written anew. Left out: their order of sums in 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, Budget, check_choice, fraction
from thrift_attn.reference.budget import promote
from thrift_attn.reference.formats import E2M1_MAX, FORMATS
from thrift_attn.reference.quantize import block_means, round_e2m1, roundtrip
from thrift_attn.reference.scores import mean_score
from thrift_attn.stats import Stats
from thrift_lab.eval.rivals.causal import against, row_chunks, weighted
from thrift_lab.eval.rivals.rival import Cost, Rival


def blocks_for(share: float, blocks: int) -> int:
    """How many of N blocks each query block of a prompt promotes for a share of all causal pairs: at least 1, at most N."""
    if blocks == 0 or share == 0:
        return 0
    if share >= 1:
        return blocks
    half = 2 * blocks + 1
    root = (half - math.sqrt(max(0.0, half * half - 4 * share * blocks * (blocks + 1)))) / 2
    return max(1, min(blocks, round(root)))


def ceiling_mxfp4(x: Tensor, dim: int = -1) -> Tensor:
    """Round to e2m1 in groups of 32 along a dimension under scales that are rounded up to a power of two; float32."""
    groups = x.float().movedim(dim, -1).unflatten(-1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, (amax / E2M1_MAX).log2().ceil().exp2())
    return (round_e2m1(groups / scale) * scale).flatten(-2).movedim(-1, dim)


def _merge(low: Tensor, high: Tensor, low_v: Tensor, high_v: Tensor) -> tuple[Tensor, float]:
    """Put the two passes of a row together.

    Args:
        low: logits ``[H, Q, C]`` of the 4-bit pass, -inf where a key is hidden or its block promoted; C is whole blocks.
        high: those of the 16-bit pass, -inf elsewhere.
        low_v: ``[Hkv, C, D]``.
        high_v: likewise.

    Returns:
        The output ``[H, Q, D]``, and the softmax mass of the 16-bit pass summed over rows.
    """
    by_block = low.unflatten(-1, (-1, BLOCK))
    running = by_block.amax(-1).cummax(-1).values.clamp(min=torch.finfo(low.dtype).min)  # [H, Q, blocks]
    peak = running[..., -1:].maximum(high.amax(-1, keepdim=True))
    p = (by_block - running[..., None]).exp()
    units = (running - peak).exp()[..., None]
    rounded = round_e2m1(p * E2M1_MAX) / E2M1_MAX
    p_high = (high - peak).exp()
    total = (p * units).sum((-2, -1)) + p_high.sum(-1)
    out = weighted((rounded * units).flatten(-2), low_v) + weighted(p_high, high_v)
    return out / total[..., None], float((p_high.sum(-1) / total).sum())


def _padded(x: Tensor) -> Tensor:
    """``[.., T, D]`` filled up with zeros to whole blocks, float32."""
    return torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[-2] % BLOCK))


@dataclass(frozen=True)
class Peer(Rival):
    """The released kernels, see the module.

    Args:
        base_format: nvfp4 or mxfp4.
        budget: a share.
    """

    base_format: str = "nvfp4"
    budget: Budget = field(default_factory=lambda: fraction(0.05))

    def __post_init__(self) -> None:
        check_choice("base_format", self.base_format, Literal["nvfp4", "mxfp4"])
        if self.budget.kind != "fraction":
            raise ValueError(f"the released kernels take a share as budget, got {self.budget}")

    def rounded(self, x: Tensor, dim: int = -1) -> Tensor:
        """Q, K (along D) or V (along tokens, ``dim=-2``) in 4 bits, float32."""
        return roundtrip(x, FORMATS["nvfp4"], dim) if self.base_format == "nvfp4" else ceiling_mxfp4(x, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        if q.shape[1] == k.shape[1]:
            return self._read_prompt(q, k, v, scale)
        outs, stats = [], Stats()
        for at in range(q.shape[1]):
            tokens = k.shape[1] - q.shape[1] + at + 1
            out, one = self._decode(q[:, at], k[:, :tokens], v[:, :tokens], scale, prompt)
            outs.append(out)
            stats += one
        return torch.stack(outs, 1), stats

    def _read_prompt(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Stats]:
        """Every query of a prompt."""
        blocks = -(-k.shape[1] // BLOCK)
        row = torch.arange(blocks, device=q.device)
        visible = row <= row[:, None]
        scores = mean_score(block_means(q).float(), block_means(k).float(), scale)
        counts = visible.sum(-1).clamp(max=blocks_for(self.budget.value, blocks))
        promoted = promote(scores, visible, counts)
        keys, values = _padded(k), _padded(v)
        low_k, low_v = self.rounded(keys), self.rounded(values, -2)
        q_low, query = self.rounded(q.float()), q.float()
        out, mass = torch.empty_like(query), 0.0
        for rows in row_chunks(q, k.shape[1]):
            seen = -(-rows.stop // BLOCK)
            at = torch.arange(rows.start, rows.stop, device=q.device)
            hidden = torch.arange(seen * BLOCK, device=q.device) > at[:, None]
            high = promoted[:, at // BLOCK, :seen].repeat_interleave(BLOCK, -1)
            part = slice(0, seen * BLOCK)
            low = against(q_low[:, rows], low_k[:, part]).mul_(scale).masked_fill_(hidden | high, -torch.inf)
            exact = against(query[:, rows], keys[:, part]).mul_(scale).masked_fill_(hidden | ~high, -torch.inf)
            out[:, rows], high_mass = _merge(low, exact, low_v[:, part], values[:, part])
            mass += high_mass
        pairs = len(q) * int(visible.sum())
        stats = Stats(
            visible=pairs, promoted=int(promoted.sum()), asked=self.budget.value * pairs, mass=mass,
            rows=len(q) * q.shape[1],
        )  # fmt: skip
        return out, stats

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats]:
        """One query ``[H, D]`` over a cache: all query heads of a KV head share one list of blocks."""
        whole = k.shape[1] // BLOCK
        count = min(whole, blocks_for(self.budget.value, -(-prompt // BLOCK)))
        grouped = q.float().unflatten(0, (len(k), -1))  # [Hkv, G, D]
        keys, values = _padded(k), _padded(v)
        promoted = torch.zeros(len(k), keys.shape[1] // BLOCK, dtype=torch.bool, device=q.device)
        if count:
            scores = (grouped @ block_means(k[:, : whole * BLOCK]).float().mT).amax(1)
            promoted.scatter_(1, scores.topk(count).indices, True)
        high = promoted.repeat_interleave(BLOCK, -1)[:, None].expand(-1, grouped.shape[1], -1)
        low = (self.rounded(grouped) @ self.rounded(keys).mT * scale).masked_fill(high, -torch.inf)
        exact = (grouped @ keys.mT * scale).masked_fill(~high, -torch.inf)
        out, mass = _merge(low, exact, self.rounded(values, -2), values)
        heads, blocks = len(q), promoted.shape[1]
        stats = Stats(
            visible=heads * blocks, promoted=int(promoted.sum()) * heads // len(k), asked=self.budget.value * heads * blocks,
            mass=mass, rows=heads,
        )  # fmt: skip
        return out.flatten(0, 1), stats

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        base = FORMATS[self.base_format].bits_per_element(head_dim) / 16
        share = self.budget.value if share is None else share
        means = 1 / (2 * BLOCK)
        return Cost(share + (1 - share) / 4, base + 1 + means, base + share * (1 - base) + means)
