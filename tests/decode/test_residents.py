"""Decode where not all blocks keep the plane of promoted ones: kernels against float64 and against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support.device import DEVICE
from support.paged import expected, keep_some, make_cache, run
from support.steps import cache_tensors, numerics_of, poisoned_step, residents_of
from thrift_attn.config import fraction
from thrift_attn.decode import select as select_module
from thrift_attn.decode.append import write_tail
from thrift_attn.decode.gather import gather_pages
from thrift_attn.decode.pack import pack_blocks
from thrift_attn.decode.score import score_blocks
from thrift_attn.decode.select import select_blocks
from thrift_attn.reference import attention as reference
from thrift_attn.reference.budget import decode_budget
from thrift_attn.reference.pages import Pool, read_blocks
from thrift_attn.reference.residents import fade, group_scores, keep, own_quota, step_mass


@pytest.mark.parametrize("tq", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("plane", ["nested", "nested8", "16bit"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_step_reads_residuals_where_they_lie(plane: str, share: float, tq: int) -> None:
    cache = keep_some(make_cache([64 * 6 + 9, 64 * 3, 70, 0], 2, 64, plane=plane), share)
    torch.manual_seed(1)
    q = (torch.randn(4, 8, tq, 64) * 2).half().to(DEVICE)
    capacity = cache.page_table.shape[1]
    budget = torch.tensor([n // 2 for n in range(capacity + 1)], dtype=torch.int32, device=DEVICE)
    out, lse, blocks, counts, _, _ = run(cache, q, budget, splits=2)
    want, want_lse = expected(cache, q, blocks, counts)
    seen = want_lse.isfinite()
    assert not out.isnan().any()
    assert (out.cpu().double() - want)[seen].norm() < 1e-3 * want[seen].norm()
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=0, atol=3e-3)
    assert (counts[0, :, 0] > 0).any() == (share > 0)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_only_residents_are_promoted(seed: int, window: int | None, many: bool, monkeypatch) -> None:
    """The lists of the kernels are those of the reference, and name the slot of every promoted block."""
    if many:
        monkeypatch.setattr(select_module, "HELD_BLOCKS", 0)
        monkeypatch.setattr(select_module, "CHUNK", 8)
    gen = torch.Generator().manual_seed(seed)
    heads, dim, pages = 2, 64, 12
    lengths = torch.tensor([773, 448, 70], dtype=torch.int32)
    q = torch.randn(3, 2 * heads, 1 + seed, dim, generator=gen).half()
    means = torch.randn(3 * pages, heads, dim, generator=gen).half()
    table = torch.randperm(3 * pages, generator=gen).int().view(3, pages)
    slot_of_page = torch.randint(-1, 2, (3 * pages, heads), generator=gen).int()
    slot_of_page = torch.where(slot_of_page < 0, -1, torch.randperm(3 * pages, generator=gen)[:, None]).int()
    numerics = numerics_of(budget=fraction(0.4), sink_token="none", force_first=seed % 2, force_last=1)
    cache = cache_tensors(
        means.to(DEVICE), table.to(DEVICE), lengths.to(DEVICE), budget=decode_budget(numerics.budget, pages).to(DEVICE),
        residents=residents_of(slot_of_page.to(DEVICE), 3, pages),
    )  # fmt: skip
    step = poisoned_step(q.to(DEVICE), cache, numerics, scale=0.125, window=window)
    score_blocks(step)
    select_blocks(step)
    for b, tokens in enumerate(lengths.tolist()):
        whole, blocks = tokens // 64, -(-tokens // 64)
        own = table[b, :whole].long()
        resident = torch.zeros(heads, blocks, dtype=torch.bool)
        resident[:, :whole] = slot_of_page[own].T >= 0
        empty, centres = torch.zeros(heads, 64 * blocks, dim), torch.zeros(heads, blocks, dim)
        centres[:, :whole] = means[own].transpose(0, 1).float()
        planes = reference.Planes(empty, empty, empty, empty, centres, exact_tail=True, resident=resident)
        mask = reference.Mask(q.shape[2], tokens, True, window)
        want = reference.promoted_blocks(q[b].float(), planes, numerics, mask, 0.125)[::2, 0]
        for h in range(heads):
            count = int(step.block_counts[b, h, 0])
            listed = step.block_indices[b, h].cpu()
            assert listed[0, :count].tolist() == want[h].nonzero()[:, 0].tolist()
            assert listed[2, :count].tolist() == slot_of_page[table[b, listed[0, :count].long()].long(), h].tolist()


@pytest.mark.parametrize("tq", [1, 4])
def test_a_step_adds_to_the_past_mass_of_its_own_blocks(tq: int) -> None:
    """By its first query, which is never a draft; of blocks that are shared it moves nothing."""
    cache = keep_some(make_cache([64 * 70 + 9, 64 * 3, 70, 7], 2, 64), 0.5)
    residents = cache.residents
    gen = torch.Generator().manual_seed(5)
    residents.past_mass.copy_(torch.rand(residents.past_mass.shape, generator=gen))
    residents.bounds[:, 2] = torch.tensor([5, 0, 1, 0])
    before = residents.past_mass.clone().cpu()
    q = (torch.randn(4, 8, tq, 64, generator=gen) * 2).half().to(DEVICE)
    budget = torch.ones(cache.page_table.shape[1] + 1, dtype=torch.int32, device=DEVICE)
    run(cache, q, budget, splits=2)
    want = before.clone()
    for b, (tokens, shared) in enumerate(zip(cache.lengths.tolist(), residents.bounds[:, 2].tolist(), strict=True)):
        pages = cache.page_table[b, : tokens // 64].long().cpu()
        means = cache.centres[pages.to(DEVICE)].transpose(0, 1).cpu()
        if not len(pages):
            continue
        mass = before[pages].T * fade(1) + step_mass(group_scores(q[b, :, :1].cpu(), means, 64**-0.5)[:, 0])
        want[pages[shared:]] = mass.T[shared:]
    torch.testing.assert_close(residents.past_mass.cpu(), want, rtol=2e-3, atol=1e-5)
    assert (residents.past_mass.cpu() != before).any()


def _filled(blocks: int, shared: int, quota: int, gen: torch.Generator, *, shared_slots: int, heads: int):
    """A sequence of so many blocks whose heads have other residents each: tables on the CPU, and bool [heads, blocks]."""
    pages = torch.randperm(blocks + 4, generator=gen)[: blocks + 1]  # the last one is for the new block
    room = own_quota(quota, shared_slots, blocks + 1 - shared)
    own_slots, count = room, shared_slots + room + 3
    slots = torch.randperm(count, generator=gen)[: shared_slots + own_slots]
    slot_of_page = torch.full((blocks + 4, heads), -1, dtype=torch.int32)
    block_of_slot = torch.randint(-1, blocks, (count, heads), generator=gen).int()  # what others have left
    held = torch.zeros(heads, blocks + 1, dtype=torch.bool)
    for h in range(heads):
        for part, begin, size in ((range(shared), 0, shared_slots), (range(shared, blocks), shared_slots, own_slots)):
            order = torch.randperm(len(part), generator=gen)[:size].tolist()
            newest = [at for at in range(len(part)) if part[at] >= blocks - 2]
            chosen = ([*newest, *(at for at in order if at not in newest)] if part.stop == blocks else order)[:size]
            free = torch.randperm(size, generator=gen).tolist()
            for at, place in zip(chosen, free, strict=False):
                slot = int(slots[begin + place])
                slot_of_page[pages[part[at]], h], block_of_slot[slot, h] = slot, part[at]
                held[h, part[at]] = True
    return pages, slots, slot_of_page, block_of_slot, held, room


@pytest.mark.parametrize(
    ("blocks", "shared", "quota", "shared_slots"),
    [(0, 0, 1, 0), (5, 0, 6, 0), (40, 0, 32, 0), (40, 10, 12, 5), (40, 40, 32, 20), (7, 5, 8, 5), (50, 0, 0, 0)],
)
def test_a_new_block_takes_the_slot_of_the_least_favoured(blocks, shared, quota, shared_slots) -> None:
    heads, dim = 3, 16
    gen = torch.Generator().manual_seed(blocks + quota)
    pages, slots, slot_of_page, block_of_slot, held, room = _filled(
        blocks, shared, quota, gen, shared_slots=shared_slots, heads=heads
    )
    mass = torch.rand(blocks + 4, heads, generator=gen)
    mass[pages[blocks]] = 9.0  # of whoever had the page before
    want_mass = mass[pages].T.clone()
    want_mass[:, blocks] = 0
    want = keep(want_mass, held, new=1, shared=shared, quota=room)
    table = torch.full((1, blocks + 2), 2**30, dtype=torch.int32)
    table[0, : blocks + 1] = pages.int()
    residents = dataclasses.replace(
        residents_of(slot_of_page.to(DEVICE), 1, blocks + 2),
        block_of_slot=block_of_slot.to(DEVICE),
        past_mass=mass.to(DEVICE),
        slots=slots[None].int().contiguous().to(DEVICE),
        bounds=torch.tensor([[shared_slots, len(slots), shared]], dtype=torch.int32, device=DEVICE),
        quota=torch.full((blocks + 3,), quota, dtype=torch.int32, device=DEVICE),
    )
    cache = cache_tensors(
        torch.zeros(blocks + 4, heads, dim, dtype=torch.float16, device=DEVICE),
        table.to(DEVICE),
        torch.tensor([64 * blocks + 63], dtype=torch.int32, device=DEVICE),
        residents=residents,
    )
    k = torch.randn(1, heads, 1, dim).half().to(DEVICE)
    pages_of_new, numbers = torch.full((2, 1), -7, dtype=torch.int32, device=DEVICE)
    taken = torch.full((1, heads), -7, dtype=torch.int32, device=DEVICE)
    write_tail(k, k, cache=cache, pages=pages_of_new, numbers=numbers, slots=taken)
    after = residents.slot_of_page[pages.to(DEVICE)].T.cpu()  # [heads, blocks + 1]
    assert torch.equal(after >= 0, want)
    assert torch.equal(taken[0].cpu(), after[:, blocks])
    kept = want[:, :blocks]
    assert torch.equal(after[:, :blocks][kept], slot_of_page[pages[:blocks]].T[kept])  # nobody moves
    for h in range(heads):
        used = after[h][after[h] >= 0]
        assert len(used.unique()) == len(used)
        assert set(used.tolist()) <= set(slots.tolist())
        assert residents.block_of_slot[used.long(), h].tolist() == want[h].nonzero()[:, 0].tolist()
    assert (residents.past_mass[pages[blocks]] == 0).all()


@pytest.mark.parametrize("plane", ["nested", "nested8", "16bit"])
def test_pages_are_packed_and_read_without_some_residuals(plane: str) -> None:
    heads, dim, blocks = 2, 32, 4
    gen = torch.Generator().manual_seed(3)
    k, v = (torch.randn(blocks, heads, 64, dim, generator=gen).half().to(DEVICE) for _ in "kv")
    numerics = numerics_of(plane, sink_token="none")
    pool = Pool.empty(blocks, heads, dim, plane, torch.float16, torch.device(DEVICE), slots=3)
    slot_of_page = torch.tensor([[2, -1], [-1, 0], [0, 2], [-1, -1]], dtype=torch.int32, device=DEVICE)
    pages = torch.arange(blocks, dtype=torch.int32, device=DEVICE)
    cache = cache_tensors(
        pool.k_block_mean, pages[None], torch.tensor([64 * blocks], dtype=torch.int32, device=DEVICE), base=pool.base,
        high=pool.high, residents=residents_of(slot_of_page, 1, blocks),
    )  # fmt: skip
    pack_blocks(k, v, pages, cache=cache, numerics=numerics, slots=slot_of_page)
    assert (pool.high[1] == 0).all()  # nobody's slot
    out = torch.full((2, 1, heads, 64 * blocks, dim), torch.nan, dtype=torch.float16, device=DEVICE)
    gather_pages(out[0], out[1], cache=cache, numerics=numerics, tokens=64 * blocks)
    read = read_blocks(pool, pages.long(), numerics=numerics, slots=slot_of_page.long())
    for got, want, given in ((out[0], read.high_k, k), (out[1], read.high_v, v)):
        got = got[0].unflatten(1, (blocks, 64)).transpose(0, 1)
        torch.testing.assert_close(got.float(), want.half().float(), rtol=0, atol=2e-3)
        error = (got.float() - given.float()).norm(dim=(2, 3)) / given.float().norm(dim=(2, 3))  # [blocks, heads]
        there = slot_of_page >= 0
        assert error[there].max() < 0.03 < error[~there].min()


def test_the_merge_is_the_same_beside_the_mass() -> None:
    """The programs that add mass leave the output alone."""
    cache = make_cache([64 * 6 + 9], 2, 64)
    pooled = keep_some(cache, 1.0)
    q = torch.randn(1, 8, 1, 64, generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    budget = torch.full((cache.page_table.shape[1] + 1,), 2, dtype=torch.int32, device=DEVICE)
    out, lse = run(cache, q, budget)[:2]
    same, same_lse = run(pooled, q, budget)[:2]
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)
