"""One forward pass of a model over a cache that keeps residuals by some rule, without the cache.

Chunk i of 64 tokens attends to the blocks before it as a cache holds them then, in 4 bits with or without their residual, and
to itself exactly; then its queries count, and it is packed. Blocks do not change between: within a layer only the choice goes
from chunk to chunk, and a whole text takes one call. Packing is that of the cache (`thrift_attn.reference.pages`), so bytes and
rounding are the same, and for the rule of `thrift_attn.reference.residents` so are the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, Budget
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.budget import decode_budget, promote
from thrift_attn.reference.residents import group_scores
from thrift_lab.eval.residents.packed_blocks import LostError, block_error, pack
from thrift_lab.eval.residents.rules import COUNTED, Evidence, Residents, Rule
from thrift_lab.eval.rivals.inside_model import attending
from thrift_lab.eval.rivals.rival import Cost, Rival


@dataclass
class Followed:
    """What became of the blocks of the layers that were attended, by one rule.

    Args:
        rule: the rule.
        residents: at the end of the text, bool ``[Hkv, N]`` of each layer.
        mass: attention that complete blocks had, summed over layers.
        found: attention that those with a residual had.
        error: squared error of the outputs of heads, relative to their size, that blocks leave as the rule has them, summed
            over heads and layers; only of rules that were followed beside the one that was attended by.
        most: the same without any residual.
        fetched: blocks that had their residual back from the host, of all layers and KV heads.
    """

    rule: Rule
    residents: list[Tensor] = field(default_factory=list)
    mass: float = 0.0
    found: float = 0.0
    error: float = 0.0
    most: float = 0.0
    fetched: int = 0

    @property
    def share(self) -> float:
        """Share of the blocks that keep their residual at the end."""
        return float(torch.stack([layer.float().mean() for layer in self.residents]).mean())


@dataclass(frozen=True)
class ThroughPages(Rival):
    """Attention in chunks of 64 tokens over blocks that keep their residual by a rule.

    Args:
        rule: which blocks.
        numerics: how blocks are stored.
        budget: how many complete blocks of each KV head are read with their residual, by the largest block score as in
            decode; None: all that have one.
        beside: rules that are followed through the same queries, keys and values without being attended by.
    """

    rule: Rule
    numerics: DecodeNumerics
    budget: Budget | None = None
    beside: tuple[Rule, ...] = ()
    followed: list[Followed] = field(default_factory=list)
    """By ``rule`` and by those beside it, in this order; filled by each call."""

    def __post_init__(self) -> None:
        self.followed.extend(map(Followed, (self.rule, *self.beside)))

    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        raise NotImplementedError("an emulation has no cost of its own")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, None]:
        """Attend to a whole text: q ``[Hq, T, D]``, k and v ``[Hkv, T, D]``, T a multiple of 64; in float32 at least."""
        given = q.dtype
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        heads, tokens, _ = k.shape
        if q.shape[1] != tokens or tokens % BLOCK:
            raise ValueError(
                f"expected a whole text of a multiple of {BLOCK} tokens, got {q.shape[1]} queries of {tokens}"
            )
        packed = pack(k, v, self.numerics)
        count = tokens // BLOCK
        queries = q.unflatten(0, (heads, -1)).unflatten(2, (count, BLOCK))  # [Hkv, G, N, 64, D]
        budget = None if self.budget is None else decode_budget(self.budget, count)
        every = [
            Residents(
                x.rule, (heads, count), error=block_error(x.rule.error, packed, queries, scale), layer=len(x.residents),
                device=k.device,
            )
            for x in self.followed
        ]  # fmt: skip
        residents = every[0]
        lost = LostError(packed, queries.shape[1], len(self.followed)) if self.beside else None
        # As attention finds them: exact, then packed. Keys are transposed, [Hkv, D, T], since products with them are faster.
        keys, values = k.mT.contiguous(), v.clone()
        refined = torch.zeros(
            2, heads, count, dtype=torch.bool, device=k.device
        )  # which blocks have their residual there
        hidden = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=k.device).triu(1)
        out = torch.empty_like(queries)
        for block in range(count):
            start, stop = block * BLOCK, (block + 1) * BLOCK
            want = residents.held
            if budget is not None:
                want = self._promoted(queries[:, :, block], packed.scored, want, block, int(budget[block]), scale)
            for plane, name in enumerate("kv"):
                wanted = want & (name in self.rule.planes)
                head, at = (wanted != refined[plane]).nonzero(as_tuple=True)
                data = torch.where(
                    wanted[head, at, None, None], packed.high[plane, head, at], packed.low[plane, head, at]
                )
                if name == "k":
                    keys.unflatten(2, (count, BLOCK))[head, :, at] = data.mT
                else:
                    values.unflatten(1, (count, BLOCK))[head, at] = data
                refined[plane] = wanted
            rows = queries[:, :, block].flatten(1, 2)  # [Hkv, G * 64, D]
            logits = (rows @ keys[:, :, :stop]).mul_(scale)
            logits.unflatten(1, (-1, BLOCK))[..., start:].masked_fill_(hidden, -torch.inf)
            weights = logits.softmax(-1)
            out[:, :, block] = (weights @ values[:, :stop]).unflatten(1, (-1, BLOCK))
            mass = weights[..., :start].unflatten(-1, (block, BLOCK)).sum(-1)  # [Hkv, G * 64, block]
            if lost is not None:
                lost.add(rows, weights, out[:, :, block], [(x.held, x.rule.planes) for x in every], block, scale)
            seen = Evidence(queries[:, :, block], packed.scored[:, :block], mass, scale)
            gained = {name: COUNTED[name](seen) for name in {x.rule.counts for x in every}}
            by_block = mass.sum(1)
            for one, followed in zip(every, self.followed, strict=True):
                followed.mass += float(by_block.sum())
                followed.found += float((by_block * one.held[:, :block]).sum())
                one.note(gained[one.rule.counts])
            # The block is packed now: without its residual, until the next chunk asks for it.
            keys[:, :, start:stop], values[:, start:stop] = packed.low[0, :, block].mT, packed.low[1, :, block]
        for i, (one, followed) in enumerate(zip(every, self.followed, strict=True)):
            followed.residents.append(one.held)
            followed.fetched += one.fetched
            if lost is not None:
                followed.error += lost.left(i)
                followed.most += lost.most()
        return out.flatten(2, 3).flatten(0, 1).to(given), None

    def _promoted(self, queries: Tensor, scored: Tensor, held: Tensor, seen: int, most: int, scale: float) -> Tensor:
        """The residents ``[Hkv, N]`` that a chunk ``[Hkv, G, 64, D]`` reads with their residual: those of the largest score."""
        means = queries.mean(2).flatten(0, 1)[:, None]  # [Hq, 1, D]
        scores = group_scores(means, scored, scale)  # [Hkv, 1, N]
        visible = (torch.arange(held.shape[1], device=held.device) < seen)[None]
        counts = held.sum(-1, keepdim=True).clamp(max=most)
        return promote(scores, visible, counts, first=self.numerics.force_first, can=held[:, None])[:, 0]


@contextmanager
def emulating(
    model: Any, rule: Rule, numerics: DecodeNumerics, budget: Budget | None = None, beside: tuple[Rule, ...] = ()
) -> Iterator[list[Followed]]:
    """The model with its texts going through such a cache inside the block; see `ThroughPages`.

    A call has to be one whole text of a multiple of 64 tokens, as for `thrift_lab.eval.rivals.inside_model.attending`.

    Yields:
        What the rule kept, and those beside it.
    """
    through = ThroughPages(rule, numerics, budget, beside)
    with attending(model, through):
        yield through.followed
