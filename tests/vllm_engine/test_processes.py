"""Engines in processes of their own: models that want nothing of thrift, two ranks, the API server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.vllm_engine import Output, answers, ask_in_process, check_alike
from thrift_attn.vllm import ON_CPU

WHOLE = {"budget": 1}
NOISE = 0.06
"""As in test_engine.py."""


def test_a_model_that_wants_nothing_of_thrift_is_left_alone(
    model: str, prompts: list[list[int]], of_vllm: list[Output]
) -> None:
    """The same numbers without the plugin, with it, and with it on a version that it was not tested with."""
    without = ask_in_process({"VLLM_PLUGINS": ""}, model=model, prompts=prompts)
    untested = ask_in_process(model=model, prompts=prompts, version="0.99.0")
    assert answers(without) == of_vllm
    assert answers(untested) == of_vllm


def test_two_ranks_answer_as_one(model: str, prompts: list[list[int]], of_thrift: list[Output]) -> None:
    environment = {ON_CPU: "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    two = ask_in_process(environment, model=model, prompts=prompts, thrift=WHOLE, options={"tensor_parallel_size": 2})
    check_alike(answers(two), of_thrift, NOISE)


class Server:
    """vLLM's API server over thrift.

    Args:
        model: folder of the model.
        log: where it writes.
    """

    def __init__(self, model: str, log: Path):
        from vllm.platforms import current_platform

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, ON_CPU: "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        options = ["--dtype", "float16", "--max-model-len", "512", "--enforce-eager", "--port", str(self.port)]
        options += ["--host", "127.0.0.1", "--additional-config", json.dumps({"thrift": WHOLE})]
        if not current_platform.is_cpu():
            options += ["--attention-backend", "CUSTOM", "--gpu-memory-utilization", "0.1"]
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options],
            stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        self.model = model

    def wait(self, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def request(self, prompt: list[int], **options: Any) -> urllib.request.Request:
        body = {
            "model": self.model,
            "prompt": prompt,
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": 40,
            **options,
        }
        return urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )

    def complete(self, prompt: list[int], **options: Any) -> str:
        with urllib.request.urlopen(self.request(prompt, **options), timeout=120) as answer:
            return json.load(answer)["choices"][0]["text"]

    def running(self) -> float:
        lines = self.get("/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(model, tmp_path_factory.mktemp("server") / "log.txt")
    try:
        started.wait()
        yield started
    finally:
        started.process.terminate()
        started.process.wait(60)


def words(output: Output) -> str:
    return " ".join(f"w{token}" for token in output.tokens)


def test_two_clients_at_once_get_what_each_gets_alone(
    server: Server, prompts: list[list[int]], of_thrift: list[Output]
) -> None:
    alone = [server.complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as clients:
        together = list(clients.map(server.complete, prompts))
    assert together == alone
    assert "thrift: pages of 150 bytes a token and KV head, 58.6% of 16 bits; budget 1," in server.log.read_text()
    firsts = [text.split()[:2] for text in alone]
    assert firsts == [words(one).split()[:2] for one in of_thrift]


def test_a_client_that_leaves_and_one_that_asks_too_much_harm_nobody(server: Server, prompts: list[list[int]]) -> None:
    wanted = server.complete(prompts[0])
    answer = urllib.request.urlopen(server.request(prompts[1], stream=True, max_tokens=250), timeout=60)
    assert answer.readline().startswith(b"data:")
    beside = ThreadPoolExecutor(1).submit(server.complete, prompts[0])
    answer.close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.complete([5] * 600)
    assert refused.value.code == 400
    assert beside.result() == wanted
    end = time.monotonic() + 30
    while server.running() and time.monotonic() < end:
        time.sleep(0.2)
    assert server.running() == 0
    assert server.complete(prompts[0]) == wanted
