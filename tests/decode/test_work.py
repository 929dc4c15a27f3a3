"""What a step costs follows the lengths, not the width of the page table, which in engines is that of the longest context."""

from __future__ import annotations

import pytest
import torch

from support.device import DEVICE
from support.paged import keep_some, make_cache, run
from thrift_attn.decode.attend import choose_splits


def moved(monkeypatch: pytest.MonkeyPatch, capacity: int, lengths: list[int], tq: int):
    """Elements that the kernels of a step load and store, and what the step gives."""
    from triton.runtime.interpreter import InterpreterBuilder

    cache = keep_some(make_cache(lengths, 1, 64, capacity=capacity), 0.5)
    q = torch.randn(len(lengths), 2, tq, 64, generator=torch.Generator().manual_seed(4)).half()
    budget = torch.ones(capacity + 1, dtype=torch.int32)
    count = {"load": 0, "store": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, ptrs, mask, *others):
        count["load"] += int(mask.data.sum())
        return load(self, ptrs, mask, *others)

    def counting_store(self, ptrs, value, mask, *others):
        count["store"] += int(mask.data.sum())
        return store(self, ptrs, value, mask, *others)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        out, lse, *_ = run(cache, q, budget, splits=12)
    return count, out, lse


@pytest.mark.skipif(DEVICE != "cpu", reason="loads are counted by the interpreter")
@pytest.mark.parametrize("tq", [1, 2])
def test_a_wide_table_moves_no_more_than_a_narrow_one(tq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [64 * 3 + 9, 0, 70]
    few, want, want_lse = moved(monkeypatch, 4, lengths, tq)
    for wide in (16_384, 16_385):  # the longest list held in registers, and one that is not
        count, out, lse = moved(monkeypatch, wide, lengths, tq)
        programs = len(lengths) * (-(-wide // 64) - 1)
        assert count["store"] == few["store"]
        # Programs that score what is not there load the length and end. A list that is not held is read in every round.
        held = 40 * 8 * len(lengths) if wide > 16_384 else 0
        assert count["load"] <= few["load"] + programs + held
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


def test_a_short_sequence_in_a_wide_table_has_as_many_splits_as_in_its_own() -> None:
    for batch in (1, 8, 64):
        splits = [choose_splits(blocks, batch, 8, 1, 1584) for blocks in (1, 16, 128, 200, 2048, 16_384, 65_536)]
        assert splits == sorted(splits)
