"""attn_implementation="thrift" on tiny random models, against eager attention of transformers."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.tiny_models import (
    EXACT,
    FAMILIES,
    HEAD,
    SHAPE,
    SPARSE_TYPES,
    WINDOW,
    build,
    causal_module,
    chunked,
    close,
    padded,
    served,
    tokens,
)
from thrift_attn import BLOCK, Budget, ThriftConfig, fraction, top_k

transformers = pytest.importorskip("transformers", minversion="5.0")
thrift = pytest.importorskip("thrift_attn.transformers")
from thrift_attn.transformers.attention_function import thrift_attention  # noqa: E402

families = pytest.mark.parametrize("family", FAMILIES)


# -- exact at budget 1 ------------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_budget_1_is_eager_attention(family: str) -> None:
    model, ids = build(family), tokens(2, 150)
    want = model(ids).logits
    thrift.enable(model, EXACT)
    close(model(ids).logits, want)
    assert tuple(served(model)) == FAMILIES[family][2]


@families
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch_is_eager_attention(family: str, side: str) -> None:
    model = build(family)
    ids, mask, positions = padded([150, 61, 97], side)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    want = model(**inputs).logits
    thrift.enable(model, EXACT)
    close(model(**inputs).logits[mask.bool()], want[mask.bool()])
    assert tuple(served(model)) == FAMILIES[family][2]


@families
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate_is_eager_generate(family: str, cache: str) -> None:
    model = build(family)  # not float64: there, transformers' eager mask overflows and padded rows are NaN
    ids, mask, _ = padded([70, 9, 44], "left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    want = model.generate(ids, **options)
    thrift.enable(model, EXACT)
    got = model.generate(ids, **options)
    assert torch.equal(got, want)
    assert len(want[:, 70:].unique()) > 4  # not one token all over
    assert tuple(served(model)) == FAMILIES[family][2]


@families
@torch.no_grad()
def test_chunked_prefill_is_eager_prefill(family: str) -> None:
    model, ids = build(family), tokens(2, 150)
    want = model(ids).logits
    thrift.enable(model, EXACT)
    close(chunked(model, ids, [60, 1, 20, 69]), want)


@torch.no_grad()
def test_beam_search_is_eager_beam_search() -> None:
    model = build("llama")
    ids, mask, _ = padded([40, 23], "left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    want = model.generate(ids, **options)
    thrift.enable(model, EXACT)
    assert torch.equal(model.generate(ids, **options), want)


# -- the same numbers in every form, at small budgets -----------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@torch.no_grad()
def test_padding_changes_nothing(family: str, side: str) -> None:
    lengths = [300, 129, 202]
    ids, mask, positions = padded(lengths, side)
    model = build(family, torch.float64)
    thrift.enable(model, ThriftConfig(budget=fraction(0.3)))
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        close(got[row, mask[row].bool()], model(tokens(1, length, seed=row)).logits[0], 1e-9)


@torch.no_grad()
def test_padding_changes_nothing_when_decoding() -> None:
    lengths = [200, 77, 140]
    ids, mask, _ = padded(lengths, "left")
    model = build("llama", torch.float64)
    thrift.enable(model, ThriftConfig(budget=fraction(0.3)))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = torch.stack(model.generate(ids, attention_mask=mask, **options).logits, 1)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens(1, length, seed=row), **options).logits
        close(together[row], torch.cat(alone), 1e-9)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
@torch.no_grad()
def test_static_cache_changes_nothing(family: str) -> None:
    model, ids = build(family, torch.float64), tokens(2, 150)
    thrift.enable(model, ThriftConfig(budget=fraction(0.3)))
    logits = []
    for cache in (
        transformers.DynamicCache(config=model.config),
        transformers.StaticCache(config=model.config, max_cache_len=230),
    ):
        parts = []
        for start, chunk in zip((0, 130, 149), ids.split([130, 19, 1], dim=1), strict=True):
            position = torch.arange(start, start + chunk.shape[1])
            parts.append(model(chunk, past_key_values=cache, use_cache=True, cache_position=position).logits)
        logits.append(torch.cat(parts, 1))
    close(logits[1], logits[0], 1e-9)


@pytest.mark.parametrize("budget", [fraction(0), top_k(2)])
@torch.no_grad()
def test_chunks_of_whole_blocks_change_nothing(budget: Budget) -> None:
    model, ids = build("llama", torch.float64), tokens(1, 5 * BLOCK)
    thrift.enable(model, ThriftConfig(budget=budget, center="block"))  # a mean query would be that of each chunk
    want = model(ids).logits
    close(chunked(model, ids, [2 * BLOCK, BLOCK, 2 * BLOCK]), want, 1e-9)


@torch.no_grad()
def test_low_precision_is_really_used() -> None:
    model, ids = build("llama"), tokens(1, 200)
    want = model(ids).logits
    thrift.enable(model, ThriftConfig(budget=fraction(0)))
    assert float((model(ids).logits - want).abs().max() / want.abs().max()) > 1e-3


@torch.no_grad()
def test_padded_queries_give_0() -> None:
    ids, mask, _ = padded([90, 40], "left")
    model = build("llama")
    thrift.enable(model)
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, attention_mask=mask)
    assert not seen[0][~mask.bool()].any()
    assert seen[0][mask.bool()].any(-1).all()


@pytest.mark.parametrize("new", [1, 20, 90])
@torch.no_grad()
def test_padded_queries_after_the_tokens_give_0(new: int) -> None:
    _, mask, _ = padded([90, 40], "right")
    q, k = torch.randn(2, 4, new, 16), torch.randn(2, 2, 90, 16)
    out, _ = thrift_attention(causal_module(), q, k, k, mask.bool())
    real = mask[:, -new:].bool()
    assert out.shape == (2, new, 4, 16)
    assert not out[~real].any()
    assert out[real].any(-1).all()


@torch.no_grad()
def test_a_row_without_tokens_is_finite() -> None:
    ids, mask, _ = padded([90, 40], "left")
    mask[1] = 0
    model = build("llama")
    thrift.enable(model)
    assert model(ids, attention_mask=mask).logits.isfinite().all()


# -- the rule ---------------------------------------------------------------------------------------------------------


def off_rule_inputs(case: str) -> dict[str, Any]:
    ids, mask, positions = padded([90, 90], "left")
    if case == "holes":
        mask[0, 20:30] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if case == "packed":
        positions = torch.cat([torch.arange(50), torch.arange(40)]).expand(2, -1)
        return {"input_ids": ids, "position_ids": positions, "use_cache": False}
    allowed = torch.ones(90, 90, dtype=torch.bool).tril()
    allowed[:30, :30] = True  # prefix-LM
    if case == "bool 4D":
        return {"input_ids": ids, "attention_mask": allowed[None, None].expand(2, 1, -1, -1)}
    return {"input_ids": ids, "attention_mask": torch.where(allowed, 0.0, -1e9)[None, None].expand(2, 1, -1, -1)}


@pytest.mark.parametrize("case", ["holes", "packed", "float 4D"])
@torch.no_grad()
def test_other_masks_go_to_sdpa(case: str) -> None:
    model, inputs = build("llama"), off_rule_inputs(case)
    want = model(**inputs).logits
    thrift.enable(model, EXACT)
    got = model(**inputs).logits
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if case == "holes":
        real = inputs["attention_mask"].bool()
    close(got[real], want[real])
    assert served(model) == ["sdpa", "sdpa"]
    assert "mask" in thrift.report(model)[0].reason


@torch.no_grad()
def test_bool_4d_masks_go_to_sdpa() -> None:
    model, inputs = build("llama", attn="sdpa"), off_rule_inputs("bool 4D")
    want = model(**inputs).logits
    thrift.enable(model, EXACT)
    close(model(**inputs).logits, want)
    assert served(model) == ["sdpa", "sdpa"]


@torch.no_grad()
def test_one_model_may_take_both_paths() -> None:
    model = build("llama")
    thrift.enable(model)
    model(tokens(2, 90))
    model(**off_rule_inputs("holes"))
    rows = thrift.report(model)
    assert [(row.layer, row.served_by, row.calls) for row in rows] == [
        (0, "thrift", 1),
        (0, "sdpa", 1),
        (1, "thrift", 1),
        (1, "sdpa", 1),
    ]


@torch.no_grad()
def test_encoders_go_to_sdpa() -> None:
    shape = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.BertConfig(**shape, num_hidden_layers=1)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    ids, mask, _ = padded([50, 20], "right")
    want = model(ids, attention_mask=mask).last_hidden_state
    thrift.enable(model)
    close(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], want[mask.bool()])
    assert [(row.served_by, row.reason) for row in thrift.report(model)] == [("sdpa", "not causal")]


@torch.no_grad()
def test_dropout_in_training_goes_to_sdpa() -> None:
    model = build("llama", attention_dropout=0.5).train()
    thrift.enable(model)
    model(tokens(1, 40))
    assert served(model) == ["sdpa", "sdpa"]
    assert thrift.report(model)[0].reason == "dropout in training"
    model.eval()
    model(tokens(1, 40))
    assert served(model) == ["thrift", "sdpa"] * 2 or served(model) == ["sdpa", "thrift"] * 2


@pytest.mark.parametrize("lengths", [[150, 150], [150, 61]])
@torch.no_grad()
def test_layers_can_be_left_to_sdpa(lengths: list[int]) -> None:
    model = build("llama")
    ids, mask, positions = padded(lengths, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    want = model(**inputs).logits[mask.bool()]
    thrift.enable(model, EXACT, layers={0: None})
    close(model(**inputs).logits[mask.bool()], want)
    assert served(model) == ["sdpa", "thrift"]
    assert thrift.report(model)[0].reason == "left out by enable(layers=...)"
    whole = model(ids).logits
    close(chunked(model, ids, [60, 1, 89]), whole)
    cache = transformers.StaticCache(config=model.config, max_cache_len=200)
    close(model(**inputs, past_key_values=cache, cache_position=torch.arange(150)).logits[mask.bool()], want)


# -- configuration and report -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_may_differ() -> None:
    model, ids = build("llama"), tokens(1, 300)
    thrift.enable(model, ThriftConfig(budget=fraction(0)), layers={1: EXACT})
    model(ids)
    assert [row.stats.share for row in thrift.report(model)] == [0.0, 1.0]
    thrift.enable(model, layers=lambda index: EXACT if index == 0 else None)
    model(ids)
    assert [(row.served_by, row.stats.share) for row in thrift.report(model)] == [("thrift", 1.0), ("sdpa", 0.0)]


@torch.no_grad()
def test_counting_is_optional() -> None:
    model, ids = build("llama"), tokens(1, 150)
    thrift.enable(model, ThriftConfig(budget=fraction(0.5)), stats=False)
    plain = model(ids).logits
    assert thrift.report(model).stats.visible == 0
    assert "%" not in str(thrift.report(model))
    thrift.enable(model, ThriftConfig(budget=fraction(0.5)), stats=True)
    counted = model(ids).logits
    assert torch.equal(plain, counted)
    assert thrift.report(model).stats.promoted > 0


@torch.no_grad()
def test_report_accumulates_since_enable() -> None:
    model, ids = build("gemma3"), tokens(1, 500)
    thrift.enable(model, ThriftConfig(budget=fraction(0.25)))
    assert [(row.layer, row.served_by, row.calls, row.reason) for row in thrift.report(model)] == [
        (0, None, 0, "not called yet"),
        (1, None, 0, "not called yet"),
    ]
    model(ids)
    once = thrift.report(model)
    model(ids)
    twice = thrift.report(model)
    window, full = twice
    assert (window.layer, window.name, window.served_by) == (0, "model.layers.0.self_attn", "sdpa")
    assert window.reason == f"sliding window of {WINDOW}"
    assert (full.layer, full.name, full.served_by, full.reason) == (1, "model.layers.1.self_attn", "thrift", "causal")
    assert (full.calls, full.stats.visible) == (2, 2 * once[1].stats.visible)
    assert full.stats.share == pytest.approx(0.25, abs=0.02)
    assert 0 < full.stats.high_mass < 1
    assert twice.stats == full.stats
    table = str(twice).splitlines()
    assert len(table) == 3
    assert table[0].split() == ["layer", "module", "served", "by", "calls", "promoted", "high", "mass", "reason"]
    assert f"{full.stats.share:.2%}" in table[2]
    thrift.enable(model)
    assert thrift.report(model).stats.visible == 0


@torch.no_grad()
def test_report_labels_what_is_exact_because_it_is_short() -> None:
    plain = build("llama", attn="sdpa")
    model = copy.deepcopy(plain)
    thrift.enable(model, ThriftConfig(budget=fraction(0), exact_below=200))
    short, long = tokens(1, 150), tokens(1, 250)
    close(model(short).logits, plain(short).logits)
    assert float((model(long).logits - plain(long).logits).abs().max()) > 1e-3
    rows = [(row.layer, row.served_by, row.reason) for row in thrift.report(model)]
    exact = "causal; exact by SDPA: fewer than 200 keys"
    assert rows == [(0, "exact", exact), (0, "thrift", "causal"), (1, "exact", exact), (1, "thrift", "causal")]
    stats = thrift.report(model)[0].stats
    assert stats.exact == stats.visible > 0
    ids, mask, positions = padded([250, 150], "left")
    thrift.enable(model, ThriftConfig(budget=fraction(0), exact_below=200))
    found = model(ids, attention_mask=mask, position_ids=positions).logits[1, -150:]
    close(found, plain(ids, attention_mask=mask, position_ids=positions).logits[1, -150:])
    assert thrift.report(model)[0].reason == "causal; short rows exactly"


@families
@torch.no_grad()
def test_disable_restores(family: str) -> None:
    model, ids = build(family), tokens(1, 100)
    want, compile_flag = model(ids).logits, model.generation_config.disable_compile
    thrift.enable(model)
    thrift.enable(model, EXACT)
    assert model.config._attn_implementation == "thrift"
    assert model.generation_config.disable_compile is True
    thrift.disable(model)
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.disable_compile == compile_flag
    assert torch.equal(model(ids).logits, want)
    assert not any(name.startswith("_thrift") for module in model.modules() for name in vars(module))


@torch.no_grad()
def test_sub_models_are_switched_and_restored() -> None:
    text = {**SHAPE, **HEAD, **SPARSE_TYPES}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    kinds = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=kinds).eval()
    ids = tokens(1, 100)
    want = model(ids).logits
    thrift.enable(model, EXACT)
    close(model(ids).logits, want)
    rows = {row.name: row.served_by for row in thrift.report(model)}
    assert [by for name, by in rows.items() if "language" in name] == ["sdpa", "thrift"]
    assert all(by is None for name, by in rows.items() if "vision" in name)
    thrift.disable(model)
    sub = model.config.text_config, model.config.vision_config
    assert [c._attn_implementation for c in (model.config, *sub)] == ["sdpa", "eager", "sdpa"]


@torch.no_grad()
def test_loading_with_the_name(tmp_path: Any) -> None:
    thrift.register()
    thrift.register()
    model, ids = build("llama"), tokens(1, 200)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="thrift").eval()
    thrift.enable(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert thrift.report(loaded) == thrift.report(model)
    assert served(build("llama", attn="thrift")) == [None, None]
    thrift.disable(loaded)
    assert loaded.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_copies_keep_their_configuration() -> None:
    model = build("llama")
    thrift.enable(model, EXACT)
    twin = copy.deepcopy(model)
    twin(tokens(1, 200))
    assert thrift.report(twin).stats.share == 1.0
    assert thrift.report(model).stats.visible == 0


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_of_the_user() -> None:
    model: Any = build("llama")
    for call in (thrift.enable, thrift.disable, thrift.report):
        with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
            call(nn.Linear(2, 2))
    for call in (thrift.disable, thrift.report):
        with pytest.raises(ValueError, match="does not use thrift attention but 'eager'"):
            call(model)
    with pytest.raises(ValueError, match=r"layers of the model, 0 to 1, got \[2, 7\]"):
        thrift.enable(model, layers={2: EXACT, 7: None})
    with pytest.raises(TypeError, match="config must be a ThriftConfig, got str"):
        thrift.enable(model, "paper")
    with pytest.raises(TypeError, match="layer 0 must have a ThriftConfig or None, got float"):
        thrift.enable(model, layers=lambda index: 0.05)
    assert model.config._attn_implementation == "eager"  # nothing half done


def test_gradients_are_refused() -> None:
    model = build("llama")
    thrift.enable(model)
    with pytest.raises(NotImplementedError, match="inference only"):
        model(tokens(1, 20))


@torch.no_grad()
def test_errors_of_a_call() -> None:
    model, ids = build("llama"), tokens(1, 20)
    thrift.enable(model)
    with pytest.raises(NotImplementedError, match="no attention weights"):
        model(ids, output_attentions=True)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cached and new tokens, 25 positions, got 5"):
        model(tokens(1, 5), past_key_values=cache, attention_mask=torch.ones(1, 5))


@torch.no_grad()
def test_unknown_tensors_are_refused() -> None:
    module = causal_module()
    q = torch.randn(1, 2, 8, 16)
    for name in ("position_bias", "cu_seq_lens_q"):
        with pytest.raises(NotImplementedError, match=f"what Module passes to its attention: {name}"):
            thrift_attention(module, q, q, q, None, **{name: torch.zeros(1)})
    with pytest.raises(NotImplementedError, match="4D mask"):
        thrift_attention(module, q, q, q, None, indices=torch.zeros(1, 8, 2, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="continuous batching"):
        thrift_attention(module, q, q, q, None, cache=SimpleNamespace())
    with pytest.raises(NotImplementedError, match="2 or 4 dimensions, got SimpleNamespace"):
        thrift_attention(module, q, q, q, SimpleNamespace(shape=(1, 1, 8, 8)))
    with pytest.raises(ValueError, match="does not fit"):
        thrift_attention(module, q, q, q, torch.ones(1, 9, dtype=torch.bool))


@torch.no_grad()
def test_values_of_another_head_dim_go_to_sdpa() -> None:
    module = causal_module()
    q, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 32)
    out, weights = thrift_attention(module, q, q, v, None)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)
    assert weights is None
    close(out, want.transpose(1, 2))
