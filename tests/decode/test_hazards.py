"""What a launch must not do silently: run on another device, ignore a stride, write where no page is, overflow."""

from __future__ import annotations

import dataclasses
import importlib
from contextlib import contextmanager

import pytest
import torch

from support.device import DEVICE
from support.kernel_caches import PROMOTES_FEW, both, check, make, query, tokens
from support.paged import keep_some, make_cache
from support.steps import cache_tensors, numerics_of, poisoned_step, residents_of
from thrift_attn import fraction, top_k
from thrift_attn.cache import PagedThriftCache
from thrift_attn.config import ThriftConfig
from thrift_attn.decode import ops, tensors
from thrift_attn.decode.append import write_tail
from thrift_attn.decode.pack import pack_blocks
from thrift_attn.decode.score import score_blocks

LAUNCHERS = ("append", "pack", "score", "select", "attend", "combine_splits", "gather")


@pytest.mark.parametrize("each", [False, True])
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch, each):
    """Triton launches on the current device: nothing may start outside of the guard; with lists of blocks and without."""
    monkeypatch.setattr(ops, "a_program_each", lambda *_: each)
    inside, launched = [], []

    @contextmanager
    def guard(x):
        inside.append(x.device)
        yield
        inside.pop()

    def launch(kernel, *args, **meta):
        launched.append(kernel.__name__)
        assert [device.type for device in inside] == [DEVICE], kernel
        started(kernel, *args, **meta)

    for name in LAUNCHERS:
        module = importlib.import_module(f"thrift_attn.decode.{name}")
        started = module.launch
        monkeypatch.setattr(module, "on_device_of", guard)
        monkeypatch.setattr(module, "launch", launch)
    cache = make("triton", heads=1)
    cache.append(*tokens(65, heads=1))
    cache.append(*tokens(2, heads=1))
    cache.attend(query(heads=1))
    cache.widen()
    kernels = [
        "write_tail",
        "pack_blocks",
        "block_scores",
        *(["attend_each"] if each else ["select_blocks", "attend_split"]),
        "combine_splits",
        "gather_pages",
    ]
    assert {f"{name}_kernel" for name in kernels} <= set(launched)


@pytest.mark.parametrize("count", [5, 70])
def test_tokens_with_any_stride_over_the_head_dimension(count):
    """A view of [B, H, D, T] as it comes from a transposed product."""
    k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in tokens(count, heads=1))
    assert k.stride(-1) != 1
    kernels, plain = both(heads=1)
    for cache in (kernels, plain):
        cache.append(k, v)
    for got, want in zip(kernels.read(0), plain.read(0), strict=True):
        assert (got.float() - want.float()).norm() <= 4e-3 * want.float().norm()


def test_launchers_refuse_strides_that_kernels_do_not_take():
    cache = make("triton", heads=1)
    k = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=DEVICE).transpose(2, 3)
    pages = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        write_tail(k, k, cache=cache.tensors(), pages=pages, numbers=pages.clone())
    with pytest.raises(ValueError, match="contiguous"):
        pack_blocks(k, k, pages, cache=cache.tensors(), numerics=cache.numerics)
    with pytest.raises(ValueError, match="contiguous"):
        poisoned_step(k, cache.tensors(), cache.numerics)


def test_a_step_without_a_page_writes_nothing_and_says_so():
    """A replay too many: a sequence whose next block has no page stays what it was, and so does everybody's page."""
    k, v = tokens(66, batch=2, heads=1)
    cache = make("triton", batch=2, heads=1, pages=4)
    cache.append(k[:, :, :63], v[:, :, :63], lengths=[63, 20])
    state = cache.tensors()
    cache.table.table.fill_(-1)
    before = [x.clone() for x in (*cache.pool, cache.tail[0], *cache.per_sequence.given())]
    ops.append(k[:, :, 63:65], v[:, :, 63:65], state, cache.numerics)
    assert cache.lengths.tolist() == [63, 22]  # the other sequence completes no block
    assert state.overrun.tolist() == [1]
    for x, old in zip((*cache.pool, cache.tail[0], *cache.per_sequence.given()), before, strict=True):
        assert torch.equal(x, old)


def test_the_host_hears_of_a_replay_without_a_page():
    k, v = tokens(130, heads=1)
    cache = make("triton", heads=1, pages=4)
    cache.append(k[:, :, :60], v[:, :, :60])
    cache.reserve(4)
    for at in (60, 62, 64):
        ops.append(k[:, :, at : at + 2], v[:, :, at : at + 2], cache.tensors(), cache.numerics)  # what a graph replays
        cache.advance(2)
    ops.append(k[:, :, 66:], v[:, :, 66:], cache.tensors(), cache.numerics)
    cache.advance(64)
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # the flag comes to the host beside the steps
    for call in (lambda: cache.advance(1), lambda: cache.reserve(1), lambda: cache.append(k[:, :, :1], v[:, :, :1])):
        with pytest.raises(RuntimeError, match="no page was reserved"):
            call()


def test_a_step_beyond_the_page_table_writes_nothing():
    """The entry behind the last one belongs to nobody."""
    k, v = tokens(128, heads=1)
    cache = PagedThriftCache(
        batch=1, kv_heads=1, head_dim=64, num_pages=4, max_pages=1, dtype=torch.float16, device=DEVICE
    )
    cache.append(k[:, :, :64], v[:, :, :64])
    cache.append(k[:, :, 64:127], v[:, :, 64:127])
    state = cache.tensors()
    ops.append(k[:, :, 127:], v[:, :, 127:], state, cache.numerics)
    assert state.overrun.tolist() == [1]
    assert cache.lengths.tolist() == [127]
    assert not cache.pool.base[1:].any()


def test_a_length_beyond_the_page_table_writes_into_nothing_else():
    """Scores, lists and past mass have room for the blocks of the table: what lies behind them belongs to others."""
    held = keep_some(make_cache([64 * 3 + 9], 1, 64), 0.5)
    page_table = held.page_table[:, :2].contiguous()
    residents = residents_of(held.residents.slot_of_page, 1, 2)
    tensors_of = {"base": held.base, "high": held.high, "tail": held.tail, "rings": held.rings, "residents": residents}
    cache = cache_tensors(held.centres, page_table, held.lengths + 64 * 70, **tensors_of)
    step = poisoned_step(query(2, heads=2), cache, numerics_of(sink_token="none"), splits=3, scale=0.125)
    room, written = 200, {}
    for name in (
        "bias",
        "scores",
        "first_scores",
        "score_lse",
        "block_indices",
        "block_counts",
        "partial_out",
        "partial_lse",
    ):
        old = getattr(step, name)
        flat = torch.full((old.numel() + room,), 7, dtype=old.dtype, device=DEVICE)
        written[name] = flat
        step = dataclasses.replace(step, **{name: flat[: old.numel()].view(old.shape)})
    for launch in ops.step_kernels(step).values():
        launch()
    for name, flat in written.items():
        assert (flat[-room:] == 7).all(), name
        assert (flat[:-room] != 7).any(), name
    others = [page for page in range(len(residents.past_mass)) if page not in page_table.tolist()[0]]
    assert others
    assert not residents.past_mass[others].any()


@pytest.mark.parametrize("name", ["page_table", "lengths", "rings", "budget", "slots", "bounds", "quota", "past_mass"])
def test_tables_that_kernels_take_for_contiguous_are_refused_where_they_are_not(name):
    held = keep_some(make_cache([130, 70], 1, 64), 0.5)
    residents = residents_of(held.residents.slot_of_page, 2, held.page_table.shape[1])
    cache = cache_tensors(held.centres, held.page_table, held.lengths, residents=residents)
    owner = residents if hasattr(residents, name) else cache
    x = getattr(owner, name)

    def changed(table):
        new = dataclasses.replace(owner, **{name: table})
        return new if owner is cache else dataclasses.replace(cache, residents=new)

    changed(x.clone()).check_beside(2, 64)
    wide = torch.stack([x, x], -1)[..., 0]  # the same numbers with others between them
    assert torch.equal(wide, x)
    with pytest.raises(ValueError, match=f"contiguous.*{name}|{name}.*contiguous"):
        changed(wide).check_beside(2, 64)
    if name != "past_mass":
        with pytest.raises(TypeError, match=f"{name} of int32"):
            changed(x.long()).check_beside(2, 64)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_queries_of_zero_and_small_scales(scale):
    k, v = tokens(200, heads=1)
    kernels, plain = both(heads=1, config=ThriftConfig.for_cache(budget=top_k(1)))
    for cache in (kernels, plain):
        cache.append(k, v)
    q = query(2, heads=2)
    q[:, 0] = 0
    check(kernels, plain, q, scale=scale)
    q[:, 1] = 2e-6  # far below the range in which queries fill half precision
    check(kernels, plain, q, scale=scale)


def test_sizes_that_no_launch_serves_are_refused_at_once():
    options = {"head_dim": 64, "num_pages": 4, "dtype": torch.float16, "device": DEVICE}
    with pytest.raises(ValueError, match="65535 sequences times KV heads, got 2048"):
        PagedThriftCache(batch=2048, kv_heads=32, **options)
    with pytest.raises(ValueError, match="max_pages must be at most 65536"):
        PagedThriftCache(batch=1, kv_heads=1, max_pages=65537, **options)


def test_a_pool_larger_than_the_longest_list_held_in_registers():
    cache = make("triton", heads=1, pages=16_400, config=ThriftConfig.for_cache(budget=fraction(0.5)))
    cache.append(*tokens(70, heads=1))
    assert cache.attend(query(heads=1)).isfinite().all()


@pytest.mark.parametrize("counts", [[0, 3, 64], [64, 0, 1]])
def test_ragged_steps_are_one_launch(counts, monkeypatch):
    """Each sequence takes as many tokens as it is told, by one operator, and packs its block if it is complete."""
    k, v = tokens(64, batch=3, heads=1)
    kernels, plain = both(batch=3, heads=1, config=ThriftConfig.for_cache(budget=0.05, smooth="none"))
    for cache in (kernels, plain):
        cache.append(k, v, lengths=[63, 10, 40])
    launched, append_step = [], ops.append_step
    monkeypatch.setattr(ops, "append_step", lambda *args: launched.append(args) or append_step(*args))
    for cache in (kernels, plain):
        cache.append(k, v, lengths=counts)
    assert len(launched) == 1
    assert kernels.lengths.tolist() == plain.lengths.tolist()
    assert kernels._tail_blocks == plain._tail_blocks
    for seq in range(3):
        assert kernels.tokens(seq) == plain.tokens(seq)
        for got, want in zip(kernels.read(seq), plain.read(seq), strict=True):
            assert (got.float() - want.float()).norm() <= 4e-3 * want.float().norm()


@pytest.mark.parametrize("tq", [3, 5])
def test_new_tokens_that_are_no_power_of_two_share_a_kernel(tq):
    """Padded queries neither score blocks nor see any."""
    assert tensors.padded_queries(tq) > tq
    means = -torch.ones(4, 1, 64, dtype=torch.float16, device=DEVICE)
    table = torch.arange(4, dtype=torch.int32, device=DEVICE)[None]
    lengths = torch.tensor([4 * 64], dtype=torch.int32, device=DEVICE)
    q = torch.ones(1, 1, tq, 64, dtype=torch.float16, device=DEVICE)
    step = poisoned_step(q, cache_tensors(means, table, lengths), numerics_of(sink_token="none"))
    score_blocks(step)
    assert (step.scores < 0).all()  # a row of zeros would score 0


def test_warming_up_changes_nothing(monkeypatch):
    """Kernels run for every padded number of new tokens asked for, and the cache holds what it held."""
    k, v = tokens(70, heads=1)
    cache = make("triton", heads=1)
    cache.append(k, v)
    before = [x.clone() for x in (*cache.pool, cache.tail, cache.lengths, *cache.per_sequence.given())]
    steps = []
    real = ops.begin_step
    monkeypatch.setattr(
        ops, "begin_step", lambda q, *args, **options: steps.append(q.shape[2]) or real(q, *args, **options)
    )
    cache.warm_up(2, new_tokens=(1, 3, 4))
    assert sorted(set(steps)) == [1, 4]
    after = (*cache.pool, cache.tail, cache.lengths, *cache.per_sequence.given())
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert cache.overrun.tolist() == [0]


@pytest.mark.gpu
def test_replays_of_attention_alone_read_nothing_stale():
    """Kernels of one replay start while those before end: each reads what was written for it, with another query every time."""
    k, v = tokens(700)
    cache = make("triton")
    cache.append(k, v)
    q = query()
    step = ops.begin_step(q, cache.tensors(), cache.numerics, scale=0.125)
    alone = dataclasses.replace(ops.begin_step(q, cache.tensors(), cache.numerics, scale=0.125), overlap=False)
    for launch in (*ops.step_kernels(step).values(), *ops.step_kernels(alone).values()):
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in ops.step_kernels(step).values():
            launch()
    for _ in range(10_000):
        q.normal_()
        graph.replay()
        for launch in ops.step_kernels(alone).values():
            launch()
        assert torch.equal(step.out, alone.out)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_cache_on_a_gpu_that_is_not_the_current_one():
    k, v = (x.to("cuda:1") for x in tokens(130, heads=1))
    options = {"num_pages": 4, "config": PROMOTES_FEW, "dtype": torch.float16, "device": "cuda:1"}
    cache = PagedThriftCache(batch=1, kv_heads=1, head_dim=64, **options)
    plain = make("reference", heads=1)
    cache.append(k, v)
    plain.append(k.to(plain.device), v.to(plain.device))
    with torch.cuda.device(0):
        got = cache.attend(query(heads=2).to("cuda:1"))
    want = plain.attend(query(heads=2))
    assert (got.cpu().float() - want.cpu().float()).norm() <= 2e-3 * want.float().norm()


@pytest.mark.slow
@pytest.mark.parametrize(("plane", "tq"), [("nested", 1), ("16bit", 3)])
def test_the_scales_of_a_sequence_are_its_own(plane, tq):
    """Beside a neighbour of another size, in steps or in bulk, a sequence holds and answers the same bits as alone."""
    k, v = tokens(140, batch=2, heads=2)
    for b, size in ((0, 1.0), (1, 2.0**-9)):
        k[b, :, :, 5] *= 16 * (b + 1)
        k[b], v[b] = size * k[b], size * v[b]
    config = ThriftConfig.for_cache(promoted_storage=plane, budget=top_k(1))
    both, alone = make("triton", batch=2, config=config), [make("triton", config=config) for _ in range(2)]
    for part in (slice(0, 60), slice(60, 70), slice(70, 140)):
        both.append(k[:, :, part], v[:, :, part])
    q = query(tq, batch=2)
    got, got_lse = both.attend(q, return_lse=True)
    wide = both.widen()
    for b, cache in enumerate(alone):
        cache.append(k[b : b + 1], v[b : b + 1])
        want, want_lse = cache.attend(q[b : b + 1], return_lse=True)
        assert torch.equal(got[b], want[0])
        assert torch.equal(got_lse[b], want_lse[0])
        for x, y in zip(wide, cache.widen(), strict=True):
            assert torch.equal(x[b], y[0])
        for x, y in zip(both.per_sequence, cache.per_sequence, strict=True):
            assert torch.equal(x[b], y[0])
    assert not torch.equal(both.per_sequence.k_channel_scale[0], both.per_sequence.k_channel_scale[1])
