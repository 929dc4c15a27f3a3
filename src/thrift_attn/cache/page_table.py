"""Which page of the pool holds which block of which sequence. Host bookkeeping with a mirror on the device."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

from thrift_attn.cache.stream_order import StreamOrder, current_stream
from thrift_attn.config import BLOCK


def count_shared(held: list[int], references: list[int]) -> int:
    """How many of the first pages or slots of a list are held by others too: shared ones always come first.

    Args:
        held: those of one sequence, in order.
        references: of every page or slot of the pool, how many lists it is on.
    """
    return bisect.bisect_left(held, True, key=lambda number: references[number] < 2)


class PageTable:
    """Page tables and lengths of a batch of sequences over a pool of reference-counted pages.

    A page holds one complete KV block and never changes once it is written, so sequences that share a prefix share its pages.
    Pages are given out before they are written (`reserve`), so that nothing is half done when the pool is exhausted. An
    interrupt between two lines can lose pages to the pool, but never gives one to two owners.

    Args:
        pages: pages in the pool.
        batch: sequences.
        max_pages: largest number of pages of one sequence.
        device: where ``table`` and ``lengths`` live.
        max_tokens: largest length of one sequence, where that is less than its pages hold.

    Attributes:
        table: int32 ``[B, max_pages]``, the page of each block that has one, else -1, for which kernels write nothing.
        lengths: int32 ``[B]``, tokens of each sequence.
    """

    def __init__(self, pages: int, batch: int, max_pages: int, device: torch.device, max_tokens: int | None = None):
        self.table = torch.full((batch, max_pages), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._max_tokens = max_tokens
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._tokens = [0] * batch
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._order = StreamOrder()  # of the pool
        self._users: dict[int, torch.cuda.Stream] = {}  # streams in which kernels used the pages of these sequences

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self._tokens)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def note_use(self) -> None:
        """Note that kernels which use pages of these sequences are started in the current stream."""
        stream = current_stream(self.table.device)
        if stream is not None:
            self._users[stream.cuda_stream] = stream

    def take_in_order(self) -> None:
        """Let the current stream wait for those that gave back what it is about to take."""
        self._order.take(current_stream(self.table.device))

    def give_back_in_order(self) -> None:
        """Note that something of the pool is free now which kernels of these sequences may still read."""
        self.note_use()
        self._order.give_back(self._users.values())

    def tokens(self, seq: int) -> int:
        """Length of a sequence, known without asking the device."""
        return self._tokens[seq]

    def pages(self, seq: int) -> Tensor:
        """Pages of the complete blocks of a sequence, int64 on the device."""
        return self.table[seq, : self._tokens[seq] // BLOCK].long()

    def held_blocks(self, seq: int) -> int:
        """Blocks of a sequence that have pages, those included that are reserved."""
        return len(self._owned[seq])

    def shared_blocks(self, seq: int) -> int:
        """How many of the first blocks of a sequence other sequences hold too."""
        return count_shared(self._owned[seq], self._references)

    def check_lengths(self, wanted: list[int]) -> None:
        """Raise ValueError for a length that a sequence may not have."""
        limit = self.table.shape[1]
        for seq, length in enumerate(wanted):
            if self._max_tokens is not None and length > self._max_tokens:
                raise ValueError(f"sequence {seq} would have {length} tokens, and may have {self._max_tokens}")
            if length // BLOCK > limit:
                raise ValueError(
                    f"sequence {seq} would have {length} tokens, more than its {limit} pages of {BLOCK} tokens hold"
                )

    def check_room(self, wanted: list[int]) -> None:
        """Check that every sequence may have, and can get pages for, a length of ``wanted`` tokens.

        Raises:
            ValueError: longer than ``max_pages`` pages hold.
            RuntimeError: the pool is exhausted.
        """
        missing = self._missing(wanted)
        self.check_lengths(wanted)
        if sum(missing) > len(self._free):
            raise RuntimeError(
                f"the page pool is exhausted: {sum(missing)} more pages are needed and {len(self._free)} of "
                f"{len(self._references)} are free; free a sequence or make the pool larger"
            )

    def reserve(self, wanted: list[int]) -> None:
        """Give every sequence the pages for a length of ``wanted`` tokens; none if there are too few for all.

        Raises:
            ValueError: longer than ``max_pages`` pages hold.
            RuntimeError: the pool is exhausted. Nothing has changed then.
        """
        self.check_room(wanted)
        missing = self._missing(wanted)
        if not any(missing):
            return
        self.take_in_order()
        # One copy to the device, and the books only when it has been made.
        given = torch.tensor(self._free[-sum(missing) :][::-1], dtype=torch.int32)
        seqs = torch.tensor(missing).nonzero().flatten().repeat_interleave(torch.tensor([n for n in missing if n]))
        places = torch.cat(
            [torch.arange(len(held), len(held) + n) for held, n in zip(self._owned, missing, strict=True)]
        )
        at = torch.stack([seqs, places, given]).to(self.table.device)
        self.table[at[0], at[1]] = at[2].int()
        for seq, count in enumerate(missing):
            for _ in range(count):
                page = self._free.pop()
                self._references[page] = 1
                self._owned[seq].append(page)

    def missing(self, wanted: list[int]) -> int:
        """Pages that `reserve` would have to give."""
        return sum(self._missing(wanted))

    def _missing(self, wanted: list[int]) -> list[int]:
        return [max(0, length // BLOCK - len(owned)) for length, owned in zip(wanted, self._owned, strict=True)]

    def set_tokens(self, seq: int, tokens: int) -> None:
        """Set the length of a sequence, here and on the device."""
        self._tokens[seq] = tokens
        self.lengths[seq] = tokens

    def note_tokens(self, seq: int, tokens: int) -> None:
        """Record a length that the device already knows."""
        self._tokens[seq] = tokens

    def release(self, seq: int, blocks: int) -> None:
        """Give back the pages of a sequence from block ``blocks`` on."""
        if len(self._owned[seq]) > blocks:
            self.table[seq, blocks : len(self._owned[seq])] = -1
        self._give_back(seq, blocks)

    def _give_back(self, seq: int, blocks: int) -> None:
        given = self._owned[seq][blocks:]
        if given:
            self.give_back_in_order()
        del self._owned[seq][blocks:]
        for page in given:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def share(self, source: int, target: int) -> None:
        """Let an empty sequence hold the complete blocks of another."""
        blocks = self._tokens[source] // BLOCK
        held = self._owned[source][:blocks]
        for page in held:
            self._references[page] += 1
        self._owned[target] = list(held)
        self.table[target, :blocks] = self.table[source, :blocks]
        self.set_tokens(target, self._tokens[source])

    def select(self, seqs: list[int]) -> None:
        """Make sequence i what ``seqs[i]`` was: copies share the complete blocks, those left out give their pages back.

        The tensors on the device stay where they are if the number of sequences does.
        """
        owned = [
            list(self._owned[seq]) if seq not in seqs[:at] else self._owned[seq][: self._tokens[seq] // BLOCK]
            for at, seq in enumerate(seqs)
        ]
        self._hold(owned)
        self.free_all()
        self._owned = owned
        self._tokens = [self._tokens[seq] for seq in seqs]
        index = torch.tensor(seqs, device=self.table.device)
        table, lengths = self.table[index], self.lengths[index]
        for at, seq in enumerate(seqs):
            if seq in seqs[:at]:  # pages that are reserved stay with the first copy
                table[at, len(owned[at]) :] = -1
        if len(seqs) == self.table.shape[0]:
            self.table.copy_(table)
            self.lengths.copy_(lengths)
        else:
            self.table, self.lengths = table, lengths

    def branch(self) -> PageTable:
        """Another table over the same pages, whose sequences start with the complete blocks of these."""
        owned = [held[: tokens // BLOCK] for held, tokens in zip(self._owned, self._tokens, strict=True)]
        table = self.table.clone()
        for seq, held in enumerate(owned):
            if len(held) < len(self._owned[seq]):
                table[seq, len(held) :] = -1
        mine = vars(self) | {
            "table": table,
            "lengths": self.lengths.clone(),
            "_owned": owned,
            "_tokens": [*self._tokens],
            "_users": {},
        }
        self._hold(owned)
        other = PageTable.__new__(PageTable)
        other.__dict__.update(mine)  # in one step: what it owns it will give back
        return other

    def assign(self, blocks: list[list[int]], tokens: list[int]) -> list[int]:
        """Give empty sequences pages for numbered blocks; equal numbers become one shared page.

        Args:
            blocks: for each sequence the numbers of its complete blocks, from 0 on without gaps.
            tokens: length of each sequence.

        Returns:
            The page of each number.

        Raises:
            ValueError: a sequence longer than ``max_pages``.
            RuntimeError: the pool is exhausted. Nothing has changed then.
        """
        limit = self.table.shape[1]
        longest, count = max(map(len, blocks)), 1 + max((number for held in blocks for number in held), default=-1)
        if longest > limit:
            raise ValueError(f"a sequence of {longest} blocks does not fit into {limit} pages")
        if count > len(self._free):
            raise RuntimeError(f"the page pool is exhausted: {count} pages are needed and {len(self._free)} are free")
        self.take_in_order()
        given = self._free[len(self._free) - count :][::-1]
        owned = [[given[number] for number in held] for held in blocks]
        table = torch.tensor([[*held, *[-1] * (longest - len(held))] for held in owned], dtype=torch.int32)
        self.table[:, :longest] = table.view(len(blocks), longest)  # the books only when this has been copied
        del self._free[len(self._free) - count :]
        self._owned = owned
        self._hold(self._owned)
        for seq, length in enumerate(tokens):
            self.set_tokens(seq, length)
        return given

    def free_all(self) -> None:
        """Give back the pages of all sequences; lengths, and what the device knows, stay."""
        for seq in range(len(self._owned)):
            self._give_back(seq, 0)

    def _hold(self, owned: list[list[int]]) -> None:
        for held in owned:
            for page in held:
                self._references[page] += 1

    def __del__(self, *_: Any) -> None:
        if hasattr(self, "_owned"):  # other tables may live on over the same pages
            self.free_all()
