"""Rows of a batch over pages and rings in plain PyTorch: how a serving engine holds sequences.

Pages belong to no sequence: several may share one, so the page of a first block carries what is special about a first token,
and scales are fixed before the first page is written. The newest tokens of a sequence lie in a ring in 16 bits, token t at
t mod R: those of the incomplete block, and those that may be taken back. A block is packed when its 64th token comes, and again
when that was taken back and another one comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.attention import Mask, attend_planes
from thrift_attn.reference.pages import Blocks, Pool, SequenceTensors, read_blocks, sequence_planes, write_blocks


class SharedPages(NamedTuple):
    """What all sequences of one layer lie in; everything may be a view of larger records.

    Args:
        pool: the planes of all pages.
        block0_mean: ``[pages, Hkv, D]``, 16-bit: in the page of a first block, the mean of its K without the first token.
        sink_value: ``[pages, Hkv, D]``, likewise V of the first token.
        rings: 16-bit ``[rings, 2, Hkv, R, D]``: K and V of the newest tokens of a sequence, token t at t mod R.
        k_channel_scale: float32 ``[Hkv, D]``, powers of two: pages hold 4-bit K times it; None for neither K nor V.
        v_head_scale: float32 ``[Hkv]``, likewise for V.
    """

    pool: Pool
    block0_mean: Tensor
    sink_value: Tensor
    rings: Tensor
    k_channel_scale: Tensor | None
    v_head_scale: Tensor | None

    def sequence(self, pages: Tensor) -> SequenceTensors:
        """Return what belongs to the sequence whose blocks lie in ``pages`` int64 ``[n]``, n at least 1: views."""
        first = int(pages[0])
        return SequenceTensors(self.block0_mean[first], self.sink_value[first], self.k_channel_scale, self.v_head_scale)

    def kept(self, ring: int, tokens: int) -> Tensor:
        """K and V of the incomplete block of a sequence of ``tokens`` tokens: ``[2, Hkv, 0 to 63, D]``, a copy."""
        at = torch.arange(tokens - tokens % BLOCK, tokens, device=self.rings.device)
        return self.rings[ring][:, :, at % self.rings.shape[3]]


def append_row(
    to: SharedPages, pages: Tensor, ring: int, k: Tensor, v: Tensor, *, before: int, numerics: DecodeNumerics
) -> None:
    """Append tokens to one sequence: pack the blocks that are complete now, keep the newest tokens.

    Args:
        to: where it lies.
        pages: int64, the page of each of its blocks.
        ring: its ring.
        k: 16-bit ``[Hkv, T, D]``.
        v: likewise.
        before: tokens that it has; what its ring holds of later ones was taken back.
        numerics: how blocks are stored.
    """
    kv = torch.stack([k, v])  # [2, Hkv, T, D]
    count, size = kv.shape[2], to.rings.shape[3]
    first, complete = before // BLOCK, (before + count) // BLOCK
    if complete > first:
        whole = torch.cat([to.kept(ring, before), kv], 2)[:, :, : (complete - first) * BLOCK]
        blocks = whole.unflatten(2, (-1, BLOCK)).transpose(1, 2)  # [2, n, Hkv, 64, D]
        write_blocks(
            to.pool, pages[first:complete], blocks[0], blocks[1],
            numerics=numerics, sequence=to.sequence(pages), first=first == 0, own_scales=False,
        )  # fmt: skip
    newest = min(count, size)
    at = torch.arange(before + count - newest, before + count, device=k.device)
    to.rings[ring][:, :, at % size] = kv[:, :, count - newest :]


def read_row(of: SharedPages, pages: Tensor, blocks: range, numerics: DecodeNumerics) -> Blocks:
    """What complete blocks of one sequence decode to.

    Args:
        of: where it lies.
        pages: int64, the page of each of its blocks.
        blocks: which of them.
        numerics: how blocks are stored.
    """
    sequence = of.sequence(pages)
    read = read_blocks(of.pool, pages[blocks.start : blocks.stop], numerics=numerics, sequence=sequence)
    if numerics.exact_sink and blocks and blocks.start == 0:
        read.high_v[0, :, 0] = sequence.sink_value
    return read


def attend_row(
    q: Tensor,
    over: SharedPages,
    pages: Tensor,
    ring: int,
    *,
    tokens: int,
    numerics: DecodeNumerics,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode: attention of the newest tokens of one sequence over all it holds.

    Args:
        q: ``[Hq, Tq, D]``, the queries of its last Tq tokens.
        over: where it lies.
        pages: int64, the page of each of its blocks.
        ring: its ring.
        tokens: its length, the new tokens included.
        numerics: what is stored and computed.
        scale: factor of the logits.
        softcap: bound of the logits, or None.

    Returns:
        The output ``[Hq, Tq, D]`` and the LSE ``[Hq, Tq]``, natural logarithm, float32.
    """
    complete = tokens // BLOCK
    others = over.sequence(pages).block0_mean if numerics.exact_sink and complete else None
    planes = sequence_planes(
        read_row(over, pages, range(complete), numerics), over.kept(ring, tokens), block0_mean=others
    )
    out, lse, _ = attend_planes(q, planes, numerics, Mask(q.shape[1], tokens, True, None), scale, softcap)
    return out, lse
