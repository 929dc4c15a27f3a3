"""Models, caches and files on two GPUs, neither of which needs to be the current one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from support.tiny_models import build, tokens
from thrift_attn import fraction
from thrift_attn.config import ThriftConfig

pytest.importorskip("transformers", minversion="5.0")
thrift = pytest.importorskip("thrift_attn.transformers")
from thrift_attn.transformers.decode_graph import DecodeGraph  # noqa: E402
from thrift_attn.transformers.generate import prefill  # noqa: E402
from thrift_attn.transformers.versions import cache_keyword  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
DECODE = ThriftConfig.for_cache(budget=fraction(0.3))


def model_on(device: str):
    model = build("llama", torch.float16, num_hidden_layers=4, head_dim=64).to(device)
    thrift.enable(model)
    return model


def cache_of(model):
    return thrift.ThriftCache(model.config, 512, decode=DECODE)


@torch.no_grad()
def test_two_gpus_replay_the_same_steps() -> None:
    """Two models, one a GPU, stepped in turns with GPU 0 current: the same logits, which change from step to step."""
    steps, seen = [], []
    for device in ("cuda:0", "cuda:1"):
        model = model_on(device)
        cache = cache_of(model)
        prefill(model, tokens(1, 200).to(device), cache)
        steps.append((device, DecodeGraph(model, cache)))
    new = tokens(1, 70, seed=3)
    for at in range(new.shape[1]):
        both = [step(new[:, at : at + 1].to(device)).clone().cpu() for device, step in steps]
        assert torch.equal(*both)
        seen.append(both[0])
    assert all(step.captured for _, step in steps)
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


@torch.no_grad()
def test_two_gpus_share_a_model_by_layers() -> None:
    """What ``device_map="auto"`` makes of a model: layers on either GPU answer as all on one."""
    accelerate = pytest.importorskip("accelerate")
    alone, shared = model_on("cuda:0"), model_on("cpu")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{at}": int(at > 1) for at in range(4)}
    shared = accelerate.dispatch_model(shared, places)
    ids = tokens(1, 200).cuda()
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    want = alone.generate(ids, **{cache_keyword(alone): cache_of(alone)}, **options)
    cache = cache_of(shared)
    assert torch.equal(shared.generate(ids, **{cache_keyword(shared): cache}, **options), want)
    assert {layer.paged.device.index for layer in cache.paged_layers} == {0, 1}
    with pytest.raises(NotImplementedError, match="one device"):
        DecodeGraph(shared, cache)


@torch.no_grad()
def test_two_gpus_exchange_files_and_forks(tmp_path: Path) -> None:
    """What one GPU saved another loads, and both go on alike."""
    first, second = model_on("cuda:0"), model_on("cuda:1")
    cache, loaded = cache_of(first), cache_of(second)
    ids, new = tokens(1, 200), tokens(1, 30, seed=3)
    prefill(first, ids.cuda(), cache)
    cache.save(tmp_path / "prefix.safetensors")
    loaded.load(tmp_path / "prefix.safetensors", "cuda:1")
    whole = torch.cat([ids, new], 1)
    want = prefill(first, whole.cuda(), cache).cpu()
    for ours in (loaded.fork(), loaded):
        assert {layer.paged.device.index for layer in ours.paged_layers} == {1}
        assert torch.equal(prefill(second, whole.to("cuda:1"), ours).cpu(), want)
