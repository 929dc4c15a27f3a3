"""A program for every block of a short page table, against the lists that the kernels for longer ones write."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from support.device import DEVICE
from support.kernel_caches import both, check, query, tokens
from support.paged import make_cache
from support.steps import cache_tensors, numerics_of, poisoned_step
from thrift_attn import floored, fraction
from thrift_attn.config import ThriftConfig
from thrift_attn.decode import ops
from thrift_attn.decode.tensors import CacheTensors, DecodeStep
from thrift_attn.numerics import DecodeNumerics


def draw(lengths: list[int], *, heads: int = 4, dim: int = 64, tq: int = 1, plane: str = "nested", share: float = 0.4,
         seed: int = 1) -> tuple[torch.Tensor, CacheTensors]:  # fmt: skip
    """Queries, and a cache of two KV heads in which a sequence of n blocks promotes ``share`` * n of them."""
    held = make_cache(lengths, 2, dim, plane=plane)
    capacity = held.page_table.shape[1]
    budget = torch.tensor([int(share * n + 0.5) for n in range(capacity + 1)], dtype=torch.int32, device=DEVICE)
    gen = torch.Generator().manual_seed(seed)
    extras = {
        name: torch.randn(len(lengths), 2, dim, generator=gen).half().to(DEVICE)
        for name in ("block0_mean", "sink_value")
    }
    tensors = cache_tensors(
        held.centres, held.page_table, held.lengths, budget=budget, base=held.base, high=held.high, tail=held.tail,
        rings=held.rings, **extras,
    )  # fmt: skip
    q = (2 * torch.randn(len(lengths), heads, tq, dim, generator=gen)).half().to(DEVICE)
    return q, tensors


def attend(q: torch.Tensor, cache: CacheTensors, numerics: DecodeNumerics, **options: Any) -> DecodeStep:
    step = poisoned_step(q, cache, numerics, splits=3, scale=q.shape[-1] ** -0.5, **options)
    for launch in ops.step_kernels(step).values():
        launch()
    return step


def close(got: DecodeStep, want: DecodeStep) -> None:
    assert not want.out.isnan().any()
    torch.testing.assert_close(got.out.float(), want.out.float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(got.lse, want.lse, rtol=0, atol=2e-3)


CASES: list[tuple[list[int], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ([64 * 6 + 7, 64 * 3, 5], {}, {}, {}),
    ([64 * 5], {"plane": "nested8", "dim": 80}, {}, {}),
    ([64 * 7 + 50, 64 * 4 + 63], {"tq": 3, "heads": 8}, {"force_first": 1, "force_last": 2}, {}),
    ([64 * 6 + 20, 200], {"tq": 5, "heads": 8}, {"sink_token": "none", "center": "none"}, {"window": 130}),
    ([64 * 4 + 33], {"dim": 128}, {}, {"softcap": 8.0}),
    ([64 + 63, 64, 63, 1], {"share": 1.0}, {}, {}),
]


@pytest.mark.parametrize(("lengths", "drawn", "computed", "limits"), CASES)
def test_both_ways_promote_the_same_blocks_and_answer_alike(lengths, drawn, computed, limits) -> None:
    q, cache = draw(lengths, **drawn)
    numerics = numerics_of(drawn.get("plane", "nested"), **computed)
    want = attend(q, cache, numerics, **limits)
    close(attend(q, cache, numerics, one_each=True, **limits), want)
    other = dataclasses.replace(cache, budget=cache.budget + (-1 if drawn.get("share") == 1.0 else 1))
    with pytest.raises(AssertionError):  # one block more or less would be seen
        close(attend(q, other, numerics, one_each=True, **limits), want)


def test_equal_scores_go_to_the_earlier_block() -> None:
    """Keys that tie at the threshold: as the lists break them."""
    q, cache = draw([64 * 8], share=0.5)
    alike = cache.k_block_mean[cache.page_table[0, :1].long()].expand_as(cache.k_block_mean).clone()
    cache = dataclasses.replace(cache, k_block_mean=alike)
    numerics = numerics_of(sink_token="none", force_last=0)
    want = attend(q, cache, numerics)
    assert want.block_indices[0, 0, 0, :4].tolist() == [0, 1, 2, 3]
    close(attend(q, cache, numerics, one_each=True), want)


def test_a_cache_whose_budget_promotes_all_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the floor of its budget two kernels attend, whatever the lengths are; one page more, and there is a choice."""
    monkeypatch.setattr(ops, "multiprocessors", lambda device: 132)
    asked, real = [], ops.step_kernels
    monkeypatch.setattr(ops, "step_kernels", lambda step: asked.append(list(real(step))) or real(step))
    k, v = tokens(64 * 3 + 40)
    for pages, kernels in ((4, ["attend", "merge"]), (5, ["scores", "attend", "merge"])):
        config = ThriftConfig.for_cache(budget=floored(0.05, blocks=4))
        caches = both(pages=pages, config=config)
        for cache in caches:
            cache.append(k, v)
        check(*caches, query(2))
        assert asked.pop() == kernels
        assert not asked
    wide = both(pages=140, config=ThriftConfig.for_cache(budget=fraction(0.3)))  # more than a program each
    for cache in wide:
        cache.append(k, v)
    check(*wide, query(2))
    assert asked == [["scores", "select", "attend", "merge"]]


def test_steps_that_cannot_have_a_program_for_every_block_are_refused() -> None:
    q, cache = draw([130])
    step = poisoned_step(q, cache, numerics_of(), one_each=True)
    with pytest.raises(ValueError, match="a split for each of 3 blocks needs as many splits"):
        dataclasses.replace(step, partial_out=step.partial_out[:, :, :2])
    with pytest.raises(ValueError, match="a residual of every block and at most 128 dimensions, got 3 splits, 16bit"):
        dataclasses.replace(step, numerics=numerics_of("16bit"))
