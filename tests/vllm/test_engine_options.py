"""Options of an engine's user, what is refused by name, and versions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from thrift_attn import ThriftConfig
from thrift_attn.vllm.engine_options import EngineOptions
from thrift_attn.vllm.unserved import check_layer, check_model, check_reach
from thrift_attn.vllm.vllm_versions import check_version


def test_the_default_is_that_of_the_library() -> None:
    for config in (None, {}, {"others": {"budget": 7}}):
        options = EngineOptions.read(config)
        assert options.for_prompts() == ThriftConfig()
        assert options.for_pages() == ThriftConfig.for_cache()


def test_options_are_those_of_the_config() -> None:
    options = EngineOptions.read({"thrift": {"budget": "10%", "sink_token": "none", "scales": "ones"}})
    assert options.for_prompts() == ThriftConfig(budget=0.1, sink_token="none")
    assert options.for_pages() == ThriftConfig.for_cache(budget=0.1, sink_token="none", smooth="none")
    assert EngineOptions.read({"thrift": {"budget": 1}}).for_pages().budget == ThriftConfig(budget=1.0).budget


@pytest.mark.parametrize(
    ("section", "error", "text"),
    [
        (
            {"buget": 0.1},
            ValueError,
            "unknown option 'buget' in the section 'thrift': there are budget, residual_share,",
        ),
        ({"budget": "much"}, ValueError, "budget"),
        ({"budget": True}, TypeError, "budget must be"),
        ({"sink_token": "first"}, ValueError, "sink_token must be one of"),
        ({"scales": 1}, TypeError, "scales must be a path, 'ones' or null, got int"),
        ({"scales": "one"}, FileNotFoundError, "wrote, 'ones' or null: there is no file 'one'"),
        ({"residual_share": 0.25}, NotImplementedError, "residual_share must be 1, got 0.25"),
        (["budget"], TypeError, "must hold options by name, got list"),
    ],
)
def test_other_options_are_refused(section: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        EngineOptions.read({"thrift": section})


def test_layers_that_are_not_served_are_refused_by_name() -> None:
    check_layer({"ALiBi": None, "sinks": None}, "decoder", "auto")
    with pytest.raises(
        NotImplementedError, match="does not serve ALiBi, sinks, attention of an encoder, --kv-cache-dt"
    ):
        check_layer({"ALiBi": [1.0], "sinks": 0, "x": None}, "encoder", "fp8")
    with pytest.raises(NotImplementedError, match="backend_per_kind"):
        check_layer({"a sliding window": 4096}, "decoder", "auto")


def model(block_size: int = 128, dcp: int = 1, transfer: Any = None, parallel_drafts: bool = False) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(decode_context_parallel_size=dcp),
        cache_config=SimpleNamespace(user_specified_block_size=True, block_size=block_size),
        kv_transfer_config=transfer,
        speculative_config=SimpleNamespace(parallel_drafting=parallel_drafts),
    )


def test_engines_that_are_not_served_are_refused_by_name() -> None:
    check_model(model(256))
    with pytest.raises(NotImplementedError, match="decode context parallelism"):
        check_model(model(dcp=2))
    with pytest.raises(NotImplementedError, match="KV connectors"):
        check_model(model(transfer=object()))
    with pytest.raises(NotImplementedError, match="parallel drafting"):
        check_model(model(parallel_drafts=True))
    with pytest.raises(ValueError, match="--block-size that is a multiple of 128, got 64"):
        check_model(model(64))


def test_what_the_kernels_cannot_reach_is_refused_when_the_engine_starts() -> None:
    check_reach(8191, 8, 2**22)
    with pytest.raises(
        ValueError, match=r"at most 65535 sequences times KV heads, got 8192 \* 8 = 65536: --max-num-seqs"
    ):
        check_reach(8192, 8, 1024)
    with pytest.raises(ValueError, match=r"\(4194304 tokens\), got 65537: .*--max-model-len must be smaller"):
        check_reach(1, 8, 2**22 + 1)


@pytest.mark.parametrize("version", ["0.29.0", "0.30.1+cpu", "0.32.0rc1"])
def test_tested_versions_are_served(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.28.0", "0.33.0", "1.0.0", "dev"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(NotImplementedError, match=f"serves vLLM 0.29 to 0.32, this is {version}"):
        check_version(version)
