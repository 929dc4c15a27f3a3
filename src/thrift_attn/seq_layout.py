"""How the sequences of a prefill call lie in its tensors, the same for a batch and for sequences packed end to end.

Query rows are cut at multiples of 64 of the absolute position: row r of a sequence covers the positions
``64 * (floor(offset / 64) + r)`` onwards, where a causal query i sits at position ``offset + i`` with
``offset = k_len - q_len`` (0 when not causal). Packed data of all sequences lie in tensors ``[P, H, rows or blocks, ...]``:

- a batch: P = B, sequence b in part b, every sequence with room for the longest;
- packed end to end (``cu_seqlens``): P = 1, sequence b from ``row_start`` and ``block_start`` on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from thrift_attn.config import BLOCK

SPAN = 6
"""Numbers in a span."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of one call. Lengths on the device may differ from call to call; sizes on the host do not.

    Args:
        spans: int32 ``[B, 6]`` on the device: ``q_start, q_len, k_start, k_len, row_start, block_start``; starts count
            tokens of q and k, query rows and KV blocks.
        parts: P, leading size of packed tensors.
        rows: query rows in a part.
        blocks: KV blocks in a part.
        most_rows: of one sequence.
        most_blocks: of one sequence.
        causal: whether positions are counted from the last key.
        lengths: ``(Tq, Tk)`` when all sequences have these lengths, else None.
    """

    spans: Tensor
    parts: int
    rows: int
    blocks: int
    most_rows: int
    most_blocks: int
    causal: bool
    lengths: tuple[int, int] | None = None

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return len(self.spans)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


@lru_cache(maxsize=256)
def dense(batch: int, queries: int, keys: int, causal: bool, device: torch.device) -> Sequences:
    """A batch whose sequences all have ``queries`` and ``keys`` tokens; the device tensor is kept for the next call."""
    rows = _blocks((keys - queries if causal else 0) % BLOCK + queries)
    spans = torch.tensor([[0, queries, 0, keys, 0, 0]] * batch, dtype=torch.int32).to(device)
    return Sequences(spans, batch, rows, _blocks(keys), rows, _blocks(keys), causal, (queries, keys))


def padded(queries: int, keys: int, causal: bool, kv_lengths: Tensor) -> Sequences:
    """A batch whose sequence b has the first ``kv_lengths[b]`` of ``keys`` keys; nothing is copied to the host."""
    lengths = kv_lengths.int().clamp(1, keys)
    zero = torch.zeros_like(lengths)
    spans = torch.stack([zero, torch.full_like(zero, queries), zero, lengths, zero, zero], 1)
    rows = _blocks(queries) + 1 if causal else _blocks(queries)
    return Sequences(spans, len(spans), rows, _blocks(keys), rows, _blocks(keys), causal)


def packed(
    cu_queries: Tensor, cu_keys: Tensor, *, queries: int, keys: int, most_queries: int, most_keys: int, causal: bool
) -> Sequences:
    """Sequences end to end; nothing is copied to the host.

    Args:
        cu_queries: int32 ``[B + 1]``, where each sequence starts, and where the last one ends.
        cu_keys: likewise for K and V.
        queries: tokens of q in all.
        keys: tokens of k in all.
        most_queries: at least the queries of the longest sequence.
        most_keys: at least the keys of the longest sequence.
        causal: whether positions are counted from the last key.
    """
    starts = [x[:-1].int() for x in (cu_queries, cu_keys)]
    lengths = [x.diff().int() for x in (cu_queries, cu_keys)]
    lead = (lengths[1] - lengths[0]).remainder(BLOCK) if causal else torch.zeros_like(lengths[0])
    sizes = [(x + (BLOCK - 1)) // BLOCK for x in (lead + lengths[0], lengths[1])]
    row_start, block_start = (x.cumsum(0, dtype=torch.int32) - x for x in sizes)
    spans = torch.stack([starts[0], lengths[0], starts[1], lengths[1], row_start, block_start], 1)
    batch = len(spans)
    return Sequences(
        spans,
        parts=1,
        rows=queries // BLOCK + 2 * batch,
        blocks=keys // BLOCK + batch,
        most_rows=_blocks(most_queries) + 1 if causal else _blocks(most_queries),
        most_blocks=_blocks(most_keys),
        causal=causal,
    )
