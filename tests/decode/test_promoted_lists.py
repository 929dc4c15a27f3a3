"""What decode promotes: the lists of the kernels are those of the reference, whatever the number of new tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support.device import DEVICE
from support.steps import cache_tensors, numerics_of, poisoned_step
from thrift_attn import ThriftConfig, floored, fraction, paper, top_k
from thrift_attn.decode.score import score_blocks
from thrift_attn.decode.select import select_blocks
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference import attention as reference
from thrift_attn.reference.budget import blocks_in_decode, decode_budget, promoted_in_decode

KV_HEADS, GROUP, DIM, PAGES = 2, 3, 64, 12


def lists_of_kernels(q, means, table, lengths, config, window, block0_mean):
    """Promoted block numbers of each sequence and KV head, by the kernels that score and choose."""
    numerics = dataclasses.replace(DecodeNumerics.resolve(config), exact_sink=block0_mean is not None)
    budget = decode_budget(config.budget, table.shape[1]).to(DEVICE)
    cache = cache_tensors(means, table, lengths, budget=budget, block0_mean=block0_mean)
    step = poisoned_step(q, cache, numerics, scale=0.125, window=window)
    score_blocks(step)
    select_blocks(step)
    counts = step.block_counts
    lists = [
        [row[0, :n].tolist() for row, n in zip(*pair, strict=True)]
        for pair in zip(step.block_indices, counts[..., 0], strict=True)
    ]
    return lists, counts


def lists_of_reference(q, means, table, lengths, config, window, block0_mean):
    found = []
    for b, tokens in enumerate(lengths.tolist()):
        blocks = -(-tokens // 64)
        empty = torch.zeros(KV_HEADS, 64 * blocks, DIM)
        own = torch.zeros(KV_HEADS, blocks, DIM)
        own[:, : tokens // 64] = means[table[b, : tokens // 64].long()].transpose(0, 1).float()
        others = None if block0_mean is None or tokens < 64 else block0_mean[b].float().cpu()
        planes = reference.Planes(empty, empty, empty, empty, own, block0_mean=others, exact_tail=True)
        mask = reference.Mask(q.shape[2], tokens, True, window)
        promoted = reference.promoted_blocks(q[b].float().cpu(), planes, DecodeNumerics.resolve(config), mask, 0.125)[
            ::GROUP, 0
        ]
        found.append([row.nonzero()[:, 0].tolist() for row in promoted])
    return found


@pytest.mark.parametrize("tq", [1, 2, 4, 16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("budget", "window"),
    [
        (top_k(2), None),
        (fraction(0.3), None),
        (fraction(0.5), 300),
        (paper(), 200),
        (fraction(1), 90),
        (floored(0.05, 3), None),
    ],
    ids=str,
)  # fmt: skip
def test_lists_of_kernels_and_reference_are_equal(tq, seed, budget, window):
    gen = torch.Generator().manual_seed(100 * seed + tq)
    lengths = torch.tensor([773, 448, 64 + tq, 63][: 2 + seed], dtype=torch.int32)
    q = torch.randn(len(lengths), KV_HEADS * GROUP, tq, DIM, generator=gen).half()
    means = torch.randn(4 * PAGES, KV_HEADS, DIM, generator=gen).half()
    table = torch.randperm(4 * PAGES, generator=gen).int().view(4, PAGES)[: len(lengths)]
    block0_mean = torch.randn(len(lengths), KV_HEADS, DIM, generator=gen).half() if seed % 2 else None
    config = ThriftConfig.for_cache(budget=budget, force_first=seed // 2, force_last=seed % 3)
    device = [x if x is None else x.to(DEVICE) for x in (q, means, table, lengths)]
    got, counts = lists_of_kernels(*device, config, window, None if block0_mean is None else block0_mean.to(DEVICE))
    assert got == lists_of_reference(q, means, table, lengths, config, window, block0_mean)
    for b, tokens in enumerate(lengths.tolist()):
        seen = len(blocks_in_decode(tokens, new_tokens=tq, window=window))
        promoted = promoted_in_decode(budget, tokens, new_tokens=tq, window=window)
        assert counts[b].tolist() == [[promoted, seen]] * KV_HEADS
    assert promoted_in_decode(budget, 773, new_tokens=tq, window=window) > 0  # something was chosen


def test_the_largest_score_of_any_new_token_decides():
    """Four new tokens that cancel in the mean: each looks at a block of its own, the last of them twice as hard."""
    means = torch.zeros(8, 1, DIM).half()
    q = torch.zeros(1, 1, 4, DIM).half()
    for i in range(4):
        q[0, 0, i, 0] = (-1) ** i * (1 + i)
        means[2 * i, 0, 0] = (-1) ** i
    table, lengths = (
        torch.arange(8, dtype=torch.int32)[None].to(DEVICE),
        torch.tensor([8 * 64 + 5], dtype=torch.int32, device=DEVICE),
    )
    step = poisoned_step(q.to(DEVICE), cache_tensors(means.to(DEVICE), table, lengths), numerics_of(sink_token="none"))
    score_blocks(step)
    want = torch.tensor([3.0, 0, 4, 0, 3, 0, 4, 0]) * 1.4426950408889634
    torch.testing.assert_close(step.scores[0, 0].cpu(), want)
