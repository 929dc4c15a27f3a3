"""Where everything lies in the bytes that an engine gives to a page, and to the ring of a sequence.

An engine's block of tokens has room for so many bytes a token and head. A page of 64 tokens is one record a head, so that heads
stay an axis of their own (tensor parallelism moves whole heads)::

    base plane | plane of promoted blocks | block mean | mean of block 0's other keys | V of token 0

The last two mean something in the page of a first block alone. They are part of every page all the same, since a page that
sequences share has to bring them along, and the engine knows one size of page only. Where promoted blocks have a pool of their
own, the second part is left out (``promoted=None``).

The ring of a sequence is a whole block of the same pool of bytes: K and V of as many tokens as fit, a head after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.reference.formats import RESIDUALS
from thrift_attn.reference.page_layout import plane_size
from thrift_attn.reference.pages import Pool

WORD = 4
"""Bytes of a word of a plane."""

ELEMENT = 2
"""Bytes of a 16-bit number."""


class PageViews(NamedTuple):
    """Pages as `thrift_attn.reference.paged_rows.SharedPages` names their parts: views, nothing is copied."""

    pool: Pool
    block0_mean: Tensor
    sink_value: Tensor


@dataclass(frozen=True)
class PageRecord:
    """The record of one head in one page.

    Args:
        head_dim: D, a multiple of 16.
        promoted: how promoted blocks are stored; None where they lie elsewhere.

    Raises:
        ValueError: another head dimension.
    """

    head_dim: int
    promoted: Literal["nested", "nested8", "16bit"] | None = "nested"

    def __post_init__(self) -> None:
        plane_size(self.head_dim, 4)  # refuses what pages cannot hold

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """Bytes of the base plane, the plane of promoted blocks, the block mean, the mean of block 0, and V of token 0."""
        promoted = 0
        if self.promoted is not None:
            bits = 16 if self.promoted == "16bit" else RESIDUALS[self.promoted].element_bits
            promoted = plane_size(self.head_dim, bits).words * WORD
        row = self.head_dim * ELEMENT
        return plane_size(self.head_dim, 4).words * WORD, promoted, row, row, row

    @property
    def token_bytes(self) -> int:
        """Bytes that a page takes for each of its 64 tokens; what is left over of the last one stays empty."""
        return -(-sum(self.parts) // BLOCK)

    def ring_tokens(self, block_tokens: int) -> int:
        """R, the tokens in 16 bits that fit into a block of the engine of ``block_tokens`` tokens."""
        return block_tokens * self.token_bytes // (2 * self.head_dim * ELEMENT)

    def step_tokens(self, block_tokens: int) -> int:
        """The most tokens of a sequence that a step of decode brings: a ring takes them beside the 63 that a block may lack."""
        return min(DECODE_ROWS, self.ring_tokens(block_tokens) - BLOCK + 1)

    def pages(self, raw: Tensor, dtype: torch.dtype) -> PageViews:
        """View the engine's pages as what they hold.

        Args:
            raw: uint8 ``[pages, Hkv, 64, token_bytes]``, contiguous but for the first two dimensions.
            dtype: of K and V, 16-bit.

        Raises:
            ValueError: another shape, or a page of a head that is not one run of bytes.
        """
        self._check(raw, BLOCK)
        record = raw.flatten(2)
        types = (torch.int32, dtype if self.promoted == "16bit" else torch.int32, dtype, dtype, dtype)
        base, high, k_block_mean, block0_mean, sink_value = (
            part.view(kind)
            for part, kind in zip(record[..., : sum(self.parts)].split(self.parts, -1), types, strict=True)
        )
        return PageViews(Pool(base, k_block_mean, high), block0_mean, sink_value)

    def rings(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """View the engine's blocks as rings.

        Args:
            raw: uint8 ``[blocks, Hkv, tokens, token_bytes]``, contiguous but for the first two dimensions.
            dtype: of K and V, 16-bit.

        Returns:
            ``[blocks, 2, Hkv, R, D]`` in ``dtype``: token t of a sequence lies at t mod R.

        Raises:
            ValueError: another shape, or a block of a head that is not one run of bytes.
        """
        tokens = raw.shape[2]
        self._check(raw, tokens)
        size = self.ring_tokens(tokens)
        held = raw.flatten(2)[..., : size * 2 * self.head_dim * ELEMENT].view(dtype)
        return held.unflatten(-1, (2, size, self.head_dim)).transpose(1, 2)

    def _check(self, raw: Tensor, tokens: int) -> None:
        if raw.dtype != torch.uint8 or raw.ndim != 4 or raw.shape[2:] != (tokens, self.token_bytes):
            want = f"uint8 [blocks, Hkv, {tokens}, {self.token_bytes}]"
            raise ValueError(f"expected {want}, got {raw.dtype} {list(raw.shape)}")
        if raw.stride()[2:] != (self.token_bytes, 1):
            raise ValueError(f"expected each head of a block in one run of bytes, got strides {raw.stride()}")
