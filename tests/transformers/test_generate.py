"""Decode steps of a model: on a GPU as a CUDA graph, on a CPU one by one; the same tokens either way."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from support.thrift_caches import cache_for, enabled
from support.tiny_models import build, close, padded, tokens
from thrift_attn import fraction
from thrift_attn.config import ThriftConfig

transformers = pytest.importorskip("transformers", minversion="5.0")
thrift = pytest.importorskip("thrift_attn.transformers")
from thrift_attn.transformers.decode_graph import DecodeGraph  # noqa: E402
from thrift_attn.transformers.generate import generate, prefill, stream  # noqa: E402

CUDA = torch.cuda.is_available()
gpu = pytest.mark.gpu


def test_stream_gives_the_tokens_of_generate() -> None:
    plain, model = enabled()
    ids, mask, _ = padded([70, 9, 130], "left")
    want = plain.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 130:]
    for chunk in (None, 48):
        cache = cache_for(model)
        got = list(stream(model, ids, cache, max_new_tokens=12, attention_mask=mask, chunk=chunk))
        assert torch.equal(torch.stack(got, 1), want)
        assert [cache.tokens(row) for row in range(3)] == [81, 20, 141]


@pytest.mark.parametrize("sample", [False, True])
def test_custom_generate(sample: bool) -> None:
    plain, model = enabled(eos_token_id=5, pad_token_id=0)
    ids, mask, _ = padded([30, 9], "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": sample, "temperature": 2.0}
    options |= {"repetition_penalty": 1.3, "top_k": 20}
    torch.manual_seed(0)
    want = plain.generate(ids, **options)
    torch.manual_seed(0)
    streamer = Streamer()
    got = model.generate(
        ids, past_key_values=cache_for(model), custom_generate=generate, token_streamer=streamer, **options
    )
    assert torch.equal(got, want)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.seen, 1), want)


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value if value.ndim == 2 else value[:, None])

    def end(self) -> None:
        self.ended = True


def test_prompt_that_the_cache_holds_in_part() -> None:
    plain, model = enabled()
    ids = tokens(1, 100)
    cache = cache_for(model)
    prefill(model, ids[:, :60], cache)
    with torch.no_grad():
        close(prefill(model, ids, cache, chunk=30), plain(ids).logits[:, -1])
    with pytest.raises(ValueError, match="no more than"):
        prefill(model, ids, cache)
    with pytest.raises(ValueError, match="chunk"):
        prefill(model, tokens(1, 120), cache, chunk=0)


@torch.no_grad()
def test_steps_follow_a_cropped_cache() -> None:
    plain, model = enabled()
    ids = tokens(2, 70)
    cache = cache_for(model)
    prefill(model, ids[:, :60], cache)
    step = DecodeGraph(model, cache)
    for at in range(60, 70):
        step(ids[:, at : at + 1])
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    other = ids[[1, 0]]
    for at in range(66, 70):
        got = step(other[:, at : at + 1])
    close(got, plain(other).logits[:, -1])


def test_what_a_graph_needs_is_checked() -> None:
    _, model = enabled()
    with pytest.raises(ValueError, match="empty"):
        DecodeGraph(model, cache_for(model))
    with pytest.raises(ValueError, match="position"):
        DecodeGraph(model, transformers.DynamicCache(config=model.config))
    hybrid = enabled("gemma3")[1]
    with pytest.raises(NotImplementedError, match="sliding"):
        DecodeGraph(hybrid, cache_for(hybrid))
    cache = cache_for(model)
    prefill(model, tokens(2, 5), cache)
    with pytest.raises(ValueError, match="shape"):
        DecodeGraph(model, cache)(tokens(1, 1))
    with pytest.raises(TypeError, match="ThriftCache"):
        model.generate(tokens(1, 5), custom_generate=generate, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="nothing else"):
        model.generate(
            tokens(1, 5), past_key_values=cache_for(model), custom_generate=generate, return_dict_in_generate=True
        )


def test_pages_run_out_before_a_step() -> None:
    _, model = enabled()
    ids = tokens(1, 120)
    cache = cache_for(model, 256, pool_tokens=64)
    prefill(model, ids, cache)
    step = DecodeGraph(model, cache)
    for _ in range(7):
        step(ids[:, :1])
    with pytest.raises(RuntimeError, match="exhausted"):
        step(ids[:, :1])
    assert cache.get_seq_length() == 127


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(**options: Any) -> Any:
    return build("llama", dtype=torch.bfloat16, attn="sdpa", head_dim=64, **options).cuda()


@gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA graphs")
@torch.no_grad()
def test_replayed_steps_equal_launched_ones() -> None:
    model = on_gpu()
    thrift.enable(model)
    ids, mask, _ = (x.cuda() for x in padded([300, 61], "left"))
    new = tokens(2, 80, seed=3).cuda()
    caches = [
        thrift.ThriftCache(model.config, 512, decode=ThriftConfig.for_cache(budget=fraction(0.3))) for _ in range(2)
    ]
    for cache in caches:
        prefill(model, ids, cache, attention_mask=mask)
    replayed, launched = DecodeGraph(model, caches[0]), DecodeGraph(model, caches[1], warmup=1000)
    for at in range(new.shape[1]):  # past the end of a block
        got, want = (step(new[:, at : at + 1]).clone() for step in (replayed, launched))
        assert torch.equal(got, want)
    assert replayed.captured
    assert not launched.captured
    assert [caches[0].tokens(row) for row in range(2)] == [380, 141]
    for one, other in zip(caches[0].paged_layers, caches[1].paged_layers, strict=True):
        assert one.paged.lengths.tolist() == [380, 141]
        for row in range(2):
            assert all(torch.equal(a, b) for a, b in zip(one.paged.read(row), other.paged.read(row), strict=True))


@gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA graphs")
@torch.no_grad()
def test_a_static_cache_can_be_captured_as_well() -> None:
    model = on_gpu()
    if "max_cache_len" not in inspect.signature(transformers.StaticCache).parameters:
        pytest.skip("another StaticCache")
    ids, new = tokens(1, 100).cuda(), tokens(1, 20, seed=3).cuda()
    cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    prefill(model, ids, cache)
    step = DecodeGraph(model, cache, position=100)
    for at in range(20):
        got = step(new[:, at : at + 1])
    want = model(torch.cat([ids, new], 1)).logits[:, -1]
    assert (got.float() - want.float()).norm() < 0.03 * want.float().norm()


@gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@torch.no_grad()
def test_chunks_on_a_gpu_equal_one_go() -> None:
    model = on_gpu()
    thrift.enable(model)
    ids = tokens(2, 400).cuda()
    want, got = (
        prefill(model, ids, thrift.ThriftCache(model.config, 512), chunk=chunk).float() for chunk in (None, 100)
    )
    assert (got - want).norm() < 0.1 * want.norm()
