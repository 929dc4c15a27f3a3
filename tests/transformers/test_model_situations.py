"""What users do with models and caches beside the plain case: the result is right, or an error says what to do."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from support.thrift_caches import cache_for, enabled
from support.tiny_models import EXACT, HEAD, SHAPE, close, served, tokens
from thrift_attn import ThriftConfig, fraction, top_k

transformers = pytest.importorskip("transformers", minversion="5.0")
thrift = pytest.importorskip("thrift_attn.transformers")
from thrift_attn.transformers.decode_graph import DecodeGraph  # noqa: E402
from thrift_attn.transformers.generate import generate, prefill  # noqa: E402
from thrift_attn.transformers.masks import plain_mask, thrift_mask  # noqa: E402
from thrift_attn.transformers.versions import RANGE, SUPPORTED, VERSION, cache_keyword  # noqa: E402

MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
}


def model_of(kind: str, **changes: Any) -> Any:
    """A tiny random model of a family, with SDPA."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **HEAD, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    return {cache_keyword(model): cache}


# -- masks that a model asks for --------------------------------------------------------------------------------------


@pytest.mark.skipif(VERSION < (5, 10), reason="this Doge has no mask with SDPA either")
@torch.no_grad()
def test_a_model_that_builds_on_its_mask_stays_causal() -> None:
    model, ids = model_of("doge"), tokens(1, 150)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 90
    want = model(ids, use_cache=False).logits
    thrift.enable(model, EXACT)
    got = model(ids, use_cache=False).logits
    assert torch.equal(got[:, :-1], model(other, use_cache=False).logits[:, :-1])
    close(got, want)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
@torch.no_grad()
def test_an_index_of_keys_is_part_of_the_mask(kind: str) -> None:
    model = model_of(kind, **MLA, index_topk=32, index_n_heads=2, index_head_dim=32)
    ids = tokens(1, 100)
    want = model(ids, use_cache=False).logits
    thrift.enable(model, EXACT)
    close(model(ids, use_cache=False).logits, want)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_was_asked_for_is_served_until_it_changes(inference: bool) -> None:
    options = {
        "batch_size": 1,
        "kv_length": 8,
        "q_length": 8,
        "q_offset": 0,
        "cache_position": None,
        "dtype": torch.float32,
    }
    if VERSION < (5, 4):
        options["cache_position"] = torch.arange(8)
    with torch.inference_mode(inference):
        mask = thrift_mask(**options, allow_is_causal_skip=False)
        assert mask is not None
        assert mask.shape == (1, 1, 8, 8)
        assert plain_mask(mask) == (None, None)
        mask[..., 0] -= 1
        assert plain_mask(mask)[0] is mask
        assert plain_mask(mask + 0)[0] is not None


# -- K and V ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(VERSION < (5, 10), reason="this DiffLlama has attention classes of its own, and enable() says so")
@torch.no_grad()
def test_v_changed_after_the_cache_has_got_it() -> None:
    model, ids = model_of("diffllama"), tokens(1, 150)
    want = model(ids).logits
    thrift.enable(model, EXACT)
    cache = cache_for(model)
    got = [model(part, **with_cache(model, cache)).logits for part in ids.split([100, 49, 1], dim=1)]
    close(torch.cat(got, 1), want)
    assert set(served(model)) == {"sdpa"}
    assert thrift.report(model)[0].reason == "K or V is not what the cache was given"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("attn", ["thrift", "eager"])
@torch.no_grad()
def test_k_and_v_put_in_by_hand(attn: str, order: tuple[int, int]) -> None:
    plain, model = enabled()
    if attn == "eager":
        thrift.disable(model)
    ids, places = tokens(1, 40), torch.arange(25, 65)[None]
    theirs, cache = transformers.DynamicCache(config=plain.config), cache_for(model)
    prefix = torch.randn(2, 2, 1, 2, 25, 16)
    for held in (theirs, cache):
        for layer in order:
            for part in (slice(0, 10), slice(10, 25)):
                held.update(*prefix[layer][..., part, :], layer)
    assert cache.get_seq_length() == 25
    want, got = (m(ids, position_ids=places, **with_cache(m, c)).logits for m, c in ((plain, theirs), (model, cache)))
    close(got, want)
    assert cache.get_seq_length() == 65


@torch.no_grad()
def test_fewer_layers_than_the_config_says() -> None:
    plain, _ = enabled(num_hidden_layers=4)
    plain.model.layers = plain.model.layers[:2]
    ids = tokens(1, 90)
    want = plain(ids, use_cache=False).logits[:, 80:]
    model = copy.deepcopy(plain)
    thrift.enable(model)
    cache = cache_for(model)
    model(ids[:, :80], **with_cache(model, cache))
    assert cache.get_seq_length() == 80
    close(model(ids[:, 80:], **with_cache(model, cache)).logits, want)
    step = DecodeGraph(model, cache)
    step(ids[:, :1])
    assert cache.tokens(0) == 91
    unknown = cache_for(plain)  # no thrift attention tells which layers there are
    plain(ids[:, :80], **with_cache(plain, unknown))
    with pytest.raises(RuntimeError, match="2 layers hold tokens and 2 of the 4"):
        plain(ids[:, 80:], **with_cache(plain, unknown))


@torch.no_grad()
def test_more_layers_than_the_config_says() -> None:
    _, model = enabled(num_hidden_layers=3)
    cache = cache_for(enabled()[1])
    with pytest.raises(ValueError, match="layer 2, the cache was made for 2 layers"):
        model(tokens(1, 5), **with_cache(model, cache))


@torch.no_grad()
def test_an_interrupted_first_forward() -> None:
    plain, model = enabled()
    ids, cache = tokens(1, 70), cache_for(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, **with_cache(model, cache))
    hook.remove()
    close(model(ids, **with_cache(model, cache)).logits, plain(ids).logits)


def test_states_do_not_hinder_copies() -> None:
    _, model = enabled()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        thrift.enable(other, stats=False)
        with torch.no_grad():
            other(tokens(1, 10))
        assert served(other) == ["thrift", "thrift"]


def test_max_tokens_is_the_limit() -> None:
    _, model = enabled()
    ids = tokens(1, 101)
    with torch.no_grad():
        with pytest.raises(ValueError, match="101 tokens, more than max_tokens=100"):
            model(ids, **with_cache(model, cache_for(model, 100)))
        cache = cache_for(model, 100)
        prefill(model, ids[:, :99], cache)
        step = DecodeGraph(model, cache)
        step(ids[:, :1])
        with pytest.raises(ValueError, match="max_tokens"):
            step(ids[:, :1])
        with pytest.raises(ValueError, match="max_tokens"):
            model(ids[:, :1], **with_cache(model, cache))
        assert cache.get_seq_length() == 100


# -- modes of torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_autocast(family: str) -> None:
    plain, model = enabled(family)
    thrift.enable(model, EXACT)
    ids = tokens(1, 150)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = plain(ids).logits.float()
        close(model(ids, use_cache=False).logits.float(), want, 0.05)
        cache = cache_for(model)
        got = [model(part, **with_cache(model, cache)).logits for part in ids.split([100, 49, 1], dim=1)]
        close(torch.cat(got, 1).float(), want, 0.05)
    assert cache.paged_layers[0].paged.dtype == torch.bfloat16
    # transformers 5.0 calls a forward again that has raised TypeError; a sliding-window layer then has its tokens twice.
    with pytest.raises((TypeError, RuntimeError), match=r"dtype of the cache|interrupted"):
        model(ids[:, :1], **with_cache(model, cache))


def test_inference_mode_may_begin_and_end_between_steps() -> None:
    plain, model = enabled()
    ids = tokens(1, 270)
    with torch.no_grad():
        want = plain(ids.expand(2, -1)).logits[:1]
    cache, got = cache_for(model), []
    for part, mode in zip(ids.split([100, 1, 1, 70, 98], dim=1), (True, False, True, False, True), strict=True):
        with torch.inference_mode(mode), torch.no_grad():
            got.append(model(part, **with_cache(model, cache)).logits)
            cache.crop(-part.shape[1])
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0]))
            model(part, **with_cache(model, cache))
    with torch.no_grad():
        close(torch.cat(got, 1), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    _, model = enabled()
    thrift.enable(model, ThriftConfig(budget=fraction(0.3)))
    ids = tokens(1, 300)

    def run() -> Tensor:
        cache = thrift.ThriftCache(model.config, 512, decode=ThriftConfig.for_cache(budget=top_k(1)))
        cached = [model(part, **with_cache(model, cache)).logits for part in ids.split([200, 80, 20], dim=1)]
        return torch.cat([model(ids, use_cache=False).logits, *cached], 1)

    want, before = run(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = run()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, want)


def test_gradients_are_refused_in_every_form() -> None:
    _, model = enabled()
    ids = tokens(1, 70)
    with pytest.raises(NotImplementedError, match="inference only"):
        model(ids, use_cache=False)
    for size in (70, 1):
        cache = cache_for(model)
        if size == 1:
            with torch.no_grad():
                model(ids, **with_cache(model, cache))
        held = cache.get_seq_length()
        with pytest.raises(NotImplementedError, match="inference only"):
            model(ids[:, :size], **with_cache(model, cache))
        assert cache.get_seq_length() == held
    layer = cache_for(model).layers[0]
    x = torch.randn(1, 2, 5, 16)
    with (
        torch.autograd.forward_ad.dual_level(),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="inference only"),
    ):
        layer.update(torch.autograd.forward_ad.make_dual(x, x), x)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cache = cache_for(model)
    model(ids, **with_cache(model, cache))  # nothing asks for gradients: served
    held = vars(cache.layers[0].paged.tensors()).values()
    assert not any(x.requires_grad for x in held if isinstance(x, Tensor))


# -- models that a cache cannot serve ---------------------------------------------------------------------------------


def test_models_that_no_cache_serves_are_named() -> None:
    with pytest.raises(NotImplementedError, match="latent"):
        thrift.ThriftCache(transformers.DeepseekV3Config(**{**SHAPE, **MLA}), 512)
    for config in (transformers.BartConfig(), transformers.T5Config()):
        with pytest.raises(NotImplementedError, match="encoder-decoder"):
            thrift.ThriftCache(config, 512)


@pytest.mark.skipif("gemma4_text" not in transformers.CONFIG_MAPPING, reason="no Gemma 4")
def test_head_dims_may_differ_by_layer() -> None:
    options = {**SHAPE, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    options |= {"num_kv_shared_layers": 0, "head_dim": 16}
    cache = thrift.ThriftCache(transformers.AutoConfig.for_model("gemma4_text", **options, global_head_dim=32), 1024)
    assert len(cache.paged_layers) == 2
    with pytest.raises(NotImplementedError, match="24 in layer 1"):
        thrift.ThriftCache(transformers.AutoConfig.for_model("gemma4_text", **options, global_head_dim=24), 1024)


# -- generation with a decode graph -----------------------------------------------------------------------------------


def test_the_decoding_loop_takes_embeddings() -> None:
    plain, model = enabled()
    ids = tokens(2, 60)
    options = {"max_new_tokens": 8, "do_sample": False}
    want = plain.generate(ids, **options)[:, 60:]
    embeds = model.get_input_embeddings()(ids).detach()
    for chunk in (None, 25):
        got = model.generate(
            inputs_embeds=embeds,
            custom_generate=generate,
            prefill_chunk_size=chunk,
            **with_cache(model, cache_for(model)),
            **options,
        )
        assert torch.equal(got, want)


def test_the_decoding_loop_names_what_it_leaves_out() -> None:
    plain, model = enabled(eos_token_id=96)
    ids = tokens(1, 60)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}

    def run(**more: Any) -> Tensor:
        cache = with_cache(model, cache_for(model))
        return model.generate(ids, custom_generate=generate, **cache, **{**options, **more})

    assert torch.equal(run(assistant_model=enabled(num_hidden_layers=1)[0]), plain.generate(ids, **options))
    with pytest.raises(NotImplementedError, match="assisted_generation"):
        run(prompt_lookup_num_tokens=3)
    with pytest.raises(NotImplementedError, match="beam"):
        run(num_beams=2)
    with pytest.raises(NotImplementedError, match="inputs_embeds without"):
        run(inputs_embeds=model.get_input_embeddings()(ids).detach())
    with pytest.raises(NotImplementedError, match="position_ids"):
        run(position_ids=torch.arange(7, 67)[None])


@torch.no_grad()
def test_a_graph_sees_that_its_cache_has_other_tensors() -> None:
    """Addresses are compared on the host; on a GPU the step is captured again."""
    _, model = enabled()
    ids, cache = tokens(2, 70), cache_for(model)
    prefill(model, ids[:1], cache)
    step = DecodeGraph(model, cache)
    step._held = step._tensors()
    step(ids[:1, :1])
    cache.crop(-1)
    assert not step._moved()
    cache.reset()
    prefill(model, ids, cache)
    with pytest.raises(ValueError, match="for 1 sequences, the cache holds 2"):
        step(ids[:1, :1])
    cache.reset()
    prefill(model, ids[:1], cache)
    assert step._moved()


@torch.no_grad()
def test_a_graph_needs_one_device() -> None:
    _, model = enabled()
    cache = cache_for(model)
    prefill(model, tokens(1, 5), cache)
    model.lm_head.to("meta")
    with pytest.raises(NotImplementedError, match="one device, this one is on cpu, meta"):
        DecodeGraph(model, cache)


# -- versions ---------------------------------------------------------------------------------------------------------


def test_the_supported_range_is_written_once() -> None:
    assert RANGE == "5.0 to 5.24"
    assert SUPPORTED[0] <= VERSION <= SUPPORTED[1]


def test_the_own_loop_is_silent() -> None:
    _, model = enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*past_key_values", category=FutureWarning)
        model.generate(tokens(1, 9), custom_generate=generate, max_new_tokens=3, **with_cache(model, cache_for(model)))
