"""Which slots of the plane of promoted blocks belong to which sequence, and which blocks lie in them.

A slot has room for one block of every KV head; each head decides which block that is (`thrift_attn.reference.residents`). The
host deals out slots: as many as the quota of a sequence is, counted by the sequences that share them, as pages are. Which
blocks are residents is known to the device alone. In a step of decode the kernels decide it; here it is decided for many
blocks at once, for what a sequence keeps when it is cut, and on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thrift_attn.cache.page_table import count_shared
from thrift_attn.decode.tensors import ResidentTensors
from thrift_attn.reference.residents import keep, own_quota


class ResidualSlots:
    """Slots of a batch of sequences, and what the device knows of residents.

    Sequences share the first slots of their lists, and in them the residents of the blocks that they share. Only what a
    sequence holds alone changes.

    Args:
        slots: in the pool.
        pages: in the pool of pages.
        batch: sequences.
        kv_heads: Hkv.
        quota: residents of a sequence by its complete blocks (`thrift_attn.reference.residents.quota_table`).
        device: where the tensors live.

    Attributes:
        tensors: on the device, as the kernels take them.
    """

    def __init__(self, slots: int, pages: int, batch: int, kv_heads: int, quota: Tensor, device: torch.device):
        self._quota: list[int] = quota.tolist()
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._used = [0] * batch  # so many of the first slots of a sequence may have residents
        self._bounds = [[0, 0, 0] for _ in range(batch)]  # what the device knows: `ResidentTensors.bounds`
        self._references = [0] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._sharing = [0]  # counts changes of who shares what, of the pool

        def empty(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        self._sharing_seen = 0
        self.tensors = ResidentTensors(
            slot_of_page=empty(pages, kv_heads),
            block_of_slot=empty(slots, kv_heads),
            past_mass=torch.zeros(pages, kv_heads, device=device),
            slots=empty(batch, max(1, min(slots, 2 * (len(self._quota) - 1)))),
            bounds=torch.zeros(batch, 3, dtype=torch.int32, device=device),
            quota=quota.to(device),
        )

    @property
    def width(self) -> int:
        """Most slots of one sequence."""
        return self.tensors.slots.shape[1]

    @property
    def free_slots(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free)

    def nbytes(self) -> int:
        """Bytes of the tensors on the device."""
        return sum(x.numel() * x.element_size() for x in vars(self.tensors).values())

    # -- books ---------------------------------------------------------------------------------------------------------

    def quota(self, seq: int, blocks: int) -> int:
        """Residents that a sequence of ``blocks`` complete blocks may have of those that it holds alone."""
        shared_slots, _, shared_blocks = self._bounds[seq]
        return own_quota(self._quota[blocks], min(shared_slots, shared_blocks), blocks - shared_blocks)

    def most(self, seq: int, blocks: int) -> int:
        """Residents that a sequence of ``blocks`` complete blocks has at most, those included that it shares."""
        return min(blocks, self._bounds[seq][0] + self.quota(seq, blocks))

    def missing(self, wanted: list[int]) -> int:
        """Slots that `reserve` would have to give."""
        return sum(self._missing(wanted))

    def _missing(self, wanted: list[int]) -> list[int]:
        return [
            max(0, min(self.width, self._bounds[seq][0] + self.quota(seq, blocks)) - len(self._owned[seq]))
            for seq, blocks in enumerate(wanted)
        ]

    def check_room(self, wanted: list[int], grows: list[bool]) -> None:
        """Check that there are slots for new blocks.

        Args:
            wanted: complete blocks of each sequence.
            grows: which of them get blocks; what the others lack is not asked for now.

        Raises:
            RuntimeError: too few slots are free, or a sequence shares so many that its list has no room for its own.
        """
        missing = sum(count for count, more in zip(self._missing(wanted), grows, strict=True) if more)
        full = [
            seq
            for seq, blocks in enumerate(wanted)
            if grows[seq] and self._bounds[seq][0] + self.quota(seq, blocks) > self.width
        ]
        if missing > len(self._free) or full:
            raise RuntimeError(
                f"the slots of residuals are exhausted: {missing} more are needed and {len(self._free)} of "
                f"{len(self._references)} are free{f', sequence {full[0]} shares too many' if full else ''}; what sequences "
                f"share (beams, forks) keeps its slots: free a sequence, or make the pool or residual_share larger"
            )

    def reserve(self, wanted: list[int]) -> None:
        """Give every sequence the slots for ``wanted`` complete blocks, or those that are left.

        With fewer than its quota a sequence has fewer residents; `check_room` says so before.
        """
        for seq, count in enumerate(self._missing(wanted)):
            given = [self._free.pop() for _ in range(min(count, len(self._free)))]
            for slot in given:
                self._references[slot] = 1
            self._owned[seq] += given
            if given:
                self._write(seq)

    def _write(self, seq: int) -> None:
        """Tell the device the slots of a sequence."""
        owned, slots = self._owned[seq], self.tensors.slots
        slots[seq, : len(owned)] = torch.tensor(owned, dtype=torch.int32).to(slots.device)
        self._bound(seq, self._bounds[seq][0], self._bounds[seq][2])

    def _bound(self, seq: int, shared_slots: int, shared_blocks: int, *, again: bool = False) -> None:
        """Tell the device what a sequence shares, if it does not know, or again."""
        bounds = [shared_slots, len(self._owned[seq]), shared_blocks]
        if again or bounds != self._bounds[seq]:
            self.tensors.bounds[seq] = torch.tensor(bounds, dtype=torch.int32).to(self.tensors.bounds.device)
            self._bounds[seq] = bounds

    def look(self, blocks: list[int], shared_blocks: list[int]) -> None:
        """Note what sequences share now.

        Args:
            blocks: complete blocks of each sequence.
            shared_blocks: how many of the first of them other sequences hold too.
        """
        again, seen = self._sharing_seen < 0, self._sharing[0]
        self._sharing_seen = -1  # until the device knows all: an interrupt may come
        for seq, owned in enumerate(self._owned):
            self._note_used(seq, blocks[seq])
            shared = count_shared(owned, self._references)
            self._bound(seq, shared, shared_blocks[seq], again=again)
        self._sharing_seen = seen

    @property
    def is_current(self) -> bool:
        """Whether nothing has been shared or given back since `look`."""
        return self._sharing_seen == self._sharing[0]

    def _note_used(self, seq: int, blocks: int) -> None:
        """Note that residents may lie in as many slots as a sequence of so many blocks has had."""
        self._used[seq] = max(self._used[seq], self._bounds[seq][0] + self.quota(seq, blocks))

    def note_sharing(self) -> None:
        """Note that pages of a sequence have been given back, which others may have shared."""
        self._sharing[0] += 1

    def _shareable(self, seq: int, blocks: int) -> list[int]:
        """The slots that the residents of a sequence lie in."""
        self._note_used(seq, blocks)
        return self._owned[seq][: self._used[seq]]

    def _hold(self, slots: list[int]) -> None:
        self._sharing[0] += 1
        for slot in slots:
            self._references[slot] += 1

    def _give_back(self, slots: list[int]) -> None:
        self._sharing[0] += 1
        for slot in slots:
            self._references[slot] -= 1
            if not self._references[slot]:
                self._free.append(slot)

    def release(self, seq: int) -> None:
        """Give back the slots of a sequence."""
        given, self._owned[seq], self._used[seq] = self._owned[seq], [], 0
        self._give_back(given)
        self._bound(seq, 0, 0)

    def share(self, source: int, target: int, blocks: int) -> None:
        """Let an empty sequence hold the slots of the ``blocks`` complete blocks of another."""
        held = self._shareable(source, blocks)
        self._hold(held)
        self._owned[target], self._used[target] = list(held), len(held)
        self._write(target)

    def select(self, seqs: list[int], blocks: list[int]) -> None:
        """Make sequence i what sequence ``seqs[i]`` was; copies share slots, sequences left out give theirs back.

        Args:
            seqs: of the old sequences.
            blocks: complete blocks of the old sequences.
        """
        shareable = [self._shareable(seq, count) for seq, count in enumerate(blocks)]
        owned = [
            list(self._owned[seq]) if seq not in seqs[:at] else list(shareable[seq]) for at, seq in enumerate(seqs)
        ]
        used = [len(shareable[seq]) for seq in seqs]
        for held in owned:
            self._hold(held)
        self._give_back_all()
        self._owned, self._used = owned, used
        self._bounds = [[0, 0, 0] for _ in seqs]
        tensors = self.tensors
        if len(seqs) != len(tensors.slots):
            slots, bounds = (
                x.new_full((len(seqs), x.shape[1]), fill) for x, fill in ((tensors.slots, -1), (tensors.bounds, 0))
            )
            self.tensors = ResidentTensors(**{**vars(tensors), "slots": slots, "bounds": bounds})
        self.tensors.bounds.zero_()
        for seq in range(len(seqs)):
            self._write(seq)

    def branch(self, blocks: list[int]) -> ResidualSlots:
        """The books of other sequences that begin as these, over the same slots."""
        owned = [list(self._shareable(seq, count)) for seq, count in enumerate(blocks)]
        for held in owned:
            self._hold(held)
        own = {"slots": self.tensors.slots.clone(), "bounds": self.tensors.bounds.clone()}
        mine = vars(self) | {
            "tensors": ResidentTensors(**{**vars(self.tensors), **own}),
            "_owned": owned,
            "_used": [len(held) for held in owned],
            "_bounds": [list(bounds) for bounds in self._bounds],
            "_sharing_seen": -1,  # all is new to the device
        }
        other = ResidualSlots.__new__(ResidualSlots)
        other.__dict__.update(mine)
        for seq in range(len(owned)):
            other._write(seq)
        return other

    def check_slots(self, lists: list[list[int]]) -> None:
        """Raise RuntimeError if `assign` would not find as many slots."""
        count = 1 + max((number for held in lists for number in held), default=-1)
        if count > len(self._free):
            raise RuntimeError(
                f"the slots of residuals are exhausted: {count} are needed and {len(self._free)} of "
                f"{len(self._references)} are free; free a sequence, or make the pool or residual_share larger"
            )

    def assign(self, lists: list[list[int]]) -> list[int]:
        """Give empty sequences slots by number; equal numbers become one shared slot.

        Returns:
            The slot of each number.

        Raises:
            RuntimeError: the slots are exhausted. Nothing has changed then.
        """
        self.check_slots(lists)
        count = 1 + max((number for held in lists for number in held), default=-1)
        given = [self._free.pop() for _ in range(count)]
        self._owned = [[given[number] for number in held] for held in lists]
        self._used = [len(held) for held in self._owned]
        for seq, held in enumerate(self._owned):
            self._hold(held)
            self._write(seq)
        return given

    def slots_of(self, seq: int, blocks: int) -> list[int]:
        """The slots in which the residents of a sequence of so many complete blocks lie."""
        return list(self._shareable(seq, blocks))

    def _give_back_all(self) -> None:
        """Give back the slots of all sequences, each list once, whatever interrupts it."""
        given, self._owned = self._owned, []
        for held in given:
            self._give_back(held)

    def __del__(self, *_: Any) -> None:
        if hasattr(self, "_owned"):  # other books may live on over the same slots
            self._give_back_all()

    # -- residents -----------------------------------------------------------------------------------------------------

    def of_pages(self, pages: Tensor) -> Tensor:
        """The slots of the blocks in ``pages`` int64 ``[n]``, below 0 where they are no residents: int64 ``[n, Hkv]``."""
        return self.tensors.slot_of_page[pages].long()

    def mass(self, pages: Tensor) -> Tensor:
        """Past mass of the blocks in ``pages`` int64 ``[n]``: float32 ``[Hkv, n]``."""
        return self.tensors.past_mass[pages].T

    def set_mass(self, seq: int, pages: Tensor, mass: Tensor) -> None:
        """Set the past mass ``[Hkv, n]`` of the blocks of a sequence, of those that it holds alone.

        Args:
            seq: the sequence.
            pages: int64 ``[n]``, its first n pages.
            mass: float32 ``[Hkv, n]``.
        """
        shared = self._bounds[seq][2]
        self.tensors.past_mass[pages[shared:]] = mass.T[shared:]

    def admit(self, seq: int, pages: Tensor, new: int, mass: Tensor) -> Tensor:
        """Decide which blocks of a sequence are residents, now that new ones are to be packed.

        Args:
            seq: the sequence.
            pages: int64 ``[n]``, the pages of its complete blocks, the new ones included.
            new: how many of the last blocks are new.
            mass: float32 ``[Hkv, n]``, their past mass.

        Returns:
            int64 ``[new, Hkv]``, the slots of the new blocks, below 0 for those that are no residents.
        """
        tensors, blocks = self.tensors, len(pages)
        shared_slots, granted, shared_blocks = self._bounds[seq]
        old = self.of_pages(pages[: blocks - new])  # [n - new, Hkv]
        slots = tensors.slots[seq, shared_slots:granted].long()  # [G]
        held = torch.nn.functional.pad(torch.isin(old, slots).T, (0, new))
        kept = keep(mass, held, new=new, shared=shared_blocks, quota=self.quota(seq, blocks))
        # Blocks in slots that others hold too stay; so do their slots when the others are cut.
        stays = kept[:, : blocks - new] | ((old.T >= 0) & ~held[:, : blocks - new])
        # The slots that no kept block lies in go to the new ones, in order.
        lies_in = torch.where(stays, old.T, -1)  # [Hkv, n - new]
        taken = torch.zeros(len(kept), len(tensors.block_of_slot) + 1, dtype=torch.bool, device=pages.device)
        taken.scatter_(1, lies_in + 1, True)
        empty = ~taken[:, slots + 1]  # [Hkv, G]
        order = empty.int().argsort(dim=1, descending=True, stable=True)
        begins = kept[:, blocks - new :]  # [Hkv, new]
        place = (begins.cumsum(1) - 1).clamp(min=0)
        begins = begins & (place < empty.sum(1, keepdim=True))
        found = slots[order.gather(1, place.clamp(max=max(0, granted - shared_slots - 1)))] if len(slots) else place
        found = torch.where(begins, found, -1)  # [Hkv, new]
        tensors.slot_of_page[pages[shared_blocks:]] = torch.cat([lies_in, found], 1).T[shared_blocks:].int()
        head, at = begins.nonzero(as_tuple=True)
        tensors.block_of_slot[found[head, at], head] = (blocks - new + at).int()
        self.set_mass(seq, pages, mass)
        return found.T

    def _drop_unused(self, seq: int, pages: Tensor) -> None:
        """Give back the last slots of a sequence in which none of its blocks lies. Asks the device."""
        lie_in = set(self.of_pages(pages).unique().tolist())
        owned = self._owned[seq]
        count = max((at + 1 for at, slot in enumerate(owned) if slot in lie_in), default=0)
        given, self._owned[seq] = owned[count:], owned[:count]
        self._used[seq] = count
        self._give_back(given)
        shared = count_shared(self._owned[seq], self._references)
        self._bound(seq, shared, self._bounds[seq][2])

    def cut(self, seq: int, pages: Tensor, high: Tensor) -> None:
        """Give back slots that a sequence has beyond its quota, and move what it keeps into the others.

        Args:
            seq: the sequence.
            pages: int64 ``[n]``, the pages of its complete blocks.
            high: the plane of promoted blocks ``[slots, Hkv, ...]``.
        """
        blocks = len(pages)
        if not blocks:
            self.release(seq)
            return
        if self._bounds[seq][0] > self._bounds[seq][2]:  # slots of blocks that it does not hold any more
            self._drop_unused(seq, pages)
        shared_slots, granted, shared_blocks = self._bounds[seq]
        room = self.quota(seq, blocks)
        if granted - shared_slots <= room:
            return
        tensors, slots = self.tensors, self.of_pages(pages).T  # [Hkv, n]
        own = torch.isin(slots, tensors.slots[seq, shared_slots:granted].long())
        kept = keep(self.mass(pages), own, new=0, shared=shared_blocks, quota=room, shrink=True)
        stays = torch.where(own, -1, slots).T.int()  # in slots that others hold too
        tensors.slot_of_page[pages[shared_blocks:]] = stays[shared_blocks:]
        if room:
            order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :room]  # [Hkv, room] blocks
            there = kept.gather(1, order)
            heads = torch.arange(len(kept), device=pages.device)
            to = tensors.slots[seq, shared_slots : shared_slots + order.shape[1]].long()
            moved = high[slots.gather(1, order).clamp(min=0).T, heads]
            high[to] = torch.where(there.T[..., None], moved, high[to])
            head, at = there.nonzero(as_tuple=True)
            tensors.slot_of_page[pages[order[head, at]], head] = to[at].int()
            tensors.block_of_slot[to] = torch.where(there, order, -1).T.int()
        given, self._owned[seq] = self._owned[seq][shared_slots + room :], self._owned[seq][: shared_slots + room]
        self._used[seq] = shared_slots + room
        self._give_back(given)
        self._bound(seq, shared_slots, shared_blocks)
