"""The real engine on what is there, in this process or in one of its own, and how answers are compared."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from thrift_lab.serving.engine_gate import Answer, difference

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
for name, value in ENVIRONMENT.items():  # vLLM looks at it when it is imported
    os.environ.setdefault(name, value)


class Output(NamedTuple):
    """What one request got: its tokens, the largest logprobs of each by token, and how many tokens were in pages already."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int


@contextmanager
def engine(model: str, thrift: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """Start vLLM in this process, with thrift for its attention or without."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from thrift_attn.vllm import CPU_BACKEND

    AttentionBackendEnum.CPU_ATTN.clear_override()
    if thrift is not None:
        options["additional_config"] = {"thrift": thrift}
        if current_platform.is_cpu():
            register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
        else:
            options["attention_backend"] = "CUSTOM"
    elif not current_platform.is_cpu():
        options["attention_backend"] = "FLASH_ATTN"
    selector._cached_get_attn_backend.cache_clear()
    overrides = getattr(current_platform, "register_triton_kernel_overrides", None)
    if overrides is not None and not hasattr(overrides, "cache_info"):
        # vLLM makes one worker a process and stumbles over a second one here; once is enough.
        current_platform.register_triton_kernel_overrides = functools.cache(overrides)
    defaults = {"dtype": "float16", "max_model_len": 1024, "enforce_eager": True, "seed": 0, "disable_log_stats": False}
    if not current_platform.is_cpu():
        defaults["gpu_memory_utilization"] = 0.1  # of which there are several in this process, one after the other
    llm = LLM(model, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm: Any, prompts: list[list[int]], tokens: int = 40, lora_request: Any = None) -> list[Output]:
    """Let an engine answer prompts, the likeliest token each time."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5)
    answers = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False, lora_request=lora_request
    )
    return [
        Output(
            list(one.outputs[0].token_ids),
            [{token: seen.logprob for token, seen in step.items()} for step in one.outputs[0].logprobs],
            one.num_cached_tokens,
        )
        for one in answers
    ]


def count(llm: Any, name: str) -> float:
    """A counter of the engine."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def check_alike(found: list[Output], wanted: list[Output], noise: float, least: float = 0.6) -> None:
    """Check answers as `thrift_lab.serving.engine_gate.difference` does."""
    plain, ours = ([Answer(one.tokens, one.logprobs) for one in row] for row in (wanted, found))
    assert not (problem := difference(ours, plain, noise, least).problem), problem


def ask_in_process(environment: dict[str, str] | None = None, **given: Any) -> subprocess.Popen[str]:
    """Start an engine in a process of its own; `answers` waits for it.

    Args:
        environment: changes to this process's.
        **given: model, prompts, thrift, options of the engine, and the version that vLLM says it is.
    """
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-m", "support.ask_vllm", json.dumps(given)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def answers(process: subprocess.Popen[str]) -> list[Output]:
    """What an engine in a process of its own has answered."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    said = next(line for line in out.splitlines() if line.startswith("[["))  # among what vLLM has to say
    return [
        Output(tokens, [{int(token): value for token, value in step.items()} for step in logprobs], cached)
        for tokens, logprobs, cached in json.loads(said)
    ]
