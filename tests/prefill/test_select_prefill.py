"""The choice of blocks for prefill against plain PyTorch: the same lists, ties included."""

from __future__ import annotations

import pytest
import torch

from support.device import DEVICE
from thrift_attn.config import BLOCK, Budget, ThriftConfig, floored, fraction, paper, top_k
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill.bundles import BlockPlan
from thrift_attn.prefill.pack import PackedKV
from thrift_attn.prefill.select import (
    MAX_BLOCKS,
    plan_blocks,
    select_rows,
    select_shared,
    visible_blocks,
)
from thrift_attn.reference.attention import Mask
from thrift_attn.reference.budget import blocks_per_row, list_capacity, promote
from thrift_attn.seq_layout import SeqLayout, dense, packed, padded

DEV = torch.device(DEVICE)


def seen_blocks(queries: int, keys: int, causal: bool, window: int | None) -> torch.Tensor:
    """bool [R, N] by brute force over all (query, key) pairs."""
    offset = keys - queries if causal else 0
    p = torch.arange(queries)[:, None] + offset
    t = torch.arange(keys)[None, :]
    pairs = (p >= 0) & ((t <= p) | (not causal)) & ((t > p - window) if window else True)
    pairs = pairs.expand(queries, keys)
    rows = torch.zeros(-(-(offset % BLOCK + queries) // BLOCK), -(-keys // BLOCK), dtype=torch.bool)
    for i, t in pairs.nonzero().tolist():
        rows[(offset % BLOCK + i) // BLOCK, t // BLOCK] = True
    return rows


SHAPES = [
    (200, 200, True, None), (70, 333, True, None), (150, 100, True, None), (65, 65, False, None), (64, 400, True, 130),
]  # fmt: skip


@pytest.mark.parametrize(("queries", "keys", "causal", "window"), SHAPES)
def test_visible_blocks(queries: int, keys: int, causal: bool, window: int | None) -> None:
    want = seen_blocks(queries, keys, causal, window).sum(-1)
    got = visible_blocks(torch.tensor([queries]), torch.tensor([keys]), len(want) + 2, causal=causal, window=window)
    assert got[0, : len(want)].tolist() == want.tolist()
    assert got[0, len(want) :].tolist() == [0, 0]
    mask = Mask(queries, keys, causal, window)
    assert dense(1, queries, keys, causal, torch.device("cpu")).q_blocks == len(want)
    assert mask.offset == (keys - queries if causal else 0)


@pytest.mark.parametrize(
    "budget",
    [fraction(0), fraction(0.05), fraction(0.37), fraction(1), floored(0.05, 3), floored(0.3, 16), top_k(3), paper()],
)
def test_budget_of_many_sequences(budget: Budget) -> None:
    lengths = [(1000, 1000), (130, 5000), (64, 64), (300, 200)]
    queries, keys = (torch.tensor(x) for x in zip(*lengths, strict=True))
    visible = visible_blocks(queries, keys, 18, causal=True, window=None)
    got = blocks_per_row(budget, visible, -(-keys // BLOCK))
    for one, seen, (_, tokens) in zip(got, visible, lengths, strict=True):
        want = blocks_per_row(budget, seen, -(-tokens // BLOCK))
        assert one.tolist() == want.tolist()
        assert int(want.max()) <= list_capacity(budget, -(-tokens // BLOCK))


def means_of_q_and_k(
    parts: int, heads: int, kv_heads: int, layout: SeqLayout, dim: int
) -> tuple[torch.Tensor, PackedKV]:
    means = torch.randn(parts, heads, layout.q_blocks, dim, device=DEVICE)
    return means, PackedKV(torch.randn(parts, kv_heads, layout.blocks, dim, device=DEVICE).half())


def plan(budget: Budget, layout: SeqLayout, **options) -> BlockPlan:
    return plan_blocks(PrefillNumerics.resolve(ThriftConfig(base_format="nvfp4", budget=budget)), layout, **options)


def check(chosen, counts, scores, visible, wanted, first: int, last: int) -> None:
    """Lists of one sequence [H, R, K] against `promote`; scores within rounding of the margin may swap."""
    want = promote(scores, visible, wanted, first=first, last=last)
    assert torch.equal(counts, wanted.int().expand_as(counts))
    swapped = 0
    for h in range(len(scores)):
        for r in range(scores.shape[1]):
            n = int(counts[h, r])
            got = chosen[h, r, :n].tolist()
            assert got == sorted(set(got))
            right = want[h, r].nonzero()[:, 0].tolist()
            for a, b in zip(sorted(set(got) - set(right)), sorted(set(right) - set(got)), strict=True):
                assert abs(float(scores[h, r, a] - scores[h, r, b])) < 1e-4
                swapped += 1
    assert swapped <= max(1, 0.001 * int(counts.sum()))


@pytest.mark.parametrize(
    ("shape", "first", "last", "budget"),
    [
        (SHAPES[0], 1, 1, fraction(0.4)), (SHAPES[1], 0, 0, top_k(2)), (SHAPES[2], 2, 2, top_k(3)),
        (SHAPES[3], 1, 1, fraction(0.5)), (SHAPES[4], 2, 1, top_k(2)),
        (SHAPES[1], 0, 1, floored(0.05, 2)), (SHAPES[2], 0, 1, floored(0.05, 16)),
    ],
)  # fmt: skip
def test_choice_equals_the_reference(shape, first: int, last: int, budget: Budget) -> None:
    queries, keys, causal, window = shape
    torch.manual_seed(queries)
    layout = dense(2, queries, keys, causal, DEV)
    means, packed_k = means_of_q_and_k(2, 4, 2, layout, 40)
    planned = plan(budget, layout, window=window)
    wanted = planned.wanted
    chosen, counts = select_rows(
        means, packed_k, layout=layout, plan=planned, force_first=first, force_last=last, window=window
    )
    visible = seen_blocks(queries, keys, causal, window).to(DEVICE)
    assert torch.equal(wanted[0].long(), blocks_per_row(budget, visible.sum(-1).cpu(), layout.blocks).to(DEVICE))
    for b in range(2):
        scores = means[b] @ packed_k.k_block_mean[b].float().repeat_interleave(2, 0).mT
        check(chosen[b], counts[b], scores, visible, wanted[0].long(), first, last)


def test_the_first_block_is_scored_by_another_mean() -> None:
    """Of its own sequence, in lists of rows end to end and in those of decode."""
    torch.manual_seed(7)
    lengths = [(65, 530), (140, 300)]
    cu = [torch.tensor([0, *x], device=DEVICE, dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)]
    every = packed(*cu, queries=205, keys=830, max_queries=140, max_keys=530, causal=True)
    means, packed_k = means_of_q_and_k(1, 4, 2, every, 40)
    packed_k = packed_k._replace(block0_mean=torch.randn(2, 2, 40, device=DEVICE).half())
    chosen, counts = select_rows(means, packed_k, layout=every, plan=plan(top_k(3), every))
    for b, (queries, keys) in enumerate(lengths):
        visible = seen_blocks(queries, keys, True, None).to(DEVICE)
        rows, blocks = visible.shape
        r, n = (slice(int(every.spans[b, i]), int(every.spans[b, i]) + size) for i, size in ((4, rows), (5, blocks)))
        own = packed_k.k_block_mean[0, :, n].float()
        own[:, 0] = packed_k.block0_mean[b].float()
        scores = means[0, :, r] @ own.repeat_interleave(2, 0).mT
        check(chosen[0, :, r], counts[0, :, r], scores, visible, visible.sum(-1).clamp(max=3), 0, 0)
    layout = dense(2, 3, 700, True, DEV)
    q, centres = torch.randn(2, 4, 3, 40, device=DEVICE).half(), torch.randn(2, 2, 11, 40, device=DEVICE).half()
    centres[:, :, 0], others = -100 * q[:, ::2, 0], q[:, ::2, 0]
    planned = plan(top_k(1), layout, shared=True)
    for favoured in (others, -others):
        chosen, _ = select_shared(q, PackedKV(centres, block0_mean=100 * favoured), layout=layout, plan=planned)
        assert (chosen == 0).all()


def test_ties_go_to_the_lower_index() -> None:
    layout = dense(1, 64, 64 * 37, True, DEV)
    means = torch.ones(1, 1, layout.q_blocks, 16, device=DEVICE)
    centres = torch.zeros(1, 1, 37, 16, device=DEVICE).half()
    centres[0, 0, 5:20] = 1
    centres[0, 0, 30] = 2
    wanted = torch.full((1, layout.q_blocks), 6, dtype=torch.int32, device=DEVICE)
    chosen, counts = select_rows(
        means, PackedKV(centres), layout=layout, plan=BlockPlan(wanted, 8, False), force_first=1, force_last=1
    )
    assert counts.flatten().tolist() == [6]
    assert chosen[0, 0, 0, :6].tolist() == [0, 5, 6, 7, 30, 36]


def test_sequences_end_to_end_and_padded() -> None:
    """Every sequence gets the lists it gets alone, with counts that were worked out on the device."""
    torch.manual_seed(5)
    lengths, budget = [(65, 530), (1, 64), (140, 300)], fraction(0.5)
    cu = [torch.tensor([0, *x], device=DEVICE, dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)]
    every = packed(*cu, queries=206, keys=894, max_queries=140, max_keys=530, causal=True)
    means, packed_k = means_of_q_and_k(1, 2, 1, every, 16)
    force = {"force_first": 1, "force_last": 1}
    chosen, counts = select_rows(means, packed_k, layout=every, plan=plan(budget, every), **force)
    for b, (queries, keys) in enumerate(lengths):
        alone = dense(1, queries, keys, True, DEV)
        r, n = (
            slice(int(every.spans[b, i]), int(every.spans[b, i]) + size)
            for i, size in ((4, alone.q_blocks), (5, alone.blocks))
        )
        own = PackedKV(packed_k.k_block_mean[:, :, n].contiguous())
        want, size = select_rows(means[:, :, r].contiguous(), own, layout=alone, plan=plan(budget, alone), **force)
        assert torch.equal(counts[:, :, r], size)
        for h in range(2):
            for i in range(alone.q_blocks):
                k = int(size[0, h, i])
                assert torch.equal(chosen[0, h, r][i, :k], want[0, h, i, :k])


@pytest.mark.parametrize(("queries", "window"), [(1, None), (16, 200)])
def test_decode_has_one_list_per_kv_head(queries: int, window: int | None) -> None:
    torch.manual_seed(6)
    layout = padded(queries, 700, True, torch.tensor([700, 129], device=DEVICE))
    q = torch.randn(2, 4, queries, 32, device=DEVICE).half()
    centres = torch.randn(2, 2, layout.blocks, 32, device=DEVICE).half()
    planned = plan(top_k(4), layout, window=window, shared=True)
    chosen, counts = select_shared(
        q, PackedKV(centres), layout=layout, plan=planned, force_first=1, force_last=1, window=window
    )
    for b, keys in enumerate((700, 129)):
        n = -(-keys // BLOCK)
        visible = seen_blocks(queries, keys, True, window).any(0)
        wanted = visible.sum().clamp(max=4)
        logits = q[b].float() @ centres[b, :, :n].float().repeat_interleave(2, 0).mT
        scores = logits.unflatten(0, (2, 2)).flatten(1, 2).amax(1, keepdim=True)
        want = promote(scores, visible.to(DEVICE)[None], wanted[None].to(DEVICE), first=1, last=1)
        for h in range(4):
            base = (keys - queries) // BLOCK
            for r, row in enumerate(
                chosen[b, h]
            ):  # the kernel walks a row from the first block that its window may reach
                start = max(0, (base + r) * BLOCK + 1 - window) // BLOCK if window else 0
                listed = [n for n in want[h // 2, 0].nonzero()[:, 0].tolist() if n >= start]
                assert row[: int(counts[b, h, r])].tolist() == listed


def test_too_many_blocks() -> None:
    layout = dense(1, 64, (MAX_BLOCKS + 1) * BLOCK, True, DEV)
    means, packed_k = torch.zeros(1, 1, 1, 16), PackedKV(torch.zeros(1, 1, 1, 16))
    with pytest.raises(NotImplementedError, match="16384"):
        select_rows(means, packed_k, layout=layout, plan=BlockPlan(torch.zeros(1, 1, dtype=torch.int32), 1, False))
