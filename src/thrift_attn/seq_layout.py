"""How the sequences of a prefill call lie in its tensors, the same for a batch and for sequences packed end to end.

Query blocks are cut at multiples of 64 of the absolute position: query block r of a sequence covers the positions
``64 * (floor(offset / 64) + r)`` onwards, where a causal query i sits at position ``offset + i`` with
``offset = k_len - q_len`` (0 when not causal). Packed data of all sequences lie in tensors ``[P, H, q_blocks or blocks, ...]``:

- a batch: P = B, sequence b at index b, every sequence with room for the longest;
- packed end to end (``cu_seqlens``): P = 1, sequence b from ``q_block_start`` and ``block_start`` on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from thrift_attn.config import BLOCK

Q_START, Q_LEN, K_START, K_LEN, Q_BLOCK_START, BLOCK_START = range(6)
"""Columns of a span: starts count tokens of q and k, query blocks and KV blocks."""

SPAN = 6
"""Numbers in a span."""


@dataclass(frozen=True, eq=False)
class SeqLayout:
    """The sequences of one call. Lengths on the device may differ from call to call; sizes on the host do not.

    Args:
        spans: int32 ``[B, 6]`` on the device, columns `Q_START`, `Q_LEN`, `K_START`, `K_LEN`, `Q_BLOCK_START`, `BLOCK_START`.
        packed_batch: P, leading size of packed tensors.
        q_blocks: R, query blocks of packed tensors.
        blocks: N, KV blocks of packed tensors.
        max_q_blocks: query blocks of the longest sequence.
        max_blocks: KV blocks of the longest sequence.
        causal: whether positions are counted from the last key.
        lengths: ``(Tq, Tk)`` when all sequences have these lengths, else None.
        end_to_end: whether sequences lie one after the other along the tokens; there may be tokens that none of them owns.
    """

    spans: Tensor
    packed_batch: int
    q_blocks: int
    blocks: int
    max_q_blocks: int
    max_blocks: int
    causal: bool
    lengths: tuple[int, int] | None = None
    end_to_end: bool = False

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return len(self.spans)

    @property
    def q_len(self) -> Tensor:
        """Queries of every sequence, int32 ``[B]``."""
        return self.spans[:, Q_LEN]

    @property
    def k_len(self) -> Tensor:
        """Keys of every sequence, int32 ``[B]``."""
        return self.spans[:, K_LEN]

    def pack(self) -> list[int]:
        """Return all but ``spans`` as numbers, for an operator's schema."""
        lengths = self.lengths or (-1, -1)
        sizes = [self.packed_batch, self.q_blocks, self.blocks, self.max_q_blocks, self.max_blocks]
        return [*sizes, int(self.causal), int(self.end_to_end), *lengths]

    @classmethod
    def unpack(cls, spans: Tensor, numbers: Sequence[int]) -> SeqLayout:
        """Return the layout whose `pack` gave ``numbers``."""
        packed_batch, q_blocks, blocks, max_q_blocks, max_blocks, causal, end_to_end, q_len, k_len = numbers
        lengths = None if q_len < 0 else (q_len, k_len)
        return cls(
            spans, packed_batch, q_blocks, blocks, max_q_blocks, max_blocks, bool(causal), lengths, bool(end_to_end)
        )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


class KeptTensors:
    """Small tensors on a device that calls of the same sizes share instead of making them anew.

    A captured graph reads them in every replay, and nothing tells when it is gone. So what a capture was given stays for as
    long as the process lives: some bytes for each block of the sizes that are captured. The others go when ``room`` newer
    ones have come.

    Args:
        room: how many are kept that no capture was given.
    """

    def __init__(self, room: int = 256):
        self._room, self._lock = room, Lock()
        self._recent: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._captured: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor | None:
        """Return the tensor for ``key``, made if it is not there; None where calls cannot share one.

        That is while tensors are fake or traced, and for sizes that a capture is the first to meet, since what ``make`` copies
        from the host cannot be captured: the caller then makes the tensor by kernels, which the graph replays.

        Args:
            key: sizes and ``device``.
            device: where the tensor is.
            make: called without arguments, returns the tensor; in a thread of its own, so that the tensor lies in no pool of
                memory that the caller's thread or stream is set to for a graph, which ends with it.
        """
        if torch.compiler.is_compiling() or type(torch.empty(0, device=device)) is not Tensor:
            return None
        capturing = _capturing(device)
        with self._lock:
            found = self._captured.get(key)
            if found is not None:
                return found
            found = self._recent.pop(key, None)
            if capturing:
                if found is not None:
                    self._captured[key] = found
                return found
            if found is None:
                with ThreadPoolExecutor(1) as apart:
                    found = apart.submit(make).result()
            if found.is_cuda:  # once it is dropped its memory waits for what reads it here
                found.record_stream(torch.cuda.current_stream(device))
            self._recent[key] = found
            if len(self._recent) > self._room:
                self._recent.popitem(last=False)
            return found


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


_SPANS = KeptTensors()


def dense(batch: int, queries: int, keys: int, causal: bool, device: torch.device) -> SeqLayout:
    """Return the layout of a batch whose sequences all have ``queries`` and ``keys`` tokens.

    The device tensor is shared with other calls where `KeptTensors` allows it; else it is made on the device.
    """

    def make() -> Tensor:
        return torch.tensor([[0, queries, 0, keys, 0, 0]] * batch, dtype=torch.int32, device="cpu").to(device)

    spans = _SPANS.get((batch, queries, keys, device), device, make)
    return _dense(_filled_spans(batch, queries, keys, device) if spans is None else spans, queries, keys, causal)


def _filled_spans(batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Spans of equal lengths, made by kernels alone: a graph that is captured holds them."""
    spans = torch.zeros(batch, SPAN, dtype=torch.int32, device=device)
    spans[:, Q_LEN].fill_(queries)
    spans[:, K_LEN].fill_(keys)
    return spans


def _dense(spans: Tensor, queries: int, keys: int, causal: bool) -> SeqLayout:
    q_blocks = _blocks((keys - queries if causal else 0) % BLOCK + queries)
    return SeqLayout(spans, len(spans), q_blocks, _blocks(keys), q_blocks, _blocks(keys), causal, (queries, keys))


def padded(queries: int, keys: int, causal: bool, kv_lengths: Tensor) -> SeqLayout:
    """Return the layout of a batch whose sequence b has the first ``kv_lengths[b]`` of ``keys`` keys.

    Nothing is copied to the host; lengths are clamped to [1, keys].
    """
    lengths = kv_lengths.int().clamp(1, keys)
    zero = torch.zeros_like(lengths)
    spans = torch.stack([zero, torch.full_like(zero, queries), zero, lengths, zero, zero], 1)
    q_blocks = _blocks(queries) + 1 if causal else _blocks(queries)
    return SeqLayout(spans, len(spans), q_blocks, _blocks(keys), q_blocks, _blocks(keys), causal)


def packed(
    cu_queries: Tensor, cu_keys: Tensor, *, queries: int, keys: int, max_queries: int, max_keys: int, causal: bool
) -> SeqLayout:
    """Return the layout of sequences end to end; nothing is copied to the host.

    Starts that decrease or leave the tensor, and sequences longer than said, cannot be seen here without waiting for the
    device. They are clamped there, so that no kernel reads or writes anything but these tensors.

    Args:
        cu_queries: int32 ``[B + 1]``, where each sequence starts, and where the last one ends.
        cu_keys: likewise for K and V.
        queries: tokens of q in all.
        keys: tokens of k in all.
        max_queries: at least the queries of the longest sequence; of a longer one the first so many count.
        max_keys: at least the keys of the longest sequence, likewise.
        causal: whether positions are counted from the last key.
    """
    q_start, q_len = _starts_and_lengths(cu_queries, queries, max_queries)
    k_start, k_len = _starts_and_lengths(cu_keys, keys, max_keys)
    lead = (k_len - q_len).remainder(BLOCK) if causal else torch.zeros_like(q_len)
    sizes = [(x + (BLOCK - 1)) // BLOCK for x in (lead + q_len, k_len)]
    q_block_start, block_start = (x.cumsum(0, dtype=torch.int32) - x for x in sizes)
    spans = torch.stack([q_start, q_len, k_start, k_len, q_block_start, block_start], 1)
    batch = len(spans)
    return SeqLayout(
        spans,
        packed_batch=1,
        q_blocks=queries // BLOCK + 2 * batch,
        blocks=keys // BLOCK + batch,
        max_q_blocks=_blocks(max_queries) + 1 if causal else _blocks(max_queries),
        max_blocks=_blocks(max_keys),
        causal=causal,
        end_to_end=True,
    )


def _starts_and_lengths(cu: Tensor, total: int, longest: int) -> tuple[Tensor, Tensor]:
    """Starts within the tensor that never decrease, and lengths of at most ``longest``: int32 ``[B]`` each."""
    bounds = cu.clamp(0, total).cummax(0).values.int()
    return bounds[:-1], bounds.diff().clamp(max=longest)
