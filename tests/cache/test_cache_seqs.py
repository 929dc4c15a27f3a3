"""Sequences of a paged cache exchanged, repeated, branched off and written out, in plain PyTorch."""

import copy
import gc
import pickle

import pytest
import torch

from support.caches import make, tokens
from thrift_attn.cache import PagedThriftCache, state
from thrift_attn.config import ThriftConfig


def same(one, seq, other, at):
    return all(torch.equal(a, b) for a, b in zip(one.read(seq), other.read(at), strict=True))


def filled(lengths, **options):
    cache = make(batch=len(lengths), **options)
    cache.append(*tokens(max(lengths), batch=len(lengths)), lengths=lengths)
    return cache


@pytest.mark.parametrize("seqs", [[1, 0, 1], [2, 2, 2], [0, 1, 2], [2], [0, 0, 1, 1, 2, 2]])
def test_select_makes_each_row_what_the_chosen_one_was(seqs):
    cache, before = filled([130, 63, 64]), filled([130, 63, 64])
    table = cache.table.table
    cache.select(seqs)
    assert cache.batch == len(seqs)
    assert [cache.tokens(seq) for seq in range(len(seqs))] == [before.tokens(seq) for seq in seqs]
    assert cache.lengths.tolist() == [before.tokens(seq) for seq in seqs]
    assert all(same(cache, seq, before, source) for seq, source in enumerate(seqs))
    assert (cache.table.table is table) == (len(seqs) == 3)  # a graph holds on to the tensors
    assert cache.table.free_pages == 32 - len({(seq, b) for seq in seqs for b in range(before.tokens(seq) // 64)})


def test_copies_grow_apart():
    cache = filled([100])
    cache.select([0, 0])
    k, v = tokens(90, batch=2, seed=1)
    cache.append(k, v)
    want = filled([100])
    want.append(k[1:], v[1:])
    assert same(cache, 1, want, 0)
    for seq in range(2):
        cache.free(seq)
    assert cache.table.free_pages == 32


def test_a_reserved_page_is_not_shared():
    cache = filled([100])
    cache.reserve(100)
    cache.select([0, 0])
    cache.append(*tokens(100, batch=2, seed=1))
    pages = [cache.table.pages(seq).tolist() for seq in range(2)]
    assert pages[0][0] == pages[1][0]
    assert not set(pages[0][1:]) & set(pages[1][1:])


def test_select_checks_its_rows():
    cache = filled([10])
    with pytest.raises(ValueError, match="at least one"):
        cache.select([])
    with pytest.raises(ValueError, match="seq must be"):
        cache.select([1])


def test_branches_share_pages_and_give_their_own_back():
    cache, want = filled([130, 64]), filled([130, 64])
    free = cache.table.free_pages
    branch = cache.branch()
    assert cache.table.free_pages == free
    k, v = tokens(70, batch=2, seed=1)
    branch.append(k, v)
    want.append(k, v)
    assert all(same(branch, seq, want, seq) for seq in range(2))
    assert [cache.tokens(seq) for seq in range(2)] == [130, 64]
    assert cache.table.free_pages == branch.table.free_pages < free
    del branch
    gc.collect()
    assert cache.table.free_pages == free


def test_pages_outlive_the_cache_they_came_from():
    cache = filled([130])
    branch = cache.branch()
    del cache
    gc.collect()
    want = filled([130])
    branch.append(*tokens(500, seed=3))  # would overwrite pages given back too early
    k, _ = branch.read(0)
    assert torch.equal(k[:, :128], want.read(0)[0][:, :128])
    assert branch.table.free_pages == 32 - 630 // 64


def test_state_goes_out_and_comes_back_with_its_sharing():
    cache = filled([130, 63, 64])
    cache.select([0, 0, 1, 2])
    saved = state.state_dict(cache)
    other = make(batch=4)
    state.load_state_dict(other, saved)
    assert other.table.free_pages == cache.table.free_pages
    assert all(same(other, seq, cache, seq) for seq in range(4))
    other.truncate(0, 127)  # the tail blocks came along
    cache.truncate(0, 127)
    assert same(other, 0, cache, 0)


def test_state_that_does_not_fit_is_refused_and_leaves_the_cache_as_it_was():
    saved = state.state_dict(filled([130, 63]))
    for other, problem in (
        (make(batch=1), "batch"),
        (make(batch=2, pages=1), "pages"),
        (make(batch=2, dim=32), "shape"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=problem):
            state.load_state_dict(other, saved)
        assert other.table.free_pages == other.pool.base.shape[0]
    used = filled([10, 10])
    with pytest.raises(ValueError, match="empty"):
        state.load_state_dict(used, saved)


@pytest.mark.parametrize("lengths", [[1, 63], [64, 0], [130, 65]])
def test_widened_rows_are_what_read_gives(lengths):
    cache = filled(lengths)
    out = cache.widen(room=5)
    for seq, length in enumerate(lengths):
        for x, want in zip(out, cache.read(seq), strict=True):
            assert x.shape == (2, 2, max(lengths) + 5, 64)
            assert torch.equal(x[seq, :, :length], want)
            assert not x[seq, :, length:].any()


@pytest.mark.parametrize("high", ["nested", "nested8", "16bit"])
def test_the_first_token_stays_exact_through_all_of_it(high):
    """Forked, exchanged, branched off, written out, and taken back to less than its block; then the block fills up again."""
    k, v = tokens(200, batch=3)
    v[:, :, 0] *= 100
    config = ThriftConfig.for_cache(budget=0.05, promoted_storage=high, smooth="none")

    def check(cache, *sources):
        for seq, source in enumerate(sources):
            for got, given in zip(cache.read(seq), (k, v), strict=True):
                assert torch.equal(got[:, 0], given[source, :, 0])

    cache = make(batch=3, config=config)
    cache.append(k, v, lengths=[200, 64, 10])
    check(cache, 0, 1, 2)
    cache.fork(0, 2)
    cache.select([1, 0, 2])
    check(cache, 1, 0, 0)
    branch, restored = cache.branch(), make(batch=3, config=config)
    state.load_state_dict(restored, state.state_dict(cache))
    cache.free(0)
    cache.append(k[2:].expand(3, -1, -1, -1), v[2:].expand(3, -1, -1, -1), lengths=[100, 0, 0])
    check(cache, 2, 0, 0)
    check(branch, 1, 0, 0)
    check(restored, 1, 0, 0)
    cache.truncate(1, 40)  # its block is in no tail block any more
    check(cache, 2, 0, 0)
    cache.append(k[2:].expand(3, -1, -1, -1), v[2:].expand(3, -1, -1, -1), lengths=[0, 50, 0])
    check(cache, 2, 0, 0)
    cache.truncate(0, 0)
    cache.append(k[1:2].expand(3, -1, -1, -1), v[1:2].expand(3, -1, -1, -1), lengths=[70, 0, 0])
    check(cache, 1, 0, 0)


@pytest.mark.parametrize(("start", "stop"), [(10, 74), (63, 65), (64, 64), (70, None), (130, 150), (0, 1), (150, 160)])
def test_a_part_is_read_from_any_token_on(start: int, stop: int | None) -> None:
    cache, (k, v) = make(), tokens(150)
    cache.append(k, v)
    for part, whole in zip(cache.read(0, start, stop), cache.read(0), strict=True):
        assert torch.equal(part, whole[:, start:stop])
    with pytest.raises(ValueError, match="start must be at least 0, got -64"):
        cache.read(0, -64, 64)


def test_books_hold_numbers_and_not_the_tensors_that_came() -> None:
    cache, kept = filled([100, 100]), torch.tensor(70)
    cache.truncate(0, kept)
    kept += 20
    assert cache.tokens(0) == 70
    cache.select(torch.tensor([1, 0]))
    assert [cache.tokens(0), cache.tokens(1)] == [100, 70]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda cache: cache.free(True), TypeError, "seq must be a whole number, got True"),
        (lambda cache: cache.truncate(0, True), TypeError, "tokens must be a whole number, got True"),
        (lambda cache: cache.select(torch.tensor([True, False])), TypeError, "seq must be a whole number"),
        (lambda cache: cache.select(1), TypeError, "seqs must be a sequence of whole numbers, got 1"),
        (lambda cache: cache.read(0, 0, 1.5), TypeError, r"stop must be a whole number, got 1\.5"),
        (lambda cache: cache.read(0, 0, -5), ValueError, "stop must be at least 0, got -5"),
        (lambda cache: cache.widen(-1), ValueError, "room must be at least 0 tokens, got -1"),
        (lambda cache: cache.promoted(0, 17), ValueError, "new_tokens must be from 1 to 16, got 17"),
        (lambda cache: cache.warm_up(0), ValueError, "q_heads must be at least 1, got 0"),
        (lambda cache: cache.warm_up(4, (0,)), ValueError, "numbers from 1 to 16"),
        (lambda cache: cache.attend(torch.zeros(2, 0, 1, 32)), ValueError, "a multiple of 2"),
        (
            lambda cache: cache.append(*tokens(1, batch=2), scale=float("nan")),
            ValueError,
            "scale must be a finite number",
        ),
        (lambda cache: cache.append(*tokens(1, batch=2), lengths=5), TypeError, "lengths must be a sequence"),
        (pickle.dumps, TypeError, "cannot be pickled"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(call, error, message) -> None:
    cache = filled([100, 70])
    with pytest.raises(error, match=message):
        call(cache)
    assert cache.is_intact
    assert [cache.tokens(0), cache.tokens(1)] == [100, 70]


@pytest.mark.parametrize("name", ["batch", "kv_heads", "head_dim", "num_pages", "max_pages", "max_tokens"])
@pytest.mark.parametrize("size", [1.5, True, "16"])
def test_sizes_are_whole_numbers(name: str, size: object) -> None:
    sizes = {"batch": 1, "kv_heads": 1, "head_dim": 16, "num_pages": 4, name: size}
    with pytest.raises(TypeError, match=f"{name} must be a whole number, got "):
        PagedThriftCache(**sizes, dtype=torch.float32, device="cpu")


def test_a_table_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="max_pages must be at most 65536"):
        PagedThriftCache(
            batch=1, kv_heads=1, head_dim=16, num_pages=4, max_pages=10**9, dtype=torch.float32, device="cpu"
        )


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_grows_apart_from_the_first(copied) -> None:
    cache = filled([100, 70])
    other = copied(cache)
    other.append(*tokens(30, batch=2))
    assert [cache.tokens(0), other.tokens(0)] == [100, 130]


def test_saved_pages_that_no_sequence_has_are_refused() -> None:
    saved = state.state_dict(filled([100, 100]))
    empty = make(batch=2)
    with pytest.raises(ValueError, match="of 2 saved pages sequences have 1"):
        state.load_state_dict(empty, {**saved, "blocks": torch.zeros_like(saved["blocks"])})
    assert empty.tokens(0) == 0
