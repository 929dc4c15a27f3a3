"""Which sequences a paged cache holds: their lengths, their pages, and every change but appending.

The host's books (`PageTable`, and which blocks the rings of 16-bit tokens hold) move under one lock and as a whole. A change
that is interrupted halfway marks the cache, which then refuses to be used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from thrift_attn.cache.changes import Changes
from thrift_attn.cache.page_table import PageTable
from thrift_attn.cache.residual_slots import ResidualSlots
from thrift_attn.checks import whole_number, whole_numbers
from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.decode.tensors import check_sizes
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.budget import promoted_in_decode
from thrift_attn.reference.pages import Blocks, Pool, SequenceTensors, read_blocks


class CacheSequences:
    """The sequences of a `thrift_attn.cache.PagedThriftCache`, which makes all of these attributes."""

    backend: str
    numerics: DecodeNumerics
    dtype: torch.dtype
    device: torch.device
    kv_heads: int
    table: PageTable
    pool: Pool
    tail: Tensor
    rings: Tensor
    per_sequence: SequenceTensors
    residual_slots: ResidualSlots | None
    overrun: Tensor
    _lock: threading.RLock  # pyright: ignore[reportInvalidTypeForm]
    _changes: Changes
    _tail_blocks: list[list[int]]
    _overrun_seen: Tensor

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.table.batch

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 ``[B]`` on the device."""
        return self.table.lengths

    def tokens(self, seq: int) -> int:
        """Tokens of one sequence, known without asking the device."""
        return self.table.tokens(self._checked_seq(seq))

    def promoted(self, seq: int, new_tokens: int = 1) -> int:
        """How many complete blocks each KV head promotes in a step of decode, known without asking the device.

        The budget gives it, and the residents bound it: where residuals are kept for a share, a sequence that was cut back
        may have fewer of them than are counted here.

        Raises:
            ValueError: a sequence out of range, or new tokens other than 1 to 16.
        """
        seq, new_tokens = self._checked_seq(seq), whole_number("new_tokens", new_tokens)
        if not 1 <= new_tokens <= DECODE_ROWS:
            raise ValueError(f"new_tokens must be from 1 to {DECODE_ROWS}, got {new_tokens}")
        tokens = self.table.tokens(seq)
        wanted = promoted_in_decode(self.numerics.budget, tokens, new_tokens=new_tokens)
        return wanted if self.residual_slots is None else min(wanted, self.residual_slots.most(seq, tokens // BLOCK))

    def resident_share(self) -> float:
        """Share of the complete blocks of all sequences and KV heads that keep the plane of promoted ones; asks the device."""
        pages = torch.cat([self.table.pages(seq) for seq in range(self.batch)])
        if self.residual_slots is None or not len(pages):
            return 1.0
        return float((self.residual_slots.of_pages(pages) >= 0).float().mean())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the pool, and refuse everything from now on if what is done meanwhile does not come to its end."""
        with self._lock, self._changes:
            self.table.note_use()
            yield

    def _reading(self) -> AbstractContextManager[object]:
        """Hold the pool, so that another thread's change is waited for; a trace of dynamo has one thread."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    @property
    def is_intact(self) -> bool:
        """Whether no change was interrupted halfway; a cache that is not intact refuses to be used."""
        return not self._changes.unfinished

    def reserve(self, tokens: int | Sequence[int]) -> None:
        """Give every sequence the pages for more tokens, so that a captured graph can append them.

        Args:
            tokens: how many more, for all sequences or for each.

        Raises:
            ValueError: more tokens than a sequence may have.
            RuntimeError: the pool is exhausted; nothing has changed.
        """
        with self._lock:
            self._changes.check()
            self._check_overrun()
            each = isinstance(tokens, (list, tuple)) or getattr(tokens, "ndim", 0)  # ndim: tensors and arrays
            new = (
                whole_numbers("tokens", tokens, each="tokens")
                if each
                else [whole_number("tokens", tokens)] * self.batch
            )
            if len(new) != self.batch or min(new) < 0:
                raise ValueError(
                    f"tokens must be at least 0, one number or one for each of {self.batch} sequences, got {tokens}"
                )
            wanted = [self.table.tokens(seq) + n for seq, n in enumerate(new)]
            self._check_room(wanted)
            with self._changing():
                self._reserve(wanted)

    def _check_room(self, wanted: list[int]) -> None:
        """Check that there are pages, and slots for residuals, for sequences of so many tokens."""
        self.table.check_room(wanted)
        if self.residual_slots is not None:
            self._look_at_sharing()
            grows = [n // BLOCK > done for n, done in zip(wanted, self._complete(), strict=True)]
            self.residual_slots.check_room(self._blocks(wanted), grows)

    def _reserve(self, wanted: list[int]) -> None:
        """Give every sequence its pages, and slots for residuals, for so many tokens."""
        self.table.reserve(wanted)
        self._reserve_slots(wanted)

    def _reserve_slots(self, wanted: list[int]) -> None:
        """Give every sequence the slots for so many tokens, as far as there are any."""
        if self.residual_slots is not None and self.residual_slots.missing(blocks := self._blocks(wanted)):
            self.table.take_in_order()
            self.residual_slots.reserve(blocks)

    def _blocks(self, wanted: list[int]) -> list[int]:
        """Complete blocks of sequences of so many tokens, or as many as they have pages."""
        return [max(tokens // BLOCK, self.table.held_blocks(seq)) for seq, tokens in enumerate(wanted)]

    def _complete(self) -> list[int]:
        """Complete blocks of each sequence."""
        return [self.table.tokens(seq) // BLOCK for seq in range(self.batch)]

    def _look_at_sharing(self) -> None:
        """Let the books of residuals, and the device, know which blocks of each sequence are shared by now."""
        slots = self.residual_slots
        if slots is not None and not slots.is_current:
            slots.look(self._complete(), [self.table.shared_blocks(seq) for seq in range(self.batch)])

    def _share_slots(self) -> None:
        """After blocks have become shared: slots of their own for what each sequence has pages for, as far as there are any."""
        self._look_at_sharing()
        self._reserve_slots([0] * self.batch)

    def advance(self, tokens: int) -> None:
        """Note that a replayed graph has appended ``tokens`` tokens (at most 64) to every sequence.

        Raises:
            RuntimeError: an earlier replay completed a block for which no page was reserved; what it brought is lost.
        """
        tokens = whole_number("tokens", tokens)
        if not 0 <= tokens <= BLOCK:
            raise ValueError(f"a step appends 0 to {BLOCK} tokens, got {tokens}")
        self._changes.check()
        self._check_overrun()
        old = [self.table.tokens(seq) // BLOCK for seq in range(self.batch)]
        with self._changing():
            self._note([tokens] * self.batch)
        if old != [self.table.tokens(seq) // BLOCK for seq in range(self.batch)]:
            self._overrun_seen.copy_(self.overrun, non_blocking=True)  # for the next call, which need not wait

    def _check_overrun(self) -> None:
        if self._overrun_seen[0]:
            raise RuntimeError(
                "a replayed step completed a block for which no page was reserved, and its tokens are lost: reserve before "
                "replays, advance after each, and fill the cache anew"
            )

    def _note(self, new: list[int]) -> None:
        """Note that the device has appended so many tokens, at most 64, to each sequence."""
        for seq, count in enumerate(new):
            old = self.table.tokens(seq)
            self.table.note_tokens(seq, old + count)
            for block in range(old // BLOCK, (old + count - 1) // BLOCK + 1):
                self._tail_blocks[seq][block % 2] = block

    def free(self, seq: int) -> None:
        """Empty one sequence and give its pages back."""
        seq = self._checked_seq(seq)
        with self._changing():
            self._empty(seq)

    def _empty(self, seq: int) -> None:
        self.table.release(seq, 0)
        self.table.set_tokens(seq, 0)
        if self.residual_slots is not None:
            self.residual_slots.release(seq)
        self._tail_blocks[seq] = [-1, -1]

    def fork(self, source: int, target: int) -> None:
        """Make one sequence a copy of another: complete blocks are shared, the newest ones copied. What it held is freed.

        Raises:
            ValueError: sequences out of range or the same.
        """
        source, target = self._checked_seq(source), self._checked_seq(target)
        if source == target:
            raise ValueError(f"source and target must differ, got {source} twice")
        self._check_overrun()
        with self._changing():
            self._empty(target)
            self.table.share(source, target)
            if self.residual_slots is not None:
                self.residual_slots.share(source, target, self.table.tokens(source) // BLOCK)
                self._share_slots()
            self.tail[target] = self.tail[source]
            for x in self.per_sequence.given():
                x[target] = x[source]
            self._tail_blocks[target] = list(self._tail_blocks[source])

    def truncate(self, seq: int, tokens: int) -> None:
        """Keep the first ``tokens`` tokens of one sequence (speculative rollback).

        Lossless while the new end lies in one of the two newest blocks; further back the incomplete block is read from its
        page, in high precision where it is still kept. With ``residual_share`` below 1 a block that gave up its residual to one
        that is taken back does not get it again.

        Raises:
            ValueError: a sequence out of range, or more tokens than there are.
        """
        seq, tokens = self._checked_seq(seq), whole_number("tokens", tokens)
        if not 0 <= tokens <= self.table.tokens(seq):
            raise ValueError(f"sequence {seq} has {self.table.tokens(seq)} tokens: it cannot keep {tokens}")
        self._check_overrun()
        block = tokens // BLOCK
        with self._changing():
            if tokens % BLOCK and self._tail_blocks[seq][block % 2] != block:
                read = self._read(seq, self.table.table[seq, block : block + 1].long(), block)
                self._tail_of(seq, block).copy_(torch.stack([read.high_k[0], read.high_v[0]]))
                self._tail_blocks[seq][block % 2] = block
            # Nothing stays of a block that begins at the new end: whole blocks that follow may not pass through the tail.
            self._tail_blocks[seq] = [held if held * BLOCK < tokens else -1 for held in self._tail_blocks[seq]]
            self.table.release(seq, block)
            self.table.set_tokens(seq, tokens)
            if self.residual_slots is not None:
                self.residual_slots.note_sharing()
                self._look_at_sharing()
                self.residual_slots.cut(seq, self.table.pages(seq), self.pool.high)
                self.table.give_back_in_order()

    def select(self, seqs: Iterable[int]) -> None:
        """Make sequence i what sequence ``seqs[i]`` was (beam search, repeating or dropping sequences of a batch).

        Copies share their complete blocks. The batch becomes ``len(seqs)``; while it stays the same, so do the tensors on
        the device, and a captured graph remains valid.

        Raises:
            ValueError: no sequences, or one out of range.
        """
        seqs = [self._checked_seq(seq) for seq in whole_numbers("seqs", seqs, each="seq")]
        if not seqs:
            raise ValueError("a cache holds at least one sequence, got none")
        if self.backend == "triton":
            check_sizes(len(seqs), self.kv_heads, self.table.table.shape[1])
        with self._changing():
            index = torch.tensor(seqs, device=self.device)
            tail, per_sequence = self.tail[index], self.per_sequence.each(lambda x: x[index])
            if len(seqs) == self.batch:
                self.tail.copy_(tail)
                for x, new in zip(self.per_sequence.given(), per_sequence.given(), strict=True):
                    x.copy_(new)
            else:
                self.tail, self.per_sequence = tail, per_sequence
                self.rings = torch.arange(len(seqs), dtype=torch.int32, device=self.device)
            self._tail_blocks = [list(self._tail_blocks[seq]) for seq in seqs]
            if self.residual_slots is not None:
                self.residual_slots.select(seqs, self._complete())
            self.table.select(seqs)
            self._share_slots()

    def branch(self) -> Self:
        """Another cache over the same pool that begins with what this one holds; complete blocks are shared.

        The pages it takes go back to the pool when it is freed or no longer used.
        """
        with self._reading():
            self._changes.check()
            other = object.__new__(type(self))
            other.__dict__.update(self.__dict__)
            other._changes = self._changes.anew()
            other.table, other.tail, other.overrun = self.table.branch(), self.tail.clone(), self.overrun.clone()
            other._overrun_seen = self._overrun_seen.clone()
            other.per_sequence = self.per_sequence.each(torch.clone)
            other._tail_blocks = [list(held) for held in self._tail_blocks]
            if self.residual_slots is not None:
                other.residual_slots = self.residual_slots.branch(self._complete())
                for each in (self, other):
                    with each._changing():
                        each._share_slots()
            return other

    def __copy__(self) -> Self:
        """A branch: two caches with the same books would write over each other."""
        return self.branch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.branch()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a cache shares its pages, so it cannot be pickled: thrift_attn.cache.state.state_dict gives what it holds as "
            "tensors, ThriftCache.save writes a file"
        )

    def _tail_of(self, seq: int, block: int) -> Tensor:
        """Where K and V of a block lie in 16 bits while it is one of the two newest: a view ``[2, Hkv, 64, D]``."""
        at = block % 2 * BLOCK
        return self.tail[seq, :, :, at : at + BLOCK]

    def read(self, seq: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """K and V of one sequence in high precision, ``[Hkv, T, D]`` in the dtype of the cache.

        Args:
            seq: the sequence.
            start: the first token.
            stop: the token behind the last; by default, and at most, the end of the sequence.

        Raises:
            ValueError: a start or a stop below 0.
        """
        seq, start = self._checked_seq(seq), whole_number("start", start)
        stop = None if stop is None else whole_number("stop", stop)
        for name, token in (("start", start), ("stop", stop)):
            if token is not None and token < 0:
                raise ValueError(f"{name} must be at least 0, got {token}")
        with self._reading():
            self._changes.check()
            tokens, pages = self.table.tokens(seq), self.table.pages(seq)
            stop = tokens if stop is None else min(stop, tokens)
            first, last = start // BLOCK, -(-stop // BLOCK)
            read = self._read(seq, pages[first:last], first)
            kv = torch.stack([read.high_k, read.high_v]).to(self.dtype).transpose(1, 2).flatten(2, 3)  # [2, Hkv, T, D]
            if len(pages) < last:
                kv = torch.cat([kv, self._tail_of(seq, len(pages))[:, :, : tokens % BLOCK]], 2)
            at = start - first * BLOCK
            return kv[0, :, at : at + max(0, stop - start)], kv[1, :, at : at + max(0, stop - start)]

    def _read(self, seq: int, pages: Tensor, first: int) -> Blocks:
        """What pages of a sequence decode to, those of the blocks from ``first`` on."""
        sequence = self._sequence(seq)
        slots = None if self.residual_slots is None else self.residual_slots.of_pages(pages)
        read = read_blocks(self.pool, pages, numerics=self.numerics, sequence=sequence, slots=slots)
        if self.numerics.exact_sink and first == 0 and len(pages):
            read.high_v[0, :, 0] = sequence.sink_value
        return read

    def _sequence(self, seq: int) -> SequenceTensors:
        """Return views of what belongs to one sequence, without the dimension B."""
        return self.per_sequence.each(lambda x: x[seq])

    def _checked_seq(self, seq: int) -> int:
        seq = whole_number("seq", seq)
        if not 0 <= seq < self.batch:
            raise ValueError(f"seq must be from 0 to {self.batch - 1}, got {seq}")
        return seq
