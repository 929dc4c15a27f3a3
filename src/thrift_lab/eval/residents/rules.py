"""Rules by which a KV head decides which of its blocks keep their residual: what counts, how it fades, how many there are.

The rule of a cache (`thrift_attn.reference.residents`) is ``Rule()``; every other one changes a part of it. A rule follows a
text chunk by chunk: the queries of a chunk count for the blocks that they see, then the chunk is packed as a new block, with
its residual, and where that is one too many the resident of least merit gives it up: for good, or until it is asked for again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.reference.residents import DECAY, FLOOR, NEWEST, group_scores
from thrift_lab.records import explain


class Evidence(NamedTuple):
    """What one chunk of 64 queries of a layer tells about the n complete blocks before it.

    Args:
        queries: ``[Hkv, G, 64, D]``.
        scored: ``[Hkv, n, D]``, means of the blocks.
        mass: ``[Hkv, G * 64, n]``, the attention of every query to every block.
        scale: factor of the logits.
    """

    queries: Tensor
    scored: Tensor
    mass: Tensor
    scale: float


def _of_group(seen: Evidence) -> Tensor:
    means = seen.queries.mean(2).flatten(0, 1)[:, None]  # [Hq, 1, D]
    return BLOCK * group_scores(means, seen.scored, seen.scale)[:, 0].softmax(-1)


def _of_heads(seen: Evidence) -> Tensor:
    logits = seen.queries.mean(2) @ seen.scored.mT * seen.scale  # [Hkv, G, n]
    return BLOCK * logits.softmax(-1).sum(1)


def _of_queries(seen: Evidence) -> Tensor:
    logits = seen.queries.flatten(1, 2) @ seen.scored.mT * seen.scale  # [Hkv, G * 64, n]
    return logits.softmax(-1).sum(1)


def _of_attention(seen: Evidence) -> Tensor:
    return seen.mass.sum(1)


def _of_eighth(seen: Evidence) -> Tensor:
    by_query = seen.mass.unflatten(1, (-1, BLOCK))  # [Hkv, G, 64, n]
    return 8 * by_query[:, :, 7::8].sum((1, 2))


def _of_nothing(seen: Evidence) -> Tensor:
    return seen.scored.new_zeros(seen.scored.shape[:2])


COUNTED: dict[str, Callable[[Evidence], Tensor]] = {
    "group": _of_group,
    "heads": _of_heads,
    "queries": _of_queries,
    "attention": _of_attention,
    "eighth": _of_eighth,
    "nothing": _of_nothing,
}
"""What a chunk adds to the mass of each block, ``[Hkv, n]``.

group
    softmax over blocks of the largest block score of the query heads of a KV head, for the mean query of the chunk.
heads
    the sum over query heads of each one's softmax over its block scores, for the mean query of the chunk.
queries
    the same for every query of the chunk by itself.
attention
    the attention that the blocks had: their part of the sums of the softmax, added over queries.
eighth
    the same of every eighth query only.
nothing
    so the newest blocks stay.
"""


class Rule(BaseModel):
    """A rule; the defaults are those of the cache at the share that meets its target of memory.

    Args:
        share: of the blocks that keep their residual, for each KV head.
        floor: blocks up to which all of a text keep theirs; no floor for a share of 0.
        newest: so many of the newest blocks keep theirs whatever their mass.
        counts: what a chunk adds to the mass of a block, see `COUNTED`.
        gather: ``"sum"`` adds it; ``"max"`` takes the larger of it and what there was.
        decay: what is left of mass after a chunk.
        error: blocks are ranked by mass times what they lose without their residual: the squared error of their K, of their V,
            or of logits (`thrift_lab.eval.residents.packed_blocks.block_error`); ``"none"``: by mass alone.
        among: whether each KV head has the quota, or the heads of a layer share theirs.
        planes: what the residual refines. Of K or of V alone it takes half the bytes, so the same bytes are twice the share.
        seed: of random choice: mass is then not looked at.
        dropped: ``"lost"``, or ``"host"``: what is given up lies in the memory of the host, and blocks whose merit is among the
            largest have theirs back for the next chunk.

    Raises:
        ValueError: a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.15, ge=0, le=1)
    floor: int = Field(default=FLOOR, ge=1)
    newest: int = Field(default=NEWEST, ge=1)
    counts: Literal["group", "heads", "queries", "attention", "eighth", "nothing"] = "group"
    gather: Literal["sum", "max"] = "sum"
    decay: float = Field(default=DECAY, ge=0, le=1)
    error: Literal["none", "k", "v", "logits"] = "none"
    among: Literal["head", "layer"] = "head"
    planes: Literal["kv", "k", "v"] = "kv"
    seed: int | None = None
    dropped: Literal["lost", "host"] = "lost"

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read what `str` writes: ``OPTION=VALUE,...``; an empty text is the rule of the cache.

        Raises:
            ValueError: something else.
        """
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if any(not equals for _, equals, _ in pairs):
            raise ValueError(f"a rule is OPTION=VALUE,... with options {', '.join(cls.model_fields)}, got {text!r}")
        try:
            return cls.model_validate({name.strip(): value.strip() for name, _, value in pairs})
        except ValidationError as error:
            raise ValueError(f"{text!r} is no rule: {explain(error)}") from error

    def __str__(self) -> str:
        changed = {name: value for name, value in self if value != type(self).model_fields[name].default}
        return ",".join(f"{name}={value}" for name, value in ({"share": self.share} | changed).items())

    @property
    def plane_share(self) -> float:
        """Bytes of its residual over those of one of K and V."""
        return len(self.planes) / 2

    def quota(self, blocks: int) -> int:
        """How many of a text's complete blocks keep their residual, for each KV head."""
        if self.share == 0:
            return 0
        return min(blocks, max(math.ceil(self.share * blocks - 1e-9), self.floor))


class Residents:
    """The blocks of one layer that have their residual, chunk by chunk.

    Args:
        rule: which.
        shape: KV heads and blocks.
        error: what a block loses without its residual ``[Hkv, N]``, looked at once it is packed; None: all alike.
        layer: number of the layer, so that random choice differs between layers.
        device: of what a chunk adds.

    Attributes:
        held: bool ``[Hkv, N]``, the residents so far.
        fetched: blocks that had their residual back from the host, of all KV heads.
    """

    def __init__(
        self,
        rule: Rule,
        shape: tuple[int, int],
        *,
        error: Tensor | None = None,
        layer: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.rule, self._error, self.fetched = rule, error, 0
        self.held = torch.zeros(shape, dtype=torch.bool, device=device)
        self._mass = torch.zeros(shape, device=device)
        self._random = None
        if rule.seed is not None:  # drawn on the host: the same on every device
            drawn = torch.rand(shape, generator=torch.Generator().manual_seed(rule.seed + 1000 * layer))
            self._random = drawn.to(device)

    def note(self, gained: Tensor) -> None:
        """Let a chunk add ``gained`` ``[Hkv, n]`` to the n blocks before it, then pack it as block n."""
        rule, new = self.rule, gained.shape[1]
        mass = self._mass[:, :new] * rule.decay
        self._mass[:, :new] = mass + gained if rule.gather == "sum" else mass.maximum(gained)
        merit = self._mass if self._random is None else self._random
        if self._error is not None:
            merit = merit * self._error
        index = torch.arange(self.held.shape[1], device=self.held.device)
        candidates = self.held | (index == new) if rule.dropped == "lost" else (index <= new).expand_as(self.held)
        before, self.held = self.held, _keep(merit, candidates, new, rule)
        if rule.dropped == "host":
            self.fetched += int((self.held & ~before)[:, :new].sum())


def _keep(merit: Tensor, candidates: Tensor, new: int, rule: Rule) -> Tensor:
    """The residents bool ``[Hkv, N]`` once block ``new`` is packed: the quota's number of candidates of largest merit.

    Of equal ones the later stays, as in `thrift_attn.reference.residents.keep`.
    """
    heads, blocks = candidates.shape
    index = torch.arange(blocks, device=candidates.device)
    merit = merit.masked_fill((index > new - rule.newest) & (index <= new), torch.inf).masked_fill(
        ~candidates, -torch.inf
    )
    groups = heads if rule.among == "head" else 1
    # Blocks from the last to the first, the heads of a group side by side: sorting is stable.
    ranked = merit.flip(-1).unflatten(0, (groups, -1)).mT.flatten(1)  # [groups, N * heads of a group]
    room = rule.quota(new + 1) * heads // groups
    first = ranked.argsort(dim=-1, descending=True, stable=True)[:, :room]
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, first, True)
    return chosen.unflatten(1, (blocks, -1)).mT.flatten(0, 1).flip(-1) & candidates
