"""The cache on its kernels against the cache in plain PyTorch: the same pages, the same attention."""

from __future__ import annotations

import math

import pytest
import torch

from support.kernel_caches import both, check, make, query, tokens
from thrift_attn import fraction, top_k
from thrift_attn.config import ThriftConfig
from thrift_attn.decode import ops
from thrift_attn.reference.budget import promoted_in_decode


@pytest.mark.parametrize(("high", "scales"), [("nested", "best"), ("nested8", "max"), ("16bit", "best")])
def test_pages_written_by_kernels_and_by_pytorch_agree(high, scales):
    k, v = tokens(64, heads=1)
    caches = both(config=ThriftConfig.for_cache(budget=0.05, promoted_storage=high, scales=scales), heads=1)
    for cache in caches:
        cache.append(k, v)
    one, other = caches
    assert (one.pool.k_block_mean[:1].float() - other.pool.k_block_mean[:1].float()).abs().max() <= 2**-7
    # Means are summed in another order: one that rounds the other way, or a near tie of two scales, moves single codes.
    different = (one.pool.base[:1] != other.pool.base[:1]).float().mean()
    assert different < 0.02
    for a, b in zip(one.read(0), other.read(0), strict=True):
        assert (a.float() - b.float()).norm() < 4e-3 * b.float().norm()


@pytest.mark.parametrize("steps", [[64], [60, 4], [200]])
@pytest.mark.parametrize(("low", "high"), [("nvfp4", "nested"), ("mxfp4", "nested8"), ("nvfp4", "16bit")])
def test_the_first_token_lies_beside_the_pages(low, high, steps):
    """Its key is the centre of its block, its value is 0 in every plane, and both are kept exactly, whoever packs the block."""
    k, v = tokens(sum(steps), batch=2, heads=1)
    kernels, plain = both(
        batch=2,
        heads=1,
        config=ThriftConfig.for_cache(budget=0.05, base_format=low, promoted_storage=high, smooth="none"),
    )
    for cache in (kernels, plain):
        start = 0
        for n in steps:
            cache.append(k[:, :, start : start + n], v[:, :, start : start + n])
            start += n
        assert torch.equal(cache.per_sequence.sink_value, v[:, :, 0])
        pages = cache.table.table[:, 0].long()
        assert torch.equal(cache.pool.k_block_mean[pages], k[:, :, 0])
        for seq in range(2):
            keys, values = cache.read(seq)
            assert torch.equal(keys[:, 0], k[seq, :, 0])
            assert torch.equal(values[:, 0], v[seq, :, 0])
    means = [cache.per_sequence.block0_mean for cache in (kernels, plain)]
    torch.testing.assert_close(*means, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(means[0].float(), k[:, :, 1:64].float().mean(2), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("tq", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_first_block_is_chosen_without_its_first_token(monkeypatch, tq):
    """The first key matters to all queries and its block to none, then the other way round."""
    monkeypatch.setattr(ops, "a_program_each", lambda *_: False)  # with a list that can be looked at
    k, v = tokens(64 * 6, heads=1)
    q = query(tq, heads=2)
    direction = q.float()[0, :, 0].mean(0)
    q[:] = direction
    for others, chosen in ((-1.0, 3), (1.0, 0)):
        k[:, :, 0] = (-3 * others * direction).to(k.dtype)
        k[:, :, 1:64] = (others * direction).to(k.dtype)
        k[:, :, 64:] = 0
        k[:, :, 192:256] = (0.1 * direction).to(k.dtype)
        cache = make("triton", heads=1, config=ThriftConfig.for_cache(budget=top_k(1), force_last=0))
        cache.append(k, v)
        step = ops.begin_step(q, cache.tensors(), cache.numerics, scale=0.125)
        for launch in ops.step_kernels(step).values():
            launch()
        assert int(step.block_indices[0, 0, 0, 0]) == chosen


@pytest.mark.parametrize(("high", "queries"), [("nested", 1), ("16bit", 3)])
def test_scales_of_channels_and_heads(high, queries):
    """K with outlier channels, another in each head, and small V: first tokens, a step and what is read."""
    k, v = tokens(134)
    for head, channel in ((0, 3), (0, 40), (1, 17)):
        k[:, head, :, channel] *= 20
    v[:, 1] *= 1e-3
    kernels, plain = both(config=ThriftConfig.for_cache(promoted_storage=high, budget=top_k(1)))
    for cache in (kernels, plain):
        cache.append(k[:, :, :130], v[:, :, :130])
        cache.append(k[:, :, 130:], v[:, :, 130:])
    powers = kernels.per_sequence.k_channel_scale[0]
    assert len(powers[0].unique()) > 1
    assert not torch.equal(powers[0], powers[1])
    for got, want in zip(kernels.per_sequence[2:], plain.per_sequence[2:], strict=True):
        assert torch.equal(got, want)
    check(kernels, plain, query(queries))
    out = [cache.attend(query(queries)) for cache in (kernels, plain)]
    for head in (2, 3):  # of the second KV head: small outputs, which the norm of all would hide
        assert (out[0] - out[1])[:, head].float().norm() <= 3e-3 * out[1][:, head].float().norm()
    torch.testing.assert_close(kernels.widen()[0][0], plain.widen()[0][0], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(("sink", "centre"), [("exact", "block"), ("none", "block"), ("none", "none")])
def test_scales_leave_room_for_a_huge_first_token(sink, centre):
    """What bounds the powers of two is found by the kernel as by the reference, head by head.

    An exact first token comes with centred K only.
    """
    k, v = tokens(64)
    k[:, 0, 0], k[:, 1, 0, 3], v[:, 1, 0, 7] = 3e3 * k[:, 0, 1], 3e4, 3e4
    config = ThriftConfig.for_cache(sink_token=sink, center=centre)
    kernels, plain = both(config=config)
    for cache in (kernels, plain):
        cache.append(k, v)
    for got, want in zip(kernels.per_sequence[2:], plain.per_sequence[2:], strict=True):
        assert torch.equal(got, want)
    largest = (k[0] - k[0, :, :1] if sink == "exact" else k[0]).float().abs().amax(1)
    assert 512 <= (kernels.per_sequence.k_channel_scale[0] * largest).max() < 2048
    for got, want, given in zip(kernels.widen(), plain.widen(), (k, v), strict=True):
        assert (got.float() - want.float()).norm() <= 1e-3 * want.float().norm()
        error, most = (got.float() - given.float()).abs(), given.float().abs().amax((2, 3), keepdim=True)
        assert (error <= 2 * most / 32).all()  # two roundings to 4 bits; a block that saturates is off by more


@pytest.mark.parametrize("steps", [[63, 1, 1, 64], [70, 62, 3]])
def test_steps_on_the_device_equal_bulk_appends(steps):
    k, v = tokens(sum(steps), batch=2, heads=1)
    kernels, plain = both(batch=2, heads=1)
    start = 0
    for n in steps:
        kernels.append(k[:, :, start : start + n], v[:, :, start : start + n])
        start += n
    plain.append(k, v)
    assert kernels.lengths.tolist() == plain.lengths.tolist() == [sum(steps)] * 2
    assert [kernels.tokens(seq) for seq in range(2)] == [sum(steps)] * 2
    check(kernels, plain, query(batch=2, heads=2))
    for cache in (kernels, plain):
        cache.truncate(1, sum(steps) - 5)
        cache.append(k[:, :, :10], v[:, :, :10], lengths=[0, 10])
    check(kernels, plain, query(3, batch=2, heads=2))


@pytest.mark.parametrize(
    ("high", "budget"), [("nested", fraction(0)), ("nested8", top_k(2)), ("16bit", fraction(1)), ("nested", top_k(1))]
)
def test_attention_over_ragged_batches(high, budget):
    lengths = [0, 1, 64, 150]
    k, v = tokens(150, batch=4)
    kernels, plain = both(batch=4, config=ThriftConfig.for_cache(promoted_storage=high, budget=budget))
    for cache in (kernels, plain):
        cache.append(k, v, lengths=lengths)
    check(kernels, plain, query(batch=4))
    out, lse = kernels.attend(query(batch=4), return_lse=True)
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()


@pytest.mark.parametrize(
    "options", [{"window": 100}, {"softcap": 2.0}, {"scale": 0.3}, {"window": 70, "softcap": 5.0}], ids=str
)
@pytest.mark.parametrize("tq", [4])
def test_options(options, tq):
    k, v = tokens(140, heads=1)
    kernels, plain = both(heads=1, config=ThriftConfig.for_cache(budget=top_k(1)))
    for cache in (kernels, plain):
        cache.append(k, v)
    assert promoted_in_decode(top_k(1), 140, new_tokens=tq, window=options.get("window")) == 1  # of two that are seen
    check(kernels, plain, query(tq), **options)


@pytest.mark.parametrize(
    ("low", "center", "sink"), [("nvfp4", "none", "none"), ("mxfp4", "block", "exact"), ("nvfp4", "block", "none")]
)
def test_formats(low, center, sink):
    k, v = tokens(70, heads=1)
    kernels, plain = both(
        config=ThriftConfig.for_cache(budget=0.05, base_format=low, center=center, sink_token=sink), heads=1
    )
    for cache in (kernels, plain):
        cache.append(k, v)
    check(kernels, plain, query())


def test_operators_are_registered_properly():
    k, v = tokens(40, heads=1)
    cache = make("triton", heads=1)
    cache.append(k, v)
    tensors, storage = cache.tensors(), ops._storage(cache.numerics)
    torch.library.opcheck(ops.attend_cache, (query(), *ops._flat(tensors), storage, False, False, 0.125, None, None))
    step = (k[:, :, :3], v[:, :, :3], *ops._flat(tensors), storage, False)
    torch.library.opcheck(ops.append_step, step, test_utils="test_schema")


def test_a_step_compiles_as_one_graph():
    k, v = tokens(40, heads=1)
    cache = make("triton", heads=1)
    cache.append(k, v)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q):
        return 2 * cache.attend(q)

    assert torch.equal(step(query()), 2 * cache.attend(query()))


@pytest.mark.gpu
@pytest.mark.parametrize("tq", [1, 3])
def test_a_graph_replays_as_the_lengths_grow(tq):
    k, v = tokens(400 + 40 * tq, batch=2)
    eager, graphed = make("triton", batch=2), make("triton", batch=2)
    for cache in (eager, graphed):
        cache.append(k[:, :, :400], v[:, :, :400])
    graphed.reserve(40 * tq)
    new_k, new_v, q = k[:, :, 400 : 400 + tq].clone(), v[:, :, 400 : 400 + tq].clone(), query(tq, batch=2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile outside of the capture
        graphed.attend(q)
        warm = make("triton", batch=2)
        warm.append(new_k, new_v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.append(new_k, new_v)
        out = graphed.attend(q)
    for step in range(40):
        at = 400 + step * tq
        new_k.copy_(k[:, :, at : at + tq])
        new_v.copy_(v[:, :, at : at + tq])
        graph.replay()
        graphed.advance(tq)
        eager.append(new_k, new_v)
        assert torch.equal(out, eager.attend(q))
    assert graphed.lengths.tolist() == eager.lengths.tolist() == [400 + 40 * tq] * 2
    assert torch.equal(graphed.pool.base[graphed.table.pages(0)], eager.pool.base[eager.table.pages(0)])
