"""Rows of a step that are packed one sequence after the other, as engines have them: which of them are a sequence's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(starts_ptr, b, most, PACKED: tl.constexpr):
    """Number of the first row of sequence ``b`` among packed ones, int64, and how many rows it has: ``most`` if not PACKED."""
    first = b.to(tl.int64) * 0
    rows = most
    if PACKED:
        first = tl.load(starts_ptr + b).to(tl.int64)
        rows = tl.load(starts_ptr + b + 1) - first.to(tl.int32)
    return first, rows


@triton.jit
def length_seen(length, rows, most, blocks, PACKED: tl.constexpr):
    """Tokens that a sequence is attended to: none where it has no row, or more of them than the kernel was started for.

    Never more than a page table of ``blocks`` entries and an incomplete block hold, whatever the length says: no buffer has
    room for more.
    """
    length = tl.minimum(length, blocks * 64 + 63)
    if PACKED:
        length = tl.where((rows > 0) & (rows <= most), length, 0)
    return length
