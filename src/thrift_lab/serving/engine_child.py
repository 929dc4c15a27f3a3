"""An engine in a process of its own, so that each method has the whole GPU: does its tasks and tells what it found.

``python -m thrift_lab.serving.engine_child JOB FD``: reads an `EngineJob` and writes a line of JSON for each event.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from thrift_lab.serving.engine_jobs import EngineJob, Task

SETTLE_S = 0.5
"""Seconds for an engine to drop what was aborted."""

FIRST_WORD = 4
"""Random token ids begin here: those before are often special."""

Result = dict[str, Any]


class Engine:
    """vLLM's engine, stepped by hand, so that every step can be timed.

    Args:
        job: what it is made with.
    """

    def __init__(self, job: EngineJob):
        from vllm import LLM

        began = time.perf_counter()
        self.method = job.method
        self.llm = LLM(**job.engine_options())
        self.inner = self.llm.llm_engine
        self.start_s = time.perf_counter() - began
        self._names = map(str, count())

    @property
    def facts(self) -> Result:
        """What the engine says of its memory."""
        cache = self.inner.vllm_config.cache_config
        return {
            "start_s": self.start_s,
            "kv_tokens": cache.kv_cache_size_tokens,
            "blocks": cache.num_gpu_blocks,
            "block_tokens": cache.block_size,
            "memory_mib": memory_used(),
        }

    def random_ids(self, tokens: int, seed: int) -> list[int]:
        """Token ids of a prompt that nobody has asked before."""
        vocabulary = self.inner.vllm_config.model_config.get_vocab_size()
        return np.random.default_rng(seed).integers(FIRST_WORD, vocabulary, tokens).tolist()

    def add(self, ids: list[int], tokens: int) -> str:
        """Ask for so many tokens behind a prompt, and return the request's name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        how = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        name = next(self._names)
        self.inner.add_request(name, {"prompt_token_ids": ids}, how)
        return name

    def step(self) -> tuple[float, dict[str, int], bool]:
        """Run one step: when it ended, new tokens by request, and whether a request ended with it."""
        outputs = self.inner.step()
        fresh = {one.request_id: len(one.outputs[0].token_ids) for one in outputs}
        return time.perf_counter(), {name: n for name, n in fresh.items() if n}, any(one.finished for one in outputs)

    def abort(self, names: list[str]) -> None:
        """Drop requests."""
        self.inner.abort_request(names)
        time.sleep(SETTLE_S)

    def preemptions(self) -> float:
        """Requests that were put back so far."""
        return sum(one.value for one in self.llm.get_metrics() if one.name == "vllm:num_preemptions")

    def sequences_that_fit(self, length: int) -> int:
        """Sequences of so many tokens that the pool has blocks for; of thrift's each has one more, for its newest tokens."""
        cache = self.inner.vllm_config.cache_config
        each = -(-length // cache.block_size) + (self.method == "thrift")
        return (cache.num_gpu_blocks - 1) // each  # one block is nobody's


def single(engine: Engine, task: Task) -> Result:
    """Time to the first token, and between tokens, of one sequence alone."""
    chunk = engine.inner.vllm_config.scheduler_config.max_num_batched_tokens
    prompt = task.length - task.steps - 1  # with its first token and one of each step it is as long as it may be
    _times(engine, engine.random_ids(min(prompt, 2 * chunk + prompt % chunk), task.seed), 2)  # compiles
    firsts, steps = [], []
    for repeat in range(task.repeats):
        ids = engine.random_ids(prompt, task.seed + 1 + repeat)
        began = time.perf_counter()
        times = _times(engine, ids, task.steps + 1)
        firsts.append(times[0] - began)
        steps += [1e3 * (b - a) for a, b in pairwise(times)]
    return {"first_token_s": firsts, "step_ms": steps, "sequences": 1}


def _times(engine: Engine, ids: list[int], tokens: int) -> list[float]:
    """When each of so many tokens came behind a prompt."""
    engine.add(ids, tokens)
    times: list[float] = []
    over = False
    while not over:
        at, fresh, over = engine.step()
        times += [at] * bool(fresh)
    return times


def capacity(engine: Engine, task: Task) -> Result:
    """Time as many sequences as fit while all of them decode, and count the tokens that they hold.

    Prompts are read one after the other while earlier ones decode already, so earlier ones are shorter: at the end all are
    about as long.
    """
    fits = engine.sequences_that_fit(task.length)
    scheduler = engine.inner.vllm_config.scheduler_config
    wanted = min(fits, scheduler.max_num_seqs)
    if not wanted:
        return {"fits": 0, "sequences": 0}
    chunk, before = scheduler.max_num_batched_tokens, engine.preemptions()
    reading = [math.ceil(task.length / max(1, chunk - number)) for number in range(wanted)]
    last = task.length - task.steps - 2  # its first token ends no timed step, its second begins the first one
    prompts = [last - sum(reading[number + 1 :]) for number in range(wanted)]
    if prompts[0] < 1:
        raise ValueError(
            f"{wanted} sequences of {task.length} tokens cannot all be read before the first one has ended"
        )
    ids = [engine.random_ids(tokens, task.seed + number) for number, tokens in enumerate(prompts)]
    began = time.perf_counter()
    held = {engine.add(one, task.length - len(one)): len(one) for one in ids}
    running: set[str] = set()
    times: list[float] = []
    over = False
    while not over and len(times) <= task.steps:
        at, fresh, over = engine.step()
        newcomers = fresh.keys() - running
        running |= newcomers
        for name, tokens in fresh.items():
            held[name] += tokens
        if newcomers or len(running) < wanted:
            times = []
        elif fresh:
            times.append(at)
    result = {
        "fits": fits,
        "sequences": len(running),
        "held_tokens": sum(held[name] for name in running),
        "step_ms": [1e3 * (b - a) for a, b in pairwise(times)],
        "whole_s": time.perf_counter() - began,
        "preemptions": engine.preemptions() - before,
        "memory_mib": memory_used(),
    }
    engine.abort(list(held))
    return result


def answers(engine: Engine, task: Task) -> Result:
    """The likeliest tokens behind prompts, with the largest logprobs of each step."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=task.steps, ignore_eos=True, logprobs=5, detokenize=False)
    found = engine.llm.generate([{"prompt_token_ids": ids} for ids in task.prompts], how, use_tqdm=False)
    return {
        "answers": [
            {
                "tokens": list(one.outputs[0].token_ids),
                "logprobs": [{token: seen.logprob for token, seen in step.items()} for step in one.outputs[0].logprobs],
            }
            for one in found
        ]
    }


def nll(engine: Engine, task: Task) -> Result:
    """The loss of every token of texts but their first, in nats."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    began = time.perf_counter()
    losses = []
    for ids in task.prompts:
        (found,) = engine.llm.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)
        losses.append([-step[token].logprob for token, step in zip(ids[1:], found.prompt_logprobs[1:], strict=True)])
    return {"nll": losses, "seconds": time.perf_counter() - began}


TASKS: dict[str, Callable[[Engine, Task], Result]] = {
    "single": single,
    "capacity": capacity,
    "answers": answers,
    "nll": nll,
}


def memory_used() -> list[int] | None:
    """MiB in use on each GPU that there is, as the driver says; None without one."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout
        return [int(line) for line in said.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _end_with(parent: int) -> None:
    """End this process and those that it started when the one that asked for it is gone: they hold a GPU."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(path: str, channel: int) -> None:
    """Do what a file asks for, and write events to a file descriptor."""
    _end_with(os.getppid())
    job = EngineJob.model_validate_json(Path(path).read_text())
    os.set_inheritable(channel, False)
    with os.fdopen(channel, "w") as out:

        def tell(**event: Any) -> None:
            out.write(json.dumps(event) + "\n")
            out.flush()

        engine = Engine(job)
        tell(started=engine.facts)
        for number, task in enumerate(job.tasks):
            tell(begins=number)
            tell(done=number, result=TASKS[task.do](engine, task))
        tell(over=True)


if __name__ == "__main__":  # workers of a second rank import this file as well
    main(sys.argv[1], int(sys.argv[2]))
