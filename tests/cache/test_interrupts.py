"""Changes of a cache that are interrupted: what it holds afterwards is as before, as after, or refused."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from thrift_attn import cache as cache_package
from thrift_attn.cache import PagedThriftCache, state
from thrift_lab.fuzz.interrupts import Interrupter

INTERRUPTER = Interrupter(str(Path(cache_package.__file__).parent))


def make() -> tuple[PagedThriftCache, torch.Tensor]:
    """A cache of two sequences with 70 and 63 tokens, and tokens to append."""
    cache = PagedThriftCache(batch=2, kv_heads=1, head_dim=16, num_pages=8, dtype=torch.float32, device="cpu")
    x = torch.randn(2, 1, 200, 16, generator=torch.Generator().manual_seed(1))
    cache.append(x[:, :, :70], x[:, :, :70], lengths=[70, 63])
    return cache, x[:, :, 70:]


def lines_of(change: Callable[[], object], at: int | None = None) -> int:
    """Run a change and count its lines on the host; raise KeyboardInterrupt before line ``at``."""
    return INTERRUPTER.run(change, at)[1]


def held(cache: PagedThriftCache) -> list[torch.Tensor]:
    """What a cache holds and says of itself."""
    return [x for seq in range(cache.batch) for x in cache.read(seq)] + [cache.lengths.clone()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


CHANGES: dict[str, Callable[[PagedThriftCache, torch.Tensor], object]] = {
    "append": lambda cache, x: cache.append(x, x),
    "append ragged": lambda cache, x: cache.append(x, x, lengths=[130, 1]),
    "truncate": lambda cache, x: cache.truncate(0, 3),
    "free": lambda cache, x: cache.free(0),
    "fork": lambda cache, x: cache.fork(0, 1),
    "select": lambda cache, x: cache.select([1, 0, 0]),
    "reserve": lambda cache, x: cache.reserve(130),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_interrupt_at_any_line_leaves_a_cache_that_is_right_or_says_that_it_is_not(name):
    cache, new = make()
    before = held(cache)
    count = lines_of(lambda: CHANGES[name](cache, new))
    after = held(cache)
    assert count > 10
    refused = 0
    for line in range(1, count + 1):
        cache, new = make()
        with pytest.raises(KeyboardInterrupt):
            lines_of(lambda: CHANGES[name](cache, new), line)  # noqa: B023 (called at once)
        try:
            found = held(cache)
        except RuntimeError:
            refused += 1
            assert not cache.is_intact
            with pytest.raises(RuntimeError, match="interrupted halfway"):
                cache.reserve(1)
            continue
        assert same(found, before) or same(found, after), line
        assert in_use(cache) + cache.table.free_pages <= 8, line  # an entry of the table is a page that is owned
    assert refused < count


def in_use(cache: PagedThriftCache) -> int:
    """Pages that the table names."""
    return len(cache.table.table[cache.table.table >= 0].unique())


def test_a_cache_that_is_not_intact_is_not_written_to_a_file_and_not_branched():
    cache, new = make()
    count = lines_of(lambda: cache.append(new, new))
    cache, new = make()
    with pytest.raises(KeyboardInterrupt):
        lines_of(lambda: cache.append(new, new), count // 2)
    assert not cache.is_intact
    for use in (cache.branch, lambda: state.state_dict(cache)):
        with pytest.raises(RuntimeError, match="interrupted halfway"):
            use()


def test_an_interrupted_load_leaves_a_cache_that_is_empty_or_full_or_says_that_it_is_neither():
    saved = state.state_dict(make()[0])

    def empty() -> PagedThriftCache:
        return PagedThriftCache(batch=2, kv_heads=1, head_dim=16, num_pages=8, dtype=torch.float32, device="cpu")

    target = empty()
    before = held(target)
    count = lines_of(lambda: state.load_state_dict(target, saved))
    after = held(target)
    refused = 0
    for line in range(1, count + 1):
        target = empty()
        with pytest.raises(KeyboardInterrupt):
            lines_of(lambda: state.load_state_dict(target, saved), line)  # noqa: B023 (called at once)
        if target.is_intact:
            assert same(held(target), before) or same(held(target), after), line
        refused += not target.is_intact
    assert 0 < refused < count


def test_an_interrupted_branch_takes_nothing_from_its_source():
    cache, new = make()
    count = lines_of(cache.branch)
    before = held(cache)
    for line in range(1, count + 1):
        with pytest.raises(KeyboardInterrupt):
            lines_of(cache.branch, line)
        assert same(held(cache), before), line
        assert in_use(cache) + cache.table.free_pages <= 8, line
    cache = make()[0]
    with pytest.raises(KeyboardInterrupt):
        lines_of(cache.branch, count // 2)
    cache.append(new, new, lengths=[0, 130])  # into no page of the other sequence
    assert same(held(cache)[:2], before[:2])


def test_a_page_never_has_two_owners_after_an_interrupt():
    def shared() -> list[PagedThriftCache]:
        cache = make()[0]
        return [cache, cache.branch()]

    first = shared()
    count = lines_of(lambda: first[0].free(0))
    for line in range(1, count + 1):
        caches = shared()
        with pytest.raises(KeyboardInterrupt):
            lines_of(lambda: caches[0].free(0), line)  # noqa: B023 (called at once)
        other = caches.pop()
        caches.clear()
        kept = held(other)
        other.truncate(1, 0)
        x = torch.ones(2, 1, 64, 16)
        other.append(x, x, lengths=[0, 64])
        assert torch.equal(other.read(0)[0], kept[0])


def test_threads_wait_for_each_other():
    cache = PagedThriftCache(batch=1, kv_heads=1, head_dim=16, num_pages=8, dtype=torch.float32, device="cpu")
    x = torch.randn(1, 1, 1, 16)
    threads = [threading.Thread(target=lambda: [cache.append(x, x) for _ in range(100)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.tokens(0) == cache.lengths.item() == 300
    assert (cache.read(0)[0] - x[0]).abs().max() < 0.2


def test_reading_waits_for_a_change_in_another_thread():
    """Attention beside appends in another thread: never an error, and always a whole number of appends."""
    cache = PagedThriftCache(batch=1, kv_heads=1, head_dim=16, num_pages=40, dtype=torch.float32, device="cpu")
    x = torch.randn(1, 1, 33, 16)
    cache.append(x, x)
    faults: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(60):
                assert cache.read(0)[0].shape[1] % 33 == 0
                cache.attend(x[:, :, :1])
        except BaseException as error:
            faults.append(error)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        cache.append(x, x)
    for reader in readers:
        reader.join()
    assert faults == []
    assert cache.tokens(0) == 51 * 33
