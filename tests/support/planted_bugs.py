"""Bugs as they happen in caches, to be planted one at a time: what looks for bugs must find each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from thrift_attn.cache import paged, state
from thrift_attn.cache.page_table import PageTable
from thrift_attn.cache.paged import PagedThriftCache
from thrift_attn.cache.residual_slots import ResidualSlots
from thrift_attn.config import BLOCK


def truncate_forgets_nothing(patch: pytest.MonkeyPatch) -> None:
    """The tail blocks of blocks that were taken back count as those of the blocks that come after."""
    truncate = PagedThriftCache.truncate

    def planted(self: Any, seq: int, tokens: int) -> None:
        before = list(self._tail_blocks[seq])
        truncate(self, seq, tokens)
        after = zip(self._tail_blocks[seq], before, strict=True)
        self._tail_blocks[seq] = [now if now >= 0 else old for now, old in after]

    patch.setattr(PagedThriftCache, "truncate", planted)


def fork_leaves_the_tail(patch: pytest.MonkeyPatch) -> None:
    """The incomplete block of the target stays what it was."""
    fork = PagedThriftCache.fork

    def planted(self: Any, source: int, target: int) -> None:
        before = self.tail[target].clone()
        fork(self, source, target)
        self.tail[target] = before

    patch.setattr(PagedThriftCache, "fork", planted)


def freed_page_is_still_in_a_table(patch: pytest.MonkeyPatch) -> None:
    """A page goes back to the pool although another sequence shares it."""

    def planted(self: Any, seq: int, blocks: int) -> None:
        given = self._owned[seq][blocks:]
        del self._owned[seq][blocks:]
        self._free.extend(page for page in given if page not in self._free)

    patch.setattr(PageTable, "_give_back", planted)


def one_block_too_many_is_shared(patch: pytest.MonkeyPatch) -> None:
    """A branch takes the page that is reserved for the incomplete block, too: the length is rounded up."""
    branch = PageTable.branch

    def planted(self: Any) -> PageTable:
        tokens = self._tokens
        try:
            self._tokens = [-(-n // BLOCK) * BLOCK for n in tokens]
            other = branch(self)
        finally:
            self._tokens = tokens
        other._tokens = list(tokens)
        return other

    patch.setattr(PageTable, "branch", planted)


def residual_of_another_page(patch: pytest.MonkeyPatch) -> None:
    """Of several blocks packed at once, each gets the high-precision plane of its neighbour."""
    write = paged.write_blocks

    def planted(pool: Any, pages: torch.Tensor, *arguments: Any, **options: Any) -> None:
        write(pool, pages, *arguments, **options)
        pool.high[pages] = pool.high[pages.roll(1)]

    patch.setattr(paged, "write_blocks", planted)


def stale_block_mean(patch: pytest.MonkeyPatch) -> None:
    """A page that is used again keeps the mean of the block that it held before."""
    write = paged.write_blocks

    def planted(pool: Any, pages: torch.Tensor, *arguments: Any, **options: Any) -> None:
        before = pool.k_block_mean[pages].clone()
        write(pool, pages, *arguments, **options)
        used = before.any(-1, keepdim=True)
        pool.k_block_mean[pages] = torch.where(used, before, pool.k_block_mean[pages])

    patch.setattr(paged, "write_blocks", planted)


def select_leaves_the_first_value(patch: pytest.MonkeyPatch) -> None:
    """Rows are exchanged, but for the V of their first tokens."""
    select = PagedThriftCache.select

    def planted(self: Any, seqs: list[int]) -> None:
        before = self.per_sequence.sink_value.clone()
        select(self, seqs)
        if len(seqs) == len(before):
            self.per_sequence.sink_value.copy_(before)

    patch.setattr(PagedThriftCache, "select", planted)


def file_without_tail_blocks(patch: pytest.MonkeyPatch) -> None:
    """A cache that is read from a file takes its newest complete block for one that is not kept in 16 bits."""
    load_state_dict = state.load_state_dict

    def planted(cache: PagedThriftCache, saved: dict[str, torch.Tensor]) -> None:
        load_state_dict(cache, saved)
        for seq in range(cache.batch):
            whole = cache.tokens(seq) // BLOCK
            cache._tail_blocks[seq] = [held if held == whole else -1 for held in cache._tail_blocks[seq]]

    patch.setattr(state, "load_state_dict", planted)


def interrupted_change_is_not_marked(patch: pytest.MonkeyPatch) -> None:
    """A cache that was interrupted halfway goes on as if nothing had been."""

    @contextmanager
    def planted(self: Any) -> Iterator[None]:
        with self._lock:
            yield

    patch.setattr(PagedThriftCache, "_changing", planted)


def victim_still_names_its_slot(patch: pytest.MonkeyPatch) -> None:
    """A block that gave up its residual for a new one reads that of the new one as its own."""
    admit = ResidualSlots.admit

    def planted(self: Any, seq: int, pages: torch.Tensor, new: int, mass: torch.Tensor) -> torch.Tensor:
        old, slot_of_page = pages[: len(pages) - new], self.tensors.slot_of_page
        before = slot_of_page[old]
        found = admit(self, seq, pages, new, mass)
        slot_of_page[old] = torch.where(slot_of_page[old] < 0, before, slot_of_page[old])
        return found

    patch.setattr(ResidualSlots, "admit", planted)


def fork_does_not_hold_the_slots(patch: pytest.MonkeyPatch) -> None:
    """The residuals of a fork go back to the pool with the sequence that it was made of."""
    share = ResidualSlots.share

    def planted(self: Any, source: int, target: int, blocks: int) -> None:
        share(self, source, target, blocks)
        for slot in self._owned[target]:
            self._references[slot] -= 1

    patch.setattr(ResidualSlots, "share", planted)


def cut_leaves_the_planes(patch: pytest.MonkeyPatch) -> None:
    """What a shorter sequence keeps is said to lie in other slots, and its planes are not moved there."""
    cut = ResidualSlots.cut

    def planted(self: Any, seq: int, pages: torch.Tensor, high: torch.Tensor) -> None:
        cut(self, seq, pages, high.clone())

    patch.setattr(ResidualSlots, "cut", planted)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    plant.__name__: plant
    for plant in (
        truncate_forgets_nothing,
        fork_leaves_the_tail,
        freed_page_is_still_in_a_table,
        one_block_too_many_is_shared,
        residual_of_another_page,
        stale_block_mean,
        select_leaves_the_first_value,
        file_without_tail_blocks,
        interrupted_change_is_not_marked,
        victim_still_names_its_slot,
        fork_does_not_hold_the_slots,
        cut_leaves_the_planes,
    )
}

SEEDS = {
    "select_leaves_the_first_value": 10,
    "victim_still_names_its_slot": 5,
    "cut_leaves_the_planes": 7,
}
"""Seeds of campaigns that meet a bug early, which saves time; any seed meets it some day."""
