"""One step of one layer over a batch as an engine packs it: some sequences decode, others bring a part of their prompt.

All K and V of the step are written before anything is read: a sequence may share pages that another of the same step completes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.combine import merge
from thrift_attn.config import BLOCK, ThriftConfig
from thrift_attn.interface import attend
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.paged_rows import SharedPages, append_row, attend_row, read_row

TILE_BLOCKS = 128
"""Blocks of the context that are widened to 16 bits at a time when a later part of a prompt is attended: 8,192 tokens."""


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


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The sequences of a step: first those that decode, then those with a part of their prompt.

    Args:
        starts: int32 ``[B + 1]``, where the tokens of each sequence start, and where the last ones end.
        lengths: int32 ``[B]``, tokens of each sequence, the new ones included. A padded row has none.
        page_table: int32 ``[B, NB]``, the page of each block of 64 tokens.
        decoding: sequences that decode: up to `thrift_attn.config.DECODE_ROWS` tokens each.
        prompts: the others.
    """

    starts: Tensor
    lengths: Tensor
    page_table: Tensor
    decoding: int
    prompts: list[PromptRow]


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


class Prompt(NamedTuple):
    """What a part of a prompt attends to: its own tokens, those before them in their block, and complete blocks in pages."""

    at: slice  # its tokens in the step
    k: Tensor  # [Hkv, T, D] of the tokens behind complete blocks
    v: Tensor
    complete: int  # blocks
    pages: Tensor  # int64 [NB]


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    rows: StepRows,
    rings: Tensor,
    layer: SharedPages,
    options: LayerOptions,
) -> None:
    """Write the K and V of a step and attend, on a CPU.

    Args:
        q: ``[tokens, Hq, D]``; tokens behind the last sequence are padding.
        k: ``[tokens, Hkv, D]``.
        v: likewise.
        out: the output, the shape of ``q``; padding is left alone.
        rows: which sequence has which tokens.
        rings: int32 ``[B]``, the ring of each sequence.
        layer: what the sequences lie in.
        options: what is computed.
    """
    starts, lengths, ring_of = rows.starts.tolist(), rows.lengths.tolist(), rings.tolist()
    pages = rows.page_table.long()
    prompts = [_gather(k, v, one, pages[one.row], ring_of[one.row], layer) for one in rows.prompts]
    for row, (first, last) in enumerate(pairwise(starts)):
        if last > first:
            new_k, new_v = (x[first:last].transpose(0, 1) for x in (k, v))
            before = lengths[row] - (last - first)
            append_row(layer, pages[row], ring_of[row], new_k, new_v, before=before, numerics=options.pages)
    for row in range(rows.decoding):
        first, last = starts[row : row + 2]
        if last > first:
            queries = q[first:last].transpose(0, 1)
            found, _ = attend_row(
                queries, layer, pages[row], ring_of[row],
                tokens=lengths[row], numerics=options.pages, scale=options.scale, softcap=options.softcap,
            )  # fmt: skip
            out[first:last] = found.transpose(0, 1)
    for prompt in prompts:
        out[prompt.at] = _attend_prompt(q[prompt.at].transpose(0, 1), prompt, layer, options).transpose(0, 1)


def _gather(k: Tensor, v: Tensor, one: PromptRow, pages: Tensor, ring: int, layer: SharedPages) -> Prompt:
    """Take what a prompt attends to in 16 bits, while its ring still holds what came before."""
    at, kept = slice(one.start, one.start + one.count), layer.kept(ring, one.before)
    own_k, own_v = (torch.cat([old, new[at].transpose(0, 1)], 1) for old, new in zip(kept, (k, v), strict=True))
    return Prompt(at, own_k, own_v, one.before // BLOCK, pages)


def _attend_prompt(q: Tensor, prompt: Prompt, layer: SharedPages, options: LayerOptions) -> Tensor:
    """Attend ``[Hq, T, D]``: to own tokens as they came, to complete blocks tile by tile, merged."""
    logits = {"scale": options.scale, "softcap": options.softcap}
    if not prompt.complete:
        return attend(q[None], prompt.k[None], prompt.v[None], config=options.prompts, **logits).out[0]
    others = options.prompts.with_(
        sink_token="none"
    )  # the first token of a tile is that of its sequence in one tile only
    parts = [attend(q[None], prompt.k[None], prompt.v[None], config=others, return_lse=True, **logits)]
    for first in range(0, prompt.complete, TILE_BLOCKS):
        blocks = range(first, min(first + TILE_BLOCKS, prompt.complete))
        read = read_row(layer, prompt.pages, blocks, options.pages)
        k, v = (x.transpose(0, 1).flatten(1, 2).to(q.dtype) for x in (read.high_k, read.high_v))
        config = options.prompts if first == 0 else others
        parts.append(attend(q[None], k[None], v[None], config=config, causal=False, return_lse=True, **logits))
    lses = [part.lse for part in parts if part.lse is not None]
    return merge([part.out for part in parts], lses)[0][0]
