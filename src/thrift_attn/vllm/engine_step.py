"""One step of one layer over a batch as an engine packs it: some sequences decode, others bring a part of their prompt.

All K and V of the step are written before anything is read: a sequence may share pages that another of the same step completes.

A first part of a prompt is attended as `thrift_attn.attention` does, over its K and V as they came. A later one is attended
exactly, its own tokens as they came and those before them tile by tile from pages, and merged where there are several: which
blocks are worth promoting is no question of one tile (`thrift_attn.cache.tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from thrift_attn.cache.tiles import EXACT, attend_part
from thrift_attn.combine import merge
from thrift_attn.config import BLOCK, ThriftConfig
from thrift_attn.interface import attend
from thrift_attn.numerics import DecodeNumerics

TILE_BLOCKS = 512
"""Blocks of the context that are widened to 16 bits at a time, 32,768 tokens: 128 MiB of K and V for 8 heads of 128. What is
behind the last tile is attended with it, so that a context of one tile has nothing to be merged."""


class PromptRow(NamedTuple):
    """A sequence that brings a part of its prompt.

    Args:
        row: its number in the batch.
        start: its first token in the step.
        count: its tokens in the step.
        before: its tokens of earlier steps, or in pages that it shares.
    """

    row: int
    start: int
    count: int
    before: int

    @property
    def tokens(self) -> slice:
        """Its tokens in the step."""
        return slice(self.start, self.start + self.count)

    @property
    def complete(self) -> int:
        """Its complete blocks before the step."""
        return self.before // BLOCK


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The sequences of a step: first those that decode, then those with a part of their prompt.

    Args:
        starts: int32 ``[B + 1]``, where the tokens of each sequence start, and where the last ones end.
        lengths: int32 ``[B]``, tokens of each sequence, the new ones included. A padded row has none.
        page_table: int32 ``[B, NB]``, the page of each block of 64 tokens.
        decoding: sequences that decode.
        most: the most tokens of one of them.
        prompts: the others.

    Raises:
        ValueError: a tensor that is not contiguous.
    """

    starts: Tensor
    lengths: Tensor
    page_table: Tensor
    decoding: int
    most: int
    prompts: list[PromptRow]
    _known: list[tuple[ReferenceType[object], Tensor]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("starts", "lengths", "page_table"):
            if not getattr(self, name).is_contiguous():  # kernels count on it, and a copy would be lost to a graph
                raise ValueError(f"expected a contiguous {name}, got strides {getattr(self, name).stride()}")

    def before(self, run: object) -> Tensor:
        """Tokens of those that decode without the new ones, int32 ``[decoding]``: worked out once for all layers of a run.

        A runner may run the model again with the same rows, whose lengths have gone on in place; and what a graph replays is
        worked out inside it.

        Args:
            run: what stands for one run of the model, the same object in all of its layers.
        """
        if not self._known or self._known[0][0]() is not run:
            found = self.lengths[: self.decoding] - self.starts[: self.decoding + 1].diff()
            self._known[:] = [(ref(run), found)]
        return self._known[0][1]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What a layer computes.

    Args:
        prompts: over K and V just made.
        pages: over pages.
        scale: factor of the logits.
        softcap: bound of the logits, or None.
    """

    prompts: ThriftConfig
    pages: DecodeNumerics
    scale: float
    softcap: float | None


class StepPages(Protocol):
    """The pages and rings of a step's sequences: `thrift_attn.vllm.plain_pages` or `thrift_attn.vllm.kernel_pages`."""

    def kept(self, prompt: PromptRow) -> Tensor:
        """K and V of a sequence behind its complete blocks before the step, ``[2, Hkv, 0 to 63, D]``: a copy."""
        ...

    def append_prompt(self, prompt: PromptRow, k: Tensor, v: Tensor) -> None:
        """Write the K and V of a prompt's new tokens, ``[count, Hkv, D]``."""
        ...

    def append_decoding(self, k: Tensor, v: Tensor) -> None:
        """Write the K and V of all that decode, from packed tokens ``[tokens, Hkv, D]``."""
        ...

    def attend_decoding(self, q: Tensor, out: Tensor) -> None:
        """Attend to all that they hold, from packed queries ``[tokens, Hq, D]`` into an output of that shape."""
        ...

    def tile(self, prompt: PromptRow, blocks: range) -> tuple[Tensor, Tensor]:
        """K and V of some of a sequence's complete blocks in 16 bits, ``[Hkv, tokens, D]`` each."""
        ...


def attend_step(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, rows: StepRows, pages: StepPages, options: LayerOptions
) -> None:
    """Write the K and V of a step and attend.

    Args:
        q: ``[tokens, Hq, D]``; tokens behind those of the last sequence are padding.
        k: ``[tokens, Hkv, D]``.
        v: likewise.
        out: the output, the shape of ``q``; what it holds of padding means nothing.
        rows: which sequence has which tokens.
        pages: what they lie in.
        options: what is computed.
    """
    kept = [pages.kept(prompt) for prompt in rows.prompts]  # before the ring goes on
    for prompt in rows.prompts:
        pages.append_prompt(prompt, k[prompt.tokens], v[prompt.tokens])
    if rows.decoding:
        pages.append_decoding(k, v)
        pages.attend_decoding(q, out)
    for prompt, before in zip(rows.prompts, kept, strict=True):
        own_k, own_v = (
            torch.cat([held, new[prompt.tokens].transpose(0, 1)], 1) for held, new in zip(before, (k, v), strict=True)
        )
        queries = q[prompt.tokens].transpose(0, 1)
        out[prompt.tokens] = _attend_prompt(queries, own_k, own_v, prompt, pages, options).transpose(0, 1)


def _attend_prompt(
    q: Tensor, k: Tensor, v: Tensor, prompt: PromptRow, pages: StepPages, options: LayerOptions
) -> Tensor:
    """Attend ``[Hq, T, D]`` to K and V of the tokens behind complete blocks, and to those blocks."""
    logits = {"scale": options.scale, "softcap": options.softcap}
    if not prompt.complete:
        return attend(q[None], k[None], v[None], config=options.prompts, **logits).out[0]
    last = (prompt.complete - 1) // TILE_BLOCKS * TILE_BLOCKS
    k, v = (
        torch.cat([held, own], 1)
        for held, own in zip(pages.tile(prompt, range(last, prompt.complete)), (k, v), strict=True)
    )
    if not last:
        return attend(q[None], k[None], v[None], config=EXACT, **logits).out[0]
    out, lse = attend_part(q[None], k[None], v[None], **logits)
    for first in range(0, last, TILE_BLOCKS):
        k, v = pages.tile(prompt, range(first, first + TILE_BLOCKS))
        part = attend_part(q[None], k[None], v[None], causal=False, **logits)
        out, lse = merge([out, part[0]], [lse, part[1]])
    return out[0].to(q.dtype)


def rehearse_prompts(q: Tensor, k: Tensor, v: Tensor, options: LayerOptions, *, prompts: int, blocks: int) -> None:
    """Attend as the largest part of a prompt does, so that the engine measures the memory it takes, and its kernels are there.

    Args:
        q: ``[tokens, Hq, D]``, as many as a step may have.
        k: ``[tokens, Hkv, D]``.
        v: likewise.
        options: what is computed.
        prompts: at least one, the most prompts of which a step has a part: of each its incomplete block is kept.
        blocks: at least one, the most blocks of a sequence.
    """
    logits = {"scale": options.scale, "softcap": options.softcap}
    kept = k.new_zeros(prompts, 2, BLOCK - 1, *k.shape[1:])
    own = [torch.cat([kept[0, at], new]) for at, new in enumerate((k, v))]
    del kept  # where prompts are so many, what comes behind is as much smaller
    q, k, v, own_k, own_v = (x.transpose(0, 1)[None] for x in (q, k, v, *own))
    for keys, values in ((k, v), (own_k, own_v)):  # alone, and behind what an earlier step has brought
        attend(q, keys, values, config=options.prompts, **logits)
    tile = k.new_zeros(2, *k.shape[:2], min(TILE_BLOCKS, blocks) * BLOCK, k.shape[3])
    keys, values = (torch.cat([held, new], 2) for held, new in zip(tile, (own_k, own_v), strict=True))
    if blocks <= TILE_BLOCKS:
        attend(q, keys, values, config=EXACT, **logits)
        return
    out, lse = attend_part(q, keys, values, **logits)
    part = attend_part(q, *tile, causal=False, **logits)
    merge([out, part[0]], [lse, part[1]])
