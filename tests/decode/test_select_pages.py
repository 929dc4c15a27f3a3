"""Block scores and the choice of blocks against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from support.device import DEVICE
from support.steps import cache_tensors, choose, numerics_of, poisoned_step
from thrift_attn.decode import select
from thrift_attn.decode.score import score_blocks
from thrift_attn.decode.select import _search_asm
from thrift_attn.reference.budget import promote


@pytest.mark.parametrize(("dim", "tq"), [(64, 1), (80, 3)])
def test_scores(dim: int, tq: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, tq, dim, device=DEVICE).half()
    centres = torch.randn(9, 2, dim, device=DEVICE).half()
    table = torch.randperm(9, device=DEVICE).int()[:8].view(2, 4)
    lengths = torch.tensor([64 * 4 + 3, 64 * 2 + 63], dtype=torch.int32, device=DEVICE)
    cache = cache_tensors(centres, table, lengths)
    step = poisoned_step(q, cache, numerics_of(sink_token="none"), scale=0.2)
    score_blocks(step)
    bias, scores = step.bias, step.scores
    grouped = q.view(2, 2, 3, tq, dim).transpose(2, 3).flatten(2, 3).float()  # rows (query, group head)
    want = torch.einsum("bhrd,bnhd->bhnr", grouped, centres[table].float()) * 0.2
    for b, full in enumerate((4, 2)):
        got = bias[b, :, :full, : 3 * tq] / 1.4426950408889634
        torch.testing.assert_close(got, want[b, :, :full], rtol=1e-4, atol=1e-4)
        assert torch.equal(scores[b, :, :full], bias[b, :, :full, : 3 * tq].amax(-1))
        assert scores[b, :, full:].isnan().all()


@pytest.mark.parametrize("blocks", [1, 5, 37, 300])
@pytest.mark.parametrize("tail", [0, 7])
@pytest.mark.parametrize(("first", "last"), [(1, 1), (0, 0), (2, 3)])
def test_choice_equals_the_reference(blocks: int, tail: int, first: int, last: int) -> None:
    torch.manual_seed(blocks)
    capacity = blocks + 2
    scores = torch.randn(1, 3, capacity, device=DEVICE).mul(3).round()  # many ties
    scores[0, 1] = 0.5
    scores[0, 2, ::2] = -torch.inf
    table = torch.randperm(capacity, device=DEVICE).int()[None]
    lengths = torch.tensor([blocks * 64 + tail], dtype=torch.int32, device=DEVICE)
    forced = max(0, last - (tail > 0))  # of complete blocks: the incomplete one is the newest
    for k in {0, 1, 3, blocks // 2, blocks}:
        budget = torch.full((capacity + 1,), -99, dtype=torch.int32, device=DEVICE)
        budget[blocks] = k
        step = choose(scores, table, lengths, budget, first=first, last=last)
        out, counts = step.block_indices, step.block_counts
        visible = torch.ones(1, blocks, dtype=torch.bool, device=DEVICE)
        asked = torch.tensor([k], device=DEVICE)
        want = promote(scores[0, :, None, :blocks], visible, asked, first=first, last=forced)[:, 0]
        for h in range(3):
            n, listed = counts[0, h].tolist()
            assert listed == blocks
            assert n == int(want[h].sum()), (k, h)
            row = out[0, h, 0, :blocks].long()
            assert row[:n].tolist() == want[h].nonzero()[:, 0].tolist()
            assert row[n:].tolist() == (~want[h]).nonzero()[:, 0].tolist()
            assert torch.equal(out[0, h, 1, :blocks], table[0, row])
            assert (out[0, h, :, blocks:] == -5).all()


@pytest.mark.parametrize("window", [None, 1000])
def test_long_tables_are_chosen_from_in_chunks(monkeypatch, window) -> None:
    """The same lists as from registers, with ties, forced blocks and a window, whatever the budget."""
    torch.manual_seed(1)
    blocks, capacity = 45, 50
    scores = torch.randn(1, 3, capacity, device=DEVICE).mul(3).round()
    scores[0, 1] = 0.5
    table = torch.randperm(capacity, device=DEVICE).int()[None]
    lengths = torch.tensor([blocks * 64 + 7], dtype=torch.int32, device=DEVICE)
    for k in (0, 1, 4, 20, 45):
        budget = torch.full((capacity + 1,), k, dtype=torch.int32, device=DEVICE)
        held = choose(scores, table, lengths, budget, tq=2, first=1, last=3, window=window)
        with monkeypatch.context() as patch:
            patch.setattr(select, "HELD_BLOCKS", 16)
            patch.setattr(select, "CHUNK", 16)
            read = choose(scores, table, lengths, budget, tq=2, first=1, last=3, window=window)
        assert torch.equal(held.block_counts, read.block_counts)
        assert torch.equal(held.block_indices, read.block_indices)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [70, 1000, 3000, 16384, 20000, 65536])
def test_choice_among_many(blocks: int) -> None:
    """As many keys per thread as occur, with ties at the threshold and without."""
    torch.manual_seed(blocks)
    scores = torch.randn(1, 2, blocks, device=DEVICE)
    scores[0, 1] = scores[0, 1].mul(4).round()
    table = torch.randperm(blocks, device=DEVICE).int()[None]
    lengths = torch.tensor([blocks * 64], dtype=torch.int32, device=DEVICE)
    visible = torch.ones(1, blocks, dtype=torch.bool, device=DEVICE)
    for k in (1, 2, blocks // 20, blocks - 1):
        budget = torch.full((blocks + 1,), k, dtype=torch.int32, device=DEVICE)
        step = choose(scores, table, lengths, budget, first=1)
        out, counts = step.block_indices, step.block_counts
        want = promote(scores[0][:, None], visible, torch.tensor([k], device=DEVICE), first=1, last=1)[:, 0]
        for h in range(2):
            assert counts[0, h].tolist() == [k, blocks]
            assert torch.equal(out[0, h, 0, :k].long(), want[h].nonzero()[:, 0])
            assert torch.equal(out[0, h, 0, k:].long(), (~want[h]).nonzero()[:, 0])
            assert torch.equal(out[0, h, 1], table[0, out[0, h, 0].long()])


def run_search(keys: torch.Tensor, wanted: int) -> torch.Tensor:
    """What the threads of a program get from `_search_asm`, statement by statement: keys ``[threads, keys per thread]``."""
    threads, each = keys.shape
    held = {f"${each + i}": keys[:, i].tolist() for i in range(each)} | {f"${2 * each}": [wanted] * threads}

    def value(name: str, thread: int) -> int:
        return held[name][thread] if name in held else (int(name, 0) ^ 0x80000000) - 0x80000000

    def signed(x: int) -> int:
        return (x + 0x80000000) % 2**32 - 0x80000000

    compute = {
        "mov.b32": lambda a: a, "xor.b32": lambda a, b: a ^ b, "and.b32": lambda a, b: a & b, "add.s32": lambda a, b: a + b,
        "shl.b32": lambda a, b: a << b, "shr.u32": lambda a, b: (a % 2**32) >> b, "setp.ge.s32": lambda a, b: int(a >= b),
        "setp.ne.b32": lambda a, b: int(a != b), "setp.ne.s32": lambda a, b: int(a != b),
        "setp.ne.and.b32": lambda a, b, c: int(a != b and c),
    }  # fmt: skip
    text = _search_asm(each).strip("{}\n ").replace("next:", "next: ;")
    lines = [x.strip() for x in text.split(";") if x.strip() and not x.strip().startswith(".reg")]
    at = 0
    while at < len(lines):
        words = lines[at].replace(",", "").split()
        at += 1
        active = range(threads)
        if words[0] == "@p":
            active = [t for t in active if held["p"][t]]
            words = words[1:]
        if words[0] == "bra.uni":
            assert len(active) in (0, threads)  # a barrier of all threads lies ahead
            at = lines.index("next:") if active else at
        elif words[0] == "bar.red.popc.u32":
            assert len(active) == threads
            held[words[1]] = [sum(map(bool, held[words[3]]))] * threads
        elif words[0] != "next:":
            old = held.get(words[1], [0] * threads)
            new = {t: signed(compute[words[0]](*(value(x, t) for x in words[2:]))) for t in active}
            held[words[1]] = [new.get(t, old[t]) for t in range(threads)]
    return torch.tensor([held[f"${i}"] for i in range(each)])


@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_the_assembly_finds_thresholds(each: int) -> None:
    """The interpreter does not run it, so its statements are followed here."""
    torch.manual_seed(each)
    keys = torch.randint(-(2**31), 2**31, (8, each))
    keys[::3] = keys[0, 0]  # ties
    keys[1, 0], keys[2, 0] = -0x7FFFFFFF, 0x7FC00000
    for wanted in (1, 2, 4 * each, 8 * each - 1, 8 * each):
        found = run_search(keys, wanted).unique()
        assert found.numel() == 1
        reach = int((keys >= found).sum())
        assert reach == wanted or (reach > wanted > int((keys > found).sum()))


def test_window_lists_only_what_is_seen() -> None:
    scores = torch.randn(1, 1, 10, device=DEVICE)
    table = torch.arange(10, dtype=torch.int32, device=DEVICE)[None]
    lengths = torch.tensor([64 * 8 + 10], dtype=torch.int32, device=DEVICE)
    budget = torch.arange(11, dtype=torch.int32, device=DEVICE).clamp(max=2)
    step = choose(scores, table, lengths, budget, window=200)
    out, counts = step.block_indices, step.block_counts
    # the query at 521 sees 322..521: blocks 5, 6, 7 and the incomplete one
    assert counts.flatten().tolist() == [2, 3]
    assert sorted(out[0, 0, 0, :3].tolist()) == [5, 6, 7]
