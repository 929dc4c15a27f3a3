"""Families whose layers are not all full attention: sinks, windows, states of linear attention, shared K and V."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    eager_mask,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import thrift_attn.transformers as thrift
from support.tiny_models import EXACT, WINDOW, chunked, close, padded, served, tokens
from support.tiny_models import build as tiny
from thrift_attn import ThriftConfig, fraction
from thrift_attn.transformers import attention_function, masks
from thrift_attn.transformers.dense import with_sinks
from thrift_attn.transformers.thrift_layer import ThriftLayer
from thrift_attn.transformers.versions import cache_keyword
from thrift_lab import model_table
from thrift_lab.families import FAMILIES

EXACT_CACHE = ThriftConfig(compute="16bit", promoted_storage="16bit", budget=fraction(1.0))
HYBRIDS = ["qwen3_next", "jamba", "bamba", "lfm2", "falcon_h1", "nemotron_h"]
windowed = pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gemma3", "gpt-oss"])


def build(kind: str) -> Any:
    (family,) = [one for one in FAMILIES if one.name == kind]
    if not model_table.known(family):
        pytest.skip(f"transformers has no {kind}")
    return model_table.build(family)


def cache_of(model: Any) -> Any:
    try:
        return thrift.ThriftCache(model.config, 512, decode=EXACT_CACHE)
    except NotImplementedError as error:
        pytest.skip(str(error))


def step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    return model(ids, **{cache_keyword(model): cache}, use_cache=True).logits


# -- learned sinks ----------------------------------------------------------------------------------------------------


def test_a_sink_is_one_more_logit_of_the_softmax() -> None:
    logits, v, sinks = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 7, 4), torch.randn(3)
    logits[0, 1, 2] = -torch.inf  # a padded query
    p = torch.cat([logits, sinks[:, None, None].expand(2, 3, 5, 1)], -1).softmax(-1)[..., :7]
    out = logits.softmax(-1).nan_to_num() @ v
    close(with_sinks(out, logits.logsumexp(-1), sinks), p @ v, 1e-6)


@pytest.mark.parametrize("lengths", [[150, 150], [150, 61]])
@torch.no_grad()
def test_layers_with_sinks_are_served_with_a_cache(lengths: list[int]) -> None:
    model = tiny("gpt-oss")
    ids, mask, _ = padded(lengths, "left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    thrift.enable(model, EXACT)
    assert torch.equal(model.generate(ids, **options, **{cache_keyword(model): cache_of(model)}), want)
    assert served(model) == ["eager", "thrift"]


# -- sliding windows --------------------------------------------------------------------------------------------------


def test_windows_are_known_from_the_mask_function() -> None:
    window = sliding_window_causal_mask_function(WINDOW)
    chunk = and_masks(chunked_overlay(WINDOW, torch.zeros(1)), causal_mask_function)
    assert masks.window_of(window) == WINDOW
    others = [causal_mask_function, chunk, or_masks(window, chunk), and_masks(window, chunk), sliding_window_overlay(8)]
    assert [masks.window_of(one) for one in others] == [None] * len(others)


@windowed
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_windows_through_thrift_are_eager_attention(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_function, "_window_pays", lambda query, key, window: window is not None)
    model = tiny(family)
    ids, mask, positions = padded([150, 61, 97], side)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    want = model(**inputs).logits
    thrift.enable(model, ThriftConfig(budget=fraction(1.0)))
    close(model(**inputs).logits[mask.bool()], want[mask.bool()])
    assert set(served(model)) == {"thrift"}
    assert thrift.report(model)[0].reason == f"sliding window of {WINDOW}"


@windowed
@torch.no_grad()
def test_windows_through_thrift_with_caches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(family), tokens(2, 150)
    want = model(ids).logits
    monkeypatch.setattr(attention_function, "_window_pays", lambda query, key, window: window is not None)
    thrift.enable(model, EXACT)
    close(chunked(model, ids, [60, 1, 20, 69]), want)
    cache = cache_of(model)
    close(torch.cat([step(model, part, cache) for part in ids.split([60, 1, 20, 69], 1)], 1), want)
    assert set(served(model)) == {"thrift"}


@torch.no_grad()
def test_windows_are_exact_at_any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_function, "_window_pays", lambda query, key, window: window is not None)
    model, ids = tiny("mistral-window"), tokens(1, 300)
    want = model(ids).logits
    thrift.enable(model, ThriftConfig(budget=fraction(0.0)))
    close(model(ids).logits, want)


@pytest.mark.parametrize(
    ("device", "queries", "keys", "pays"),
    [
        ("cuda", 4096, 4096, True),
        ("cuda", 64, 4096, True),
        ("cuda", 16, 4096, False),
        ("cuda", 2048, 2048, False),
        ("cpu", 4096, 4096, False),
    ],
)
def test_the_rule_for_windows(device: str, queries: int, keys: int, pays: bool) -> None:
    query = SimpleNamespace(is_cuda=device == "cuda", shape=(1, 8, queries, 64))
    key: Any = SimpleNamespace(shape=(1, 2, keys, 64))
    assert attention_function._window_pays(query, key, 1024) is pays  # type: ignore[arg-type]
    assert not attention_function._window_pays(query, key, None)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_window_mask_that_the_model_has_changed_goes_to_sdpa() -> None:
    where: dict[str, Any] = {"q_length": 90, "q_offset": 0}
    if "cache_position" in inspect.signature(eager_mask).parameters:  # transformers before 5.4
        where = {"cache_position": torch.arange(90)}
    seen = sliding_window_causal_mask_function(WINDOW)
    mask = masks.thrift_mask(1, kv_length=90, mask_function=seen, dtype=torch.float32, **where)
    assert masks.plain_mask(mask) == (None, WINDOW)
    assert mask is not None
    mask[..., 3] = torch.finfo(mask.dtype).min
    assert masks.plain_mask(mask) == (mask, None)


# -- states of linear attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HYBRIDS)
@torch.no_grad()
def test_hybrids_have_pages_for_their_attention(kind: str) -> None:
    model = build(kind)
    thrift.enable(model, EXACT)
    cache = cache_of(model)
    step(model, tokens(2, 70), cache)
    assert cache.get_seq_length() == 70
    assert [row.served_by for row in thrift.report(model)] == ["thrift"] * len(cache.paged_layers)
    assert cache.nbytes() > sum(layer.paged.nbytes() for layer in cache.paged_layers)  # states count


@pytest.mark.parametrize("kind", HYBRIDS)
@torch.no_grad()
def test_forks_and_copied_rows_of_hybrids_go_their_own_way(kind: str) -> None:
    model = build(kind)
    thrift.enable(model, EXACT)
    ids, first, second = tokens(2, 70), tokens(2, 1, seed=2), tokens(2, 1, seed=3)
    caches = [cache_of(model) for _ in range(2)]
    for cache in caches:
        step(model, ids, cache)
    fork = caches[0].fork()
    want = [step(model, new, cache) for new, cache in zip((first, second), caches, strict=True)]
    close(step(model, second, fork), want[1])
    again = cache_of(model)
    step(model, ids, again)
    again.batch_repeat_interleave(2)
    close(step(model, first.repeat_interleave(2, 0), again), want[0].repeat_interleave(2, 0))
    again.reset()
    step(model, ids, again)
    close(step(model, first, again), want[0])


@pytest.mark.parametrize("where", [(ThriftLayer, "update"), (ThriftLayer, "attend")])
@pytest.mark.parametrize("kind", HYBRIDS)
@torch.no_grad()
def test_an_interrupted_forward_of_a_hybrid_is_noticed(
    kind: str, where: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    thrift.enable(model, EXACT)
    cache, ids = cache_of(model), tokens(1, 30)
    step(model, ids, cache)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(model, tokens(1, 1), cache)
    with pytest.raises(RuntimeError, match="interrupted"):
        step(model, tokens(1, 1), cache)
    with pytest.raises(RuntimeError, match="interrupted"):
        step(model, tokens(1, 1), cache)
    cache.reset()
    step(model, ids, cache)


@torch.no_grad()
def test_what_hybrids_cannot_do_is_refused(tmp_path: Any) -> None:
    model = build("lfm2")
    thrift.enable(model, EXACT)
    cache = cache_of(model)
    step(model, tokens(1, 70), cache)
    with pytest.raises(RuntimeError, match="taken back"):
        cache.crop(-1)
    assert cache.get_seq_length() == 70
    with pytest.raises(NotImplementedError, match="layer 0"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["minimax", "recurrent_gemma", "deepseek_v3"])
def test_caches_that_cannot_be_are_refused_when_they_are_made(kind: str) -> None:
    with pytest.raises(NotImplementedError, match=r"MiniMax|RecurrentGemma|Deepseek"):
        thrift.ThriftCache(build(kind).config, 512)


@torch.no_grad()
def test_a_mask_for_another_number_of_slots_is_refused() -> None:
    model = build("minimax")
    ids, mask, _ = padded([70, 44], "left")
    thrift.enable(model, EXACT)
    with pytest.raises(NotImplementedError, match="1 key slots, the layer attends to 71"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)


@torch.no_grad()
def test_heads_too_large_for_the_kernels_go_to_sdpa() -> None:
    model = build("gemma4_text, head dim 512, shared K and V")
    thrift.enable(model, EXACT)
    cache = cache_of(model)
    step(model, tokens(1, 70), cache)
    assert not cache.paged_layers
    assert any("head dim 512" in row.reason for row in thrift.report(model))
