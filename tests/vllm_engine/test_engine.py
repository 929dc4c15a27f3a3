"""One engine in this process: the answers are those of vLLM's own attention, whatever its scheduler does."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.vllm_engine import Output, ask, check_alike, count, engine
from thrift_attn.vllm.page_record import PageRecord
from thrift_attn.vllm.scale_files import LayerScales, write_scales

WHOLE = {"budget": 1}
NOISE = 0.06
"""Of logprobs: of 16-bit numbers and of residuals, in a model of two random layers whose logits spread over some 10 nats."""


def test_every_block_promoted_is_vllms_own_attention(of_thrift: list[Output], of_vllm: list[Output]) -> None:
    check_alike(of_thrift, of_vllm, NOISE, least=0.4)


def test_a_gpu_is_given_blocks_of_two_pages() -> None:
    """On a CPU vLLM does not ask for the size that suits all backends."""
    from vllm.platforms.interface import Platform

    from thrift_attn.vllm.attention_backend import ThriftBackend
    from thrift_attn.vllm.tail_ring import TailBackend

    class Layer:
        def __init__(self, backend: Any):
            self.get_attn_backend = lambda: backend

    cache = SimpleNamespace(block_size=16, user_specified_block_size=False, kv_cache_dtype_skip_layers=[])
    model = SimpleNamespace(is_hybrid=False)
    config: Any = SimpleNamespace(model_config=model, cache_config=cache)
    for order in ((ThriftBackend, TailBackend), (TailBackend, ThriftBackend)):
        cache.block_size = 16
        layers = {str(i): Layer(backend) for i, backend in enumerate(order)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vllm.config.vllm.get_layers_from_vllm_config", lambda *_, layers=layers: layers)
            patch.setattr("vllm.config.vllm.set_current_vllm_config", nullcontext)
            Platform.update_block_size_for_backend(config)
        assert cache.block_size == 128


def test_prefix_hits_are_what_misses_are(model: str, prompts: list[list[int]], of_thrift: list[Output]) -> None:
    with engine(model, WHOLE) as llm:
        first, second = (ask(llm, prompts[:3] + prompts[4:]) for _ in range(2))
        pages = llm.llm_engine.vllm_config.cache_config
    assert pages.block_size == 128
    assert [one.cached for one in second] == [0, 256, 128, 128, 128]
    wanted = of_thrift[:3] + of_thrift[4:]
    check_alike(first, wanted, NOISE)
    check_alike(second, wanted, NOISE)


def test_parts_of_a_prompt_are_what_the_whole_is(model: str, prompts: list[list[int]], of_thrift: list[Output]) -> None:
    with engine(model, WHOLE, max_num_batched_tokens=96, max_num_seqs=8) as llm:
        check_alike(ask(llm, prompts), of_thrift, NOISE)


def test_preempted_requests_are_computed_again(model: str, prompts: list[list[int]], of_thrift: list[Output]) -> None:
    with engine(model, WHOLE, num_gpu_blocks_override=9, max_model_len=512, enable_prefix_caching=False) as llm:
        found = ask(llm, prompts)
        assert count(llm, "vllm:num_preemptions") >= 1
    check_alike(found, of_thrift, NOISE)


def test_drafts_that_are_taken_back_leave_nothing(
    model: str, prompts: list[list[int]], of_thrift: list[Output]
) -> None:
    """As many as a ring has room for; of n-grams in random text most are wrong."""
    guess = {"method": "ngram", "num_speculative_tokens": 11, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(model, WHOLE, speculative_config=guess) as llm:
        found = ask(llm, prompts)
        drafted, accepted = (count(llm, f"vllm:spec_decode_num_{what}_tokens") for what in ("draft", "accepted"))
    assert drafted > accepted
    assert drafted > 30
    check_alike(found, of_thrift, NOISE)


def test_the_default_budget_promotes_all_of_short_texts(
    model: str, prompts: list[list[int]], of_thrift: list[Output]
) -> None:
    with engine(model, {}) as llm:
        check_alike(ask(llm, prompts[:2]), of_thrift[:2], NOISE)


def test_a_small_budget_is_another_answer(model: str, prompts: list[list[int]], of_thrift: list[Output]) -> None:
    """So that the tests above can fail: 4-bit noise is far larger than what they allow."""
    with engine(model, {"budget": 0}) as llm:
        found = ask(llm, prompts[:3])
    with pytest.raises(AssertionError):
        check_alike(found, of_thrift[:3], NOISE)


def scales_of(llm: Any) -> dict[int, LayerScales]:
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {number: layers[f"model.layers.{number}.self_attn.attn"].impl.scales for number in range(2)}


def test_scales_are_the_same_at_every_start_or_those_of_a_file(
    model: str, prompts: list[list[int]], of_thrift: list[Output], tmp_path: Path
) -> None:
    started = []
    for _ in range(2):
        with engine(model, WHOLE) as llm:
            started.append(scales_of(llm))
    for number in range(2):
        assert all(map(torch.equal, started[0][number], started[1][number]))
        assert not torch.equal(started[0][number].k_channel_scale, torch.ones(2, 64))
    own = {n: LayerScales(one.k_channel_scale * 2, one.v_head_scale / 2) for n, one in started[0].items()}
    write_scales(tmp_path / "own.safetensors", own)
    with engine(model, {**WHOLE, "scales": str(tmp_path / "own.safetensors")}) as llm:
        assert all(map(torch.equal, scales_of(llm)[1], own[1]))
        check_alike(ask(llm, prompts[:2]), of_thrift[:2], NOISE)
    with engine(model, {**WHOLE, "scales": "ones"}) as llm:
        assert scales_of(llm)[1] is None
        check_alike(ask(llm, prompts[:2]), of_thrift[:2], NOISE)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LoRA adapter that changes Q, K and V of the tiny model by about as much as they are."""
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    folder, g = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(0)
    sizes = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    tensors = {}
    for number in range(2):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{number}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, 128, generator=g).half() / 8
            tensors[f"{at}.lora_B.weight"] = torch.randn(size, 8, generator=g).half() / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return LoRARequest("other", 1, str(folder))


def test_an_adapter_is_served_over_the_scales_of_its_base(
    model: str, prompts: list[list[int]], of_thrift: list[Output], adapter: Any
) -> None:
    """The engine calibrates before any adapter is there; requests with it and without it share pages' scales."""
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    with engine(model, None, **lora) as llm:
        wanted = ask(llm, prompts[:3], lora_request=adapter)
    with engine(model, WHOLE) as llm:
        scales = scales_of(llm)
    with engine(model, WHOLE, **lora) as llm:
        assert all(map(torch.equal, scales_of(llm)[1], scales[1]))
        found = ask(llm, prompts[:3], lora_request=adapter)
        check_alike(ask(llm, prompts[:3]), of_thrift[:3], NOISE)
    check_alike(found, wanted, 2 * NOISE, least=0.3)  # its logits spread further
    with pytest.raises(AssertionError):  # the adapter is another model
        check_alike(found, of_thrift[:3], 2 * NOISE)


def refusal(model: str, thrift: dict[str, Any], **options: Any) -> str:
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as caught, engine(model, thrift, **options):
        pass
    return str(caught.value)


def test_another_version_is_refused_when_thrift_is_chosen(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    assert "serves vLLM 0.29 to 0.32, this is 0.99.0" in refusal(model, WHOLE)


def test_what_is_not_served_is_refused_when_the_engine_starts(model: str) -> None:
    assert "unknown option 'buget'" in refusal(model, {"buget": 1})
    assert "residual_share must be 1" in refusal(model, {"residual_share": 0.15})
    assert "--kv-cache-dtype fp8" in refusal(model, {}, kv_cache_dtype="fp8")
    assert "multiple of 128, got 64" in refusal(model, {}, block_size=64)
    guess = {"method": "ngram", "num_speculative_tokens": 12, "prompt_lookup_max": 2}
    assert "64 tokens and 12 drafts" in refusal(model, {}, speculative_config=guess)


def test_blocks_that_vllm_lets_go_of_are_free_again() -> None:
    """It measures graphs over a small pool, and empties every layer of it before it takes the memory that is left."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from vllm.v1.worker.utils import clear_layer_kv_caches

    from thrift_attn.vllm.tail_ring import ThriftTail

    tail = ThriftTail("layer", 2, PageRecord(64), torch.float16)
    blocks = torch.zeros(3, 2, 128, 150, dtype=torch.uint8)
    tail.bind_kv_cache(blocks)
    assert tail.rings.shape == (3, 2, 2, 75, 64)
    tail.pages = blocks[1:]
    held = StorageWeakRef(blocks.untyped_storage())
    del blocks
    clear_layer_kv_caches([tail])
    assert held.expired()
    assert tail.pages is None


def test_more_drafts_than_a_step_decodes_are_refused() -> None:
    from thrift_attn.vllm.tail_ring import ThriftTail

    tail = ThriftTail("layer", 2, PageRecord(64), torch.float16)

    def spec(drafts: int, tokens: int) -> Any:
        cache = SimpleNamespace(block_size=tokens)
        return tail.get_kv_cache_spec(SimpleNamespace(cache_config=cache, num_speculative_tokens=drafts))

    assert spec(11, 128).block_size == 128
    assert spec(15, 256).block_size == 256
    with pytest.raises(ValueError, match="has room for 75"):
        spec(12, 128)
    with pytest.raises(ValueError, match="decodes up to 15 drafts in a step, got 16"):
        spec(16, 256)
