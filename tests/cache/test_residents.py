"""A cache that keeps the plane of promoted blocks for some, in plain PyTorch: which blocks, where, and what is read."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from support.caches import HIGH, make, tokens
from thrift_attn import ThriftConfig
from thrift_attn.cache import state
from thrift_attn.reference import residents as rule
from thrift_attn.reference.residents import NEWEST, quota_table, slots_of_pool

HEADS = 2


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> int:
    """A floor of 4 blocks, so that a few hundred tokens reach evictions."""
    monkeypatch.setattr("thrift_attn.reference.residents.FLOOR", 4)
    return 4


def config(share: float, storage: str = "nested", budget: Any = "top_k(2)", **options: Any) -> ThriftConfig:
    return ThriftConfig.for_cache(residual_share=share, promoted_storage=storage, budget=budget, **options)


def cache_of(share: float, *, batch: int = 1, pages: int = 48, storage: str = "nested", **options: Any):
    return make(batch, pages, dim=32, heads=HEADS, config=config(share, storage, **options))


def drawn(count: int, *, batch: int = 1, seed: int = 0):
    return tokens(count, batch=batch, heads=HEADS, dim=32, seed=seed)


def queries(count: int = 1, *, batch: int = 1, seed: int = 9) -> torch.Tensor:
    return torch.randn(batch, 2 * HEADS, count, 32, generator=torch.Generator().manual_seed(seed))


def resident(cache: Any, seq: int = 0) -> torch.Tensor:
    """Which blocks of a sequence are residents, bool ``[Hkv, n]``."""
    return cache.residual_slots.of_pages(cache.table.pages(seq)).T >= 0


def counts(cache: Any, seq: int = 0) -> list[int]:
    return resident(cache, seq).sum(1).tolist()


def quota(cache: Any, blocks: int) -> int:
    return int(cache.residual_slots.tensors.quota[blocks])


def planes(cache: Any, seq: int = 0):
    """The plane of promoted blocks ``[n, Hkv, ...]`` and where it is kept."""
    pages = cache.table.pages(seq)
    if cache.residual_slots is None:
        return cache.pool.high[pages], None
    slots = cache.residual_slots.of_pages(pages)
    return cache.pool.high[slots.clamp(min=0), torch.arange(HEADS)], slots >= 0


def check_planes(cache: Any, whole: Any, seq: int = 0, at: int = 0) -> None:
    """Residents have bit for bit the plane that a cache of share 1 has, and what is read is that or the base."""
    (high, there), (want, _) = planes(cache, seq), planes(whole, at)
    assert torch.equal(high[there], want[there])
    read = cache.read(seq)[0].unflatten(1, (-1, 64)) if cache.tokens(seq) % 64 == 0 else None
    if read is not None:
        due = whole.read(at)[0].unflatten(1, (-1, 64))
        assert torch.equal(read[there.T], due[there.T])
        assert not any(torch.equal(read[h, b], due[h, b]) for h, b in (~there.T).nonzero().tolist())


def check_books(*caches: Any) -> None:
    """Slots of caches over one pool are used or free, and no two blocks of a head lie in one."""
    slots = caches[0].residual_slots
    used = {slot for cache in caches for held in cache.residual_slots._owned for slot in held}
    assert len(used) + slots.free_slots == len(slots.tensors.block_of_slot)
    assert not used & set(slots._free)
    where: dict[tuple[int, int], int] = {}
    for cache in caches:
        for seq in range(cache.batch):
            pages = cache.table.pages(seq)
            lies = slots.of_pages(pages)
            for block, head in (lies >= 0).nonzero().tolist():
                slot = int(lies[block, head])
                assert slot in cache.residual_slots._owned[seq]
                assert where.setdefault((slot, head), int(pages[block])) == int(pages[block])
                assert slots.tensors.block_of_slot[slot, head] == block


def contents(cache: Any, seq: int = 0) -> list[torch.Tensor]:
    high, there = planes(cache, seq)
    high = high if there is None else high * there[..., None]
    return [*cache.read(seq), high, resident(cache, seq)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


# -- share 1, or as good as -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", HIGH)
def test_a_floor_that_covers_all_equals_share_1(storage: str) -> None:
    """Through every change of a sequence."""
    few, whole = (cache_of(share, batch=3, storage=storage) for share in (0.1, 1.0))
    assert few.residual_slots is not None
    assert whole.residual_slots is None

    def both(change: Any) -> None:
        for cache in (few, whole):
            change(cache)
        q = queries(2, batch=few.batch)
        assert torch.equal(few.attend(q), whole.attend(q))
        for seq in range(few.batch):
            assert torch.equal(planes(few, seq)[0], planes(whole, seq)[0])
            assert same(list(few.read(seq)), list(whole.read(seq)))
            assert few.promoted(seq) == whole.promoted(seq)
        assert few.resident_share() == 1

    k, v = drawn(500, batch=3)
    both(lambda cache: cache.append(k, v, lengths=[500, 70, 300], queries=queries(500, batch=3)))
    both(lambda cache: cache.append(k[:, :, :64], v[:, :, :64]))
    for step in range(3):
        both(lambda cache, step=step: cache.append(k[:, :, step : step + 1], v[:, :, step : step + 1]))
    both(lambda cache: cache.fork(0, 1))
    both(lambda cache: cache.append(k[:, :, :130], v[:, :, :130]))
    both(lambda cache: cache.truncate(0, 200))
    both(lambda cache: cache.append(k[:, :, :200], v[:, :, :200]))
    both(lambda cache: cache.select([1, 0, 1]))
    both(lambda cache: cache.append(k[:, :, :70], v[:, :, :70]))
    branches = [cache.branch() for cache in (few, whole)]
    both(lambda cache: cache.append(k[:, :, :70], v[:, :, :70]))
    few, whole = branches
    both(lambda cache: cache.append(k[:, :, 70:270], v[:, :, 70:270]))
    loaded = [cache_of(share, batch=3, storage=storage, pages=64) for share in (0.1, 1.0)]
    for cache, other in zip(loaded, branches, strict=True):
        state.load_state_dict(cache, state.state_dict(other))
    few, whole = loaded
    both(lambda cache: cache.append(k[:, :, :70], v[:, :, :70]))


def test_share_0_keeps_nothing() -> None:
    cache, base = cache_of(0.0, budget=0.5), cache_of(1.0, budget=0.0)
    for each in (cache, base):
        each.append(*drawn(700), queries=queries(700))
    assert cache.promoted(0) == 0
    assert cache.resident_share() == 0
    assert counts(cache) == [0, 0]
    assert torch.equal(cache.attend(queries()), base.attend(queries()))
    cache.truncate(0, 300)
    cache.append(*drawn(300, seed=1))
    assert counts(cache) == [0, 0]
    check_books(cache)


# -- which blocks are residents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", HIGH)
def test_residents_have_the_plane_of_share_1_whatever_was_evicted(floor: int, storage: str) -> None:
    few, whole = cache_of(0.3, storage=storage), cache_of(1.0, storage=storage)
    evicted = 0
    for step, count in enumerate([64, 640, 64, 64, 128, 64, 320]):
        k, v = drawn(count, seed=step)
        before = resident(few)
        few.append(k, v, queries=queries(count, seed=step) if step % 2 else None)
        whole.append(k, v)
        evicted += int((before & ~resident(few)[:, : before.shape[1]]).sum())
        few.attend(queries(seed=step))
        check_planes(few, whole)
        check_books(few)
        assert counts(few) == [quota(few, few.tokens(0) // 64)] * HEADS
        assert resident(few)[:, -NEWEST:].all()
    assert evicted > 10


def test_steps_and_one_append_give_the_same_count(floor: int) -> None:
    k, v = drawn(64 * 14)
    q = queries(64 * 14)
    whole, blocks, steps = (cache_of(0.3) for _ in range(3))
    whole.append(k, v, queries=q)
    for at in range(0, k.shape[2], 64):
        blocks.append(*(x[:, :, at : at + 64] for x in (k, v)), queries=q[:, :, at : at + 64])
    for at in range(0, k.shape[2], 16):  # as steps of decode bring them
        steps.append(*(x[:, :, at : at + 16] for x in (k, v)))
        steps.attend(q[:, :, at : at + 16])
        done = steps.tokens(0) // 64
        assert counts(steps) == [quota(steps, done)] * HEADS
    assert counts(whole) == counts(blocks) == counts(steps) == [5, 5]  # 30% of 14


def test_without_queries_the_newest_stay(floor: int) -> None:
    cache = cache_of(0.3)
    cache.append(*drawn(64 * 20))
    assert resident(cache)[:, -6:].all()
    assert counts(cache) == [6, 6]


@pytest.mark.parametrize("how", ["prompt", "chunks", "small chunks", "steps"])
def test_what_queries_look_at_stays(floor: int, how: str) -> None:
    """A needle in block 3, for one KV head alone, survives 20 newer blocks; without queries it does not."""
    k, v = drawn(64 * 24)
    q = queries(64 * 24)
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    k[0, 1, 3 * 64 : 4 * 64] += 12 * direction
    q[0, 2:, :] += 6 * direction
    cache, blind = cache_of(0.2), cache_of(0.2)
    blind.append(k, v)
    size = {"prompt": 64 * 24, "chunks": 128, "small chunks": 32, "steps": 16}[how]
    for at in range(0, k.shape[2], size):
        part = [x[:, :, at : at + size] for x in (k, v)]
        cache.append(*part, queries=None if how == "steps" else q[:, :, at : at + size])
        if how == "steps":
            cache.attend(q[:, :, at : at + size])
    assert resident(cache)[1, 3]
    assert not resident(blind)[:, 3].any()
    assert counts(cache) == counts(blind) == [5, 5]
    assert resident(cache)[:, -NEWEST:].all()


def test_a_sequence_in_a_batch_equals_it_alone(floor: int) -> None:
    lengths = [900, 70, 1300]
    k, v = drawn(1300, batch=3)
    q = queries(1300, batch=3)
    together, alone = cache_of(0.25, batch=3), [cache_of(0.25) for _ in lengths]
    together.append(k, v, lengths=lengths, queries=q)
    for seq, count in enumerate(lengths):
        alone[seq].append(*(x[seq : seq + 1, :, :count] for x in (k, v)), queries=q[seq : seq + 1, :, :count])
    for step in range(9):  # more than a block
        k, v = drawn(8, batch=3, seed=step)
        q = queries(8, batch=3, seed=step)
        together.append(k, v)
        out, lse = together.attend(q, return_lse=True)
        for seq, cache in enumerate(alone):
            cache.append(k[seq : seq + 1], v[seq : seq + 1])
            got = cache.attend(q[seq : seq + 1], return_lse=True)
            assert torch.equal(got[0][0], out[seq])
            assert torch.equal(got[1][0], lse[seq])
    for seq, cache in enumerate(alone):
        assert same(contents(cache), contents(together, seq))
    together.truncate(0, 500)
    together.free(1)
    together.append(*drawn(300, batch=3, seed=5), lengths=[300, 300, 0])
    assert same(contents(alone[2]), contents(together, 2))


# -- changes of sequences ---------------------------------------------------------------------------------------------


def test_truncation_keeps_the_quota_and_the_planes(floor: int) -> None:
    few, whole = cache_of(0.3), cache_of(1.0)
    k, v = drawn(64 * 30)
    for cache in (few, whole):
        cache.append(k, v, **({"queries": queries(64 * 30)} if cache is few else {}))
    assert counts(few) == [9, 9]
    before = resident(few)
    for blocks in (28, 20, 12, 6, 4):
        for cache in (few, whole):
            cache.truncate(0, blocks * 64)
        assert all(count <= quota(few, blocks) for count in counts(few))
        assert (before[:, :blocks] | ~resident(few)).all()  # nothing comes back from nowhere
        check_planes(few, whole)
        check_books(few)
    for seed in range(4):
        for cache in (few, whole):
            cache.append(*drawn(64 * 3, seed=seed))
        assert resident(few)[:, -NEWEST:].all()
        check_planes(few, whole)
    few.truncate(0, 0)
    assert few.residual_slots.free_slots == len(few.pool.high)
    check_books(few)


def test_cut_into_a_block_that_is_no_resident_reads_the_base(floor: int) -> None:
    cache = cache_of(0.2)
    cache.append(*drawn(64 * 12))
    assert not resident(cache)[:, 2].any()
    want = [x[:, : 2 * 64 + 30] for x in cache.read(0)]
    cache.truncate(0, 2 * 64 + 30)
    assert all(map(torch.equal, cache.read(0), want))


def test_forks_grow_apart(floor: int) -> None:
    """Each like a copy of its own; what they share stays when one of them goes."""
    cache, whole = (cache_of(share, batch=3, pages=64) for share in (0.3, 1.0))
    start, parts = drawn(64 * 12, batch=3), [drawn(64 * 9, batch=3, seed=seed) for seed in (1, 2)]

    def each(change: Any) -> None:
        for one in (cache, whole):
            change(one)
        for seq in range(3):
            check_planes(cache, whole, seq, seq)
            assert all(count <= cache.residual_slots.most(seq, cache.tokens(seq) // 64) for count in counts(cache, seq))
        check_books(cache)

    each(lambda one: one.append(*start, lengths=[64 * 12, 0, 0]))
    each(lambda one: one.fork(0, 1))
    shared = resident(cache)
    each(lambda one: one.append(*parts[0], lengths=[64 * 9, 64 * 9, 0]))
    assert torch.equal(resident(cache, 0)[:, :12], shared)
    assert torch.equal(resident(cache, 1)[:, :12], shared)
    assert all(resident(cache, seq)[:, -NEWEST:].all() for seq in range(2))
    each(lambda one: one.fork(1, 2))
    each(lambda one: one.free(1))
    each(lambda one: one.append(*parts[1], lengths=[64 * 5, 64 * 9, 64 * 5]))
    each(lambda one: one.free(0))
    each(lambda one: one.append(*parts[1], lengths=[64 * 5, 0, 64 * 9]))
    for seq in range(3):
        each(lambda one, seq=seq: one.free(seq))
    assert cache.residual_slots.free_slots == len(cache.pool.high)


def test_slots_of_an_earlier_fork_are_shared_as_well(floor: int) -> None:
    """A sequence has more residents than its quota after a fork of it has gone; another fork holds all of their slots."""
    for drop in (lambda cache: cache.free(1), lambda cache: cache.select([0]), lambda cache: cache.select([0, 2, 2])):
        cache, whole = (cache_of(share, batch=3) for share in (0.1, 1.0))
        for one in (cache, whole):
            one.append(*drawn(64 * 8, batch=3), lengths=[64 * 8, 0, 0])
            one.fork(0, 1)
            one.append(*drawn(64 * 4, batch=3, seed=1), lengths=[64 * 4, 0, 0])
        assert max(counts(cache)) > quota(cache, 12)
        for one in (cache, whole):
            drop(one)
            one.select([0, 0])
            one.free(0)
            one.append(*drawn(64 * 10, batch=2, seed=2), lengths=[64 * 10, 0])
        check_planes(cache, whole, 1, 1)
        check_books(cache)


def test_branches_share_residents_and_give_their_slots_back(floor: int) -> None:
    cache, whole = cache_of(0.3), cache_of(1.0)
    for one in (cache, whole):
        one.append(*drawn(64 * 12))
    free = cache.residual_slots.free_slots
    branch, other = cache.branch(), whole.branch()
    for seed, (one, two) in enumerate([(cache, branch), (whole, other)] * 2):
        one.append(*drawn(64 * 6, seed=seed // 2))
        two.append(*drawn(64 * 7, seed=seed // 2 + 5))
    check_planes(cache, whole)
    check_planes(branch, other)
    check_books(cache, branch)
    del cache
    gc.collect()
    for one in (branch, other):
        one.append(*drawn(64 * 6, seed=9))
    check_planes(branch, other)
    check_books(branch)
    branch.free(0)
    assert branch.residual_slots.free_slots > free
    assert branch.residual_slots.free_slots == len(branch.pool.high)


def test_own_blocks_in_the_slots_of_a_fork_that_was_cut_stay(floor: int) -> None:
    """What is appended after a cut takes slots of its own, and the newest blocks stay."""
    cache, whole = (cache_of(share, batch=2) for share in (0.5, 1.0))
    for one in (cache, whole):
        one.append(*drawn(64 * 16, batch=2), lengths=[64 * 16, 0])
        one.fork(0, 1)
        one.truncate(1, 64 * 2)
    assert counts(cache) == [8, 8]
    for step in range(8):
        for one in (cache, whole):
            one.append(*drawn(64, batch=2, seed=step))
        assert resident(cache)[:, -NEWEST:].all()
        assert resident(cache, 1)[:, -min(NEWEST, step + 1) :].all()
        for seq in range(2):
            check_planes(cache, whole, seq, seq)
        check_books(cache)


def test_a_lost_slot_changes_precision_only(floor: int) -> None:
    """Whenever it is lost, and whatever is done then; pages of other blocks and heads stay what they are."""
    cache, whole = (cache_of(share, batch=2) for share in (0.4, 1.0))
    for one in (cache, whole):
        one.append(*drawn(64 * 10, batch=2))
    before = [contents(cache, seq) for seq in range(2)]
    block = int(resident(cache)[1].nonzero()[-2])
    cache.residual_slots.tensors.slot_of_page[cache.table.pages(0)[block], 1] = -1
    assert same(contents(cache, 1), before[1])
    lost = contents(cache)[0] != before[0][0]
    assert lost[1, block * 64 : block * 64 + 64].any()
    lost[1, block * 64 : block * 64 + 64] = False
    assert not lost.any()
    exact, got = whole.attend(queries(batch=2)), cache.attend(queries(batch=2))
    assert (exact - got).abs().max() < 0.2
    for one in (cache, whole):
        one.truncate(0, 64 * 8)
        one.append(*drawn(64 * 7, batch=2, seed=1))
        one.fork(0, 1)
        one.append(*drawn(64 * 7, batch=2, seed=2))
    for seq in range(2):
        check_planes(cache, whole, seq, seq)


# -- room -------------------------------------------------------------------------------------------------------------


def test_exhausted_slots_are_an_error_that_changes_nothing(floor: int) -> None:
    cache = cache_of(0.3, batch=3, pages=40)
    cache.append(*drawn(64 * 8, batch=3), lengths=[64 * 8, 64 * 3, 0])
    slots = cache.residual_slots
    given, slots._free[:] = slots._free[:], []
    before = [contents(cache, seq) for seq in range(3)]
    for change in (
        lambda: cache.append(*drawn(64 * 8, batch=3, seed=1)),
        lambda: cache.reserve(64 * 8),
        lambda: cache.reserve([0, 0, 64]),
    ):
        with pytest.raises(
            RuntimeError, match=r"slots of residuals are exhausted: \d+ more are needed and 0 of \d+ are free"
        ):
            change()
        assert cache.is_intact
        assert [cache.tokens(seq) for seq in range(3)] == [64 * 8, 64 * 3, 0]
        assert all(same(contents(cache, seq), want) for seq, want in enumerate(before))
        assert cache.table.free_pages == 40 - 11
    slots._free[:] = given
    cache.append(*drawn(64 * 8, batch=3, seed=1))
    check_books(cache)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("budget", ["5%", "30%", "max(5%, 6)", "top_k(3)", "paper"])
@pytest.mark.parametrize(("pages", "most"), [(1, 1), (9, 4), (60, 60), (60, 13), (30, 400)])
def test_sequences_that_share_nothing_never_lack_slots(
    floor: int, share: float, budget: str, pages: int, most: int
) -> None:
    quota = quota_table(share, config(share, budget=budget).budget, most)
    room = min(most, pages)
    assert (quota.diff() >= 0).all()
    best = torch.zeros(pages + 1)  # most residents of some sequences, by their blocks together
    for batch in range(1, 9):
        before = torch.nn.functional.pad(best, (room, 0), value=-torch.inf).unfold(
            0, room + 1, 1
        )  # [pages + 1, room + 1]
        best = (before + quota[: room + 1].flip(0)).amax(1)
        assert best[pages] <= slots_of_pool(quota, pages, batch) <= pages


def test_a_pool_smaller_than_the_longest_sequence_has_slots_for_it(floor: int) -> None:
    """``max_pages`` may be larger than the pool."""
    cache = make(2, 8, dim=32, heads=HEADS, config=config(0.1), max_pages=400)
    cache.append(*drawn(64 * 4, batch=2))
    assert counts(cache, 0) == counts(cache, 1) == [4, 4]


# -- files ------------------------------------------------------------------------------------------------------------


def saved_of(share: float = 0.3, **options: Any):
    cache = cache_of(share, batch=3, **options)
    cache.append(*drawn(64 * 9 + 5, batch=3), lengths=[64 * 9 + 5, 64 * 4, 0], queries=queries(64 * 9 + 5, batch=3))
    cache.fork(0, 2)
    cache.append(*drawn(64 * 3, batch=3, seed=2), lengths=[64, 0, 64 * 3])
    return cache, state.state_dict(cache)


@pytest.mark.parametrize("storage", HIGH)
def test_a_file_brings_residents_and_their_mass(floor: int, storage: str) -> None:
    cache, saved = saved_of(storage=storage)
    other = cache_of(0.3, batch=3, pages=60, storage=storage)
    state.load_state_dict(other, saved)
    for step in range(3):
        for seq in range(3):
            assert same(contents(cache, seq), contents(other, seq))
            pages = [one.table.pages(seq) for one in (cache, other)]
            assert torch.equal(cache.residual_slots.mass(pages[0]), other.residual_slots.mass(pages[1]))
        check_books(other)
        k, v = drawn(64 * 2, batch=3, seed=step)
        q = queries(2, batch=3, seed=step)
        cache.append(k, v)
        other.append(k, v)
        assert torch.equal(cache.attend(q), other.attend(q))


def _set(at: tuple[int, ...], value: int | float):
    def change(x: torch.Tensor) -> torch.Tensor:
        x[at] = value
        return x

    return change


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("slot_of_page", _set((0, 0), 99), "numbers of the"),
        ("slot_of_page", _set((0, 0), -2), "numbers of the"),
        ("slot_of_page", lambda x: x[:, :1], "slot_of_page must have shape"),
        ("slot_of_page", lambda x: torch.where(x.max() == x, x.min().clamp(min=0), x), "slots"),
        ("past_mass", _set((0, 0), float("nan")), "past_mass"),
        ("past_mass", _set((0, 0), -1.0), "past_mass"),
        ("residual_slots", _set((0, 0), 99), "cannot have the slots"),
        ("residual_slots", _set((0, 0), -1), "cannot have the slots"),
        ("residual_slots", lambda x: x.flip(1), "cannot have the slots"),
        ("residual_slots", lambda x: torch.full_like(x, -1), "residents in the slots"),
        ("residual_slots", lambda x: x.float(), "residual_slots must have"),
        ("high", lambda x: torch.cat([x, x[:1]]), "saved slots"),
        ("high", lambda x: x[:, :1], "pages of high"),
        ("blocks", _set((0, 0), 99), "needs"),
        (
            "blocks",
            lambda x: torch.cat([x[:, 1:2], x[:, :1], x[:, 2:]], 1)[[0]].where(torch.arange(3)[:, None] == 0, x),
            "same",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(floor: int, name: str, change: Any, match: str) -> None:
    _, saved = saved_of()
    other = cache_of(0.3, batch=3)
    with pytest.raises(ValueError, match=match):
        state.load_state_dict(other, saved | {name: change(saved[name].clone())})
    assert other.is_intact
    state.load_state_dict(other, saved)
    check_books(other)


def test_a_file_needs_a_cache_of_its_kind_with_room(floor: int) -> None:
    _, saved = saved_of()
    with pytest.raises(ValueError, match="some blocks, this cache has residual_share=1"):
        state.load_state_dict(cache_of(1.0, batch=3), saved)
    whole = cache_of(1.0, batch=3)
    with pytest.raises(ValueError, match=r"all blocks, this cache has residual_share=0\.3"):
        state.load_state_dict(cache_of(0.3, batch=3), state.state_dict(whole))
    tight = cache_of(0.3, batch=3)
    given, tight.residual_slots._free[5:] = tight.residual_slots._free[5:], []
    with pytest.raises(RuntimeError, match="slots of residuals are exhausted"):
        state.load_state_dict(tight, saved)
    assert tight.is_intact
    tight.residual_slots._free += given
    tight.append(*drawn(64, batch=3))
    check_books(tight)


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_promoted_is_bounded_by_residents(floor: int) -> None:
    cache = cache_of(0.2, budget="top_k(3)")
    cache.append(*drawn(64 * 20))
    assert cache.promoted(0) == 3
    assert cache.resident_share() == pytest.approx(4 / 20)
    cache = cache_of(0.2, budget="50%")
    cache.append(*drawn(64 * 20))
    assert cache.promoted(0) == 10  # the floor of residents is no smaller than the budget
    assert counts(cache) == [10, 10]


def test_chunks_of_a_prompt_add_the_same_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole query blocks at a time, however many of them are scored at once."""
    q, means = queries(64 * 6)[0], torch.randn(HEADS, 6, 32, generator=torch.Generator().manual_seed(1))
    none = torch.zeros(HEADS, 6)
    want = rule.prompt_mass(none, q, means, start=0, scale=0.2)
    monkeypatch.setattr(rule, "CHUNK_BYTES", 1)
    torch.testing.assert_close(rule.prompt_mass(none, q, means, start=0, scale=0.2), want)
    # A softmax of each query block; an earlier one fades by what came after it.
    torch.testing.assert_close(want.sum(1), torch.full((HEADS,), 64 * sum(rule.DECAY**n for n in range(6))))
    got = rule.prompt_mass(none[:, :3], q[:, : 64 * 3], means[:, :3], start=0, scale=0.2)
    got = torch.nn.functional.pad(got, (0, 3))
    torch.testing.assert_close(rule.prompt_mass(got, q[:, 64 * 3 :], means, start=64 * 3, scale=0.2), want)


def test_forks_cut_to_a_prefix_give_back_what_they_do_not_hold(floor: int) -> None:
    """A fork kept at the beginning of each of several turns has the slots of that beginning, and the newest blocks stay."""
    cache, kept = cache_of(0.25, pages=160), []
    cache.append(*drawn(64 * 20))
    for turn in range(5):
        fork = cache.branch()
        fork.truncate(0, 64 * 4)
        assert len(fork.residual_slots._owned[0]) <= quota(cache, 20) + NEWEST
        kept.append(fork)
        cache.append(*drawn(64 * 4, seed=turn + 1))
        assert resident(cache)[:, -NEWEST:].all()
    held = cache.residual_slots._bounds[0]
    assert held[1] <= 2 * quota(cache, 40) + 8
    kept.clear()
    gc.collect()


def test_what_one_sequence_lacks_is_not_asked_of_another(floor: int) -> None:
    cache = cache_of(0.25, batch=2, pages=96)
    cache.append(*drawn(64 * 20, batch=2), lengths=[64 * 20, 64])
    cache.residual_slots._free.clear()
    cache.residual_slots._owned[0], lost = cache.residual_slots._owned[0][:1], cache.residual_slots._owned[0][1:]
    k, v = drawn(1, batch=2)
    cache.append(k, v, lengths=[0, 1])
    assert cache.tokens(1) == 65
    with pytest.raises(RuntimeError, match="slots of residuals are exhausted"):
        cache.append(*drawn(64, batch=2), lengths=[64, 0])
    cache.residual_slots._owned[0] += lost
