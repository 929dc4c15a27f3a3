"""Wrong arguments for `enable`, a `ThriftCache` and its files: an error that says so, and what there was goes on as before."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from support.thrift_caches import cache_for, enabled
from support.tiny_models import EXACT, WINDOW, close, tokens

transformers = pytest.importorskip("transformers", minversion="5.0")
thrift = pytest.importorskip("thrift_attn.transformers")
from thrift_attn.transformers import files  # noqa: E402
from thrift_attn.transformers.versions import cache_keyword  # noqa: E402


def run(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **{cache_keyword(model): cache}).logits


def filled(model: Any, length: int = 40) -> Any:
    cache = cache_for(model)
    run(model, tokens(2, length), cache)
    return cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
@pytest.mark.parametrize(
    "seqs", [None, "01", [0, 2], [-1, 0], [], torch.tensor([0.0, 1.0]), torch.tensor([True, False])]
)
def test_sequences_that_there_are_not_change_nothing(family: str, seqs: Any) -> None:
    _, model = enabled(family)
    cache, new = filled(model), tokens(2, 3)
    want = run(model, new, cache.fork())
    with pytest.raises((TypeError, ValueError), match=r"seq must be|beam_idx must be"):
        cache.reorder_cache(seqs)
    assert cache.is_intact
    assert torch.equal(run(model, new, cache), want)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_sequences_are_repeated_and_dropped_with_and_without_pages(family: str) -> None:
    _, model = enabled(family)
    new = tokens(2, 3)
    want = run(model, new, filled(model))
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    close(run(model, new.repeat_interleave(2, 0), cache), want.repeat_interleave(2, 0))
    cache = filled(model)
    cache.reorder_cache([1, 0])
    cache.batch_select_indices([0])
    close(run(model, new[1:], cache), want[1:])


def test_a_crop_that_a_window_has_forgotten_changes_nothing() -> None:
    _, model = enabled("gemma3")
    cache, new = filled(model, WINDOW + 10), tokens(2, 3)
    want = run(model, new, cache.fork())
    with pytest.raises(RuntimeError, match="past its window"):
        cache.crop(-5)
    with pytest.raises(TypeError, match=r"tokens_to_remove must be a whole number, got 1\.5"):
        cache.crop(1.5)
    assert torch.equal(run(model, new, cache), want)


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"num_key_value_heads": 4}])
def test_an_emptied_cache_takes_tokens_of_another_model(change: dict[str, Any]) -> None:
    _, model = enabled()
    _, other = enabled(**change)
    cache, ids = filled(model), tokens(2, 20)
    cache.reset()
    assert torch.equal(run(other, ids, cache), run(other, ids, cache_for(other)))


@pytest.mark.parametrize("name", ["max_tokens", "pool_tokens"])
@pytest.mark.parametrize("size", [1.5, True, "64"])
def test_sizes_are_whole_numbers(name: str, size: object) -> None:
    _, model = enabled()
    with pytest.raises(TypeError, match=f"{name} must be a whole number"):
        thrift.ThriftCache(model.config, **{"max_tokens": 64, name: size})


def test_what_is_computed_is_a_configuration() -> None:
    _, model = enabled()
    for name in ("decode", "prefill"):
        with pytest.raises(TypeError, match=f"{name} must be a ThriftConfig, got str"):
            thrift.ThriftCache(model.config, 64, **{name: "5%"})
    cache = cache_for(model)
    with pytest.raises(ValueError, match="runs layer -1"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), -1)
    with pytest.raises(ValueError, match=r"K must be a tensor \[B, Hkv, T, D\], got shape \[2, 1, 16\]"):
        cache.update(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16), 0)


def test_a_cache_without_pages_says_so() -> None:
    _, model = enabled("mistral-window")
    cache = filled(model)
    for ask in (lambda: cache.prefill_on(torch.device("cpu")), lambda: cache.tokens(0)):
        with pytest.raises(ValueError, match="no layer of full attention"):
            ask()


def test_copies_are_forks_and_nothing_is_pickled() -> None:
    _, model = enabled()
    cache = filled(model)
    other = copy.copy(cache)
    run(model, tokens(2, 3), other)
    assert (cache.get_seq_length(), other.get_seq_length()) == (40, 43)
    with pytest.raises(TypeError, match=r"save\(path\) and load\(path\)"):
        pickle.dumps(cache)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": None}, TypeError, "config must be a ThriftConfig, got NoneType"),
        ({"layers": [None]}, TypeError, "layers must be a mapping from layer_idx, or a function of it, got list"),
        ({"layers": lambda index: "5%"}, TypeError, "layer 0 must have a ThriftConfig or None, got str"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"stats": "yes"}, TypeError, "stats must be True or False, got 'yes'"),
    ],
)
def test_enable_refuses_before_it_changes_the_model(options: dict[str, Any], error: Any, message: str) -> None:
    plain, _ = enabled()
    with pytest.raises(error, match=message):
        thrift.enable(plain, **options)
    assert plain.config._attn_implementation == "eager"


def test_a_decoder_that_leaves_causality_to_eager_masks_is_refused() -> None:
    """BigBird-Pegasus: with no mask, which is how causality is told elsewhere, every token would see later ones."""
    shape = {"d_model": 64, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "vocab_size": 97}
    config = transformers.AutoConfig.for_model("bigbird_pegasus", **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotImplementedError, match="leaves it to a mask that only eager attention gets"):
        thrift.enable(model, EXACT)
    thrift.register()
    model.set_attn_implementation("thrift")
    with pytest.raises(NotImplementedError, match="use eager attention"), torch.no_grad():
        model(tokens(1, 9))


# -- files ------------------------------------------------------------------------------------------------------------


def test_places_that_there_are_not(tmp_path: Path) -> None:
    _, model = enabled()
    cache = filled(model)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cache.save(tmp_path / "no" / "cache")
    with pytest.raises(TypeError, match=r"str, bytes or os\.PathLike"):
        cache.save(None)
    cache.save(tmp_path / "cache")
    empty = cache_for(model)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        empty.load(tmp_path)
    for device in ("nonsense", "meta"):
        with pytest.raises(
            ValueError, match=f"device must be one that torch finds here, such as 'cpu', got '{device}'"
        ):
            empty.load(tmp_path / "cache", device)
    assert empty.load(tmp_path / "cache").get_seq_length() == 40


@pytest.mark.parametrize(
    ("described", "tensors"),
    [
        ([], {}),
        (None, {}),
        ({"decode": None}, {}),
        ({"decode": "x"}, {}),
        ({}, {"junk": torch.zeros(3)}),
        ({}, {"0.padding0": torch.zeros(2, 40)}),
        ({}, {"0.padding0": torch.ones(4, 40, dtype=torch.bool)}),
        ({}, {"0.padding1": torch.ones(2, 40, dtype=torch.bool)}),
        ({"layers": [{"slots": 40, "paddings": [5]}] * 2}, {}),
        ({"layers": [{"slots": 40, "paddings": ["x"]}] * 2}, {}),
        ({"layers": [{"slots": 40, "paddings": "x"}] * 2}, {}),
    ],
)
def test_a_file_with_other_contents_and_their_digest_is_refused(
    tmp_path: Path, described: Any, tensors: dict[str, torch.Tensor]
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    _, model = enabled()
    path, cache, mask = tmp_path / "cache", cache_for(model), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        model(tokens(2, 40), attention_mask=mask, **{cache_keyword(model): cache})
    cache.save(path)
    with safe_open(str(path), "pt") as file:
        about = json.loads(file.metadata()["thrift_cache"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    found |= tensors
    about = {**about, **described} if isinstance(described, dict) else described
    if isinstance(about, dict):
        about["digest"] = files._digest(about, found)
    save_file(found, path, metadata={"thrift_cache": json.dumps(about)})
    empty, ids = cache_for(model), tokens(2, 7)
    with pytest.raises(ValueError, match=r"damaged|of no layer|padding"):
        empty.load(path)
    assert torch.equal(run(model, ids, empty), run(model, ids, cache_for(model)))
