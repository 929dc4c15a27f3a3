"""What ``thrift bench serve`` plans, times, keeps and refuses, without vLLM: the engine is one that counts."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from thrift_lab.cli import app
from thrift_lab.serving import engine_jobs, engine_process, run_serve, served_nll
from thrift_lab.serving.engine_child import Engine, capacity, single
from thrift_lab.serving.engine_gate import Answer, difference
from thrift_lab.serving.engine_jobs import EngineJob, Task, check_installed, write_config
from thrift_lab.serving.engine_process import EngineFailed, run_engine
from thrift_lab.serving.serve_plan import SMALL, ServePlan, plan_of
from thrift_lab.serving.serve_records import Cell, Gate, ServeRecord, ServeRow, join
from thrift_lab.serving.served_nll import ServedPlan, ServedRecord, evaluate

GREEN = Gate(worst=0.01, noise=0.06, compared=9, total=9)


class CountingEngine(Engine):
    """A scheduler of so many blocks of 16 tokens: earlier requests decode while later prompts are read; a step is a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, blocks: int, chunk: int, most: int = 64, method: str = "bf16"):
        cache = SimpleNamespace(block_size=16, num_gpu_blocks=blocks + 1)
        scheduler = SimpleNamespace(max_num_batched_tokens=chunk, max_num_seqs=most)
        self.inner = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache, scheduler_config=scheduler))
        self.method, self.blocks, self.chunk, self.now = method, blocks, chunk, 0.0
        self._names = map(str, itertools.count())
        self.left: dict[str, list[int]] = {}  # of the prompt, of the answer, held
        monkeypatch.setattr("thrift_lab.serving.engine_child.time.perf_counter", lambda: self.now)
        monkeypatch.setattr("thrift_lab.serving.engine_child.memory_used", lambda: None)

    def random_ids(self, tokens: int, seed: int) -> list[int]:
        return [5] * tokens

    def add(self, ids: list[int], tokens: int) -> str:
        name = next(self._names)
        self.left[name] = [len(ids), tokens, 0]
        return name

    def step(self) -> tuple[float, dict[str, int], bool]:
        room, fresh = self.chunk, {}
        for name, one in self.left.items():
            part = min(one[0], room) if one[0] else 1
            one[0] -= part if one[0] else 0
            one[2] += part
            room -= part
            if not one[0] and part:
                fresh[name] = 1
                one[1] -= 1
        assert sum(-(-one[2] // 16) for one in self.left.values()) <= self.blocks
        self.now += 1.0
        ended = [name for name, one in self.left.items() if one[1] == 0]
        for name in ended:
            del self.left[name]
        return self.now, fresh, bool(ended)

    def abort(self, names: list[str]) -> None:
        self.left.clear()

    def preemptions(self) -> float:
        return 0


def test_one_sequence_is_timed_behind_one_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CountingEngine(monkeypatch, 64, chunk=100)
    found = single(engine, Task(do="single", length=500, steps=10, repeats=2))
    assert found["first_token_s"] == [5.0, 5.0]  # 490 tokens, 100 a step
    assert found["step_ms"] == [1000.0] * 20


@pytest.mark.parametrize(("blocks", "chunk", "length"), [(400, 128, 512), (130, 64, 1000), (2000, 256, 256)])
def test_as_many_as_fit_decode_at_once_and_hold_nearly_all(
    monkeypatch: pytest.MonkeyPatch, blocks: int, chunk: int, length: int
) -> None:
    engine = CountingEngine(monkeypatch, blocks, chunk)
    found = capacity(engine, Task(do="capacity", length=length, steps=8))
    most = min(blocks // -(-length // 16), 64)
    assert found["sequences"] == most
    assert found["step_ms"] == [1000.0] * 8
    assert 0.7 * most * length < found["held_tokens"] <= most * length
    assert not engine.left


def test_a_ring_of_each_sequence_takes_a_block_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [CountingEngine(monkeypatch, 340, 128, method=name) for name in ("bf16", "thrift")]
    assert [engine.sequences_that_fit(512) for engine in engines] == [10, 10]
    assert [engine.sequences_that_fit(64) for engine in engines] == [85, 68]


def test_a_length_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = capacity(CountingEngine(monkeypatch, 10, 64), Task(do="capacity", length=500, steps=2))
    assert found == {"fits": 0, "sequences": 0}
    assert run_serve._row(Cell("bf16", 500, "capacity", 0), FACTS, found).status == "skipped"


FACTS = {"start_s": 1.0, "kv_tokens": 1000, "memory_mib": None}


def test_cells_are_selected_by_method_length_and_part() -> None:
    plan = ServePlan(lengths=(1000, 2000), rounds=2)
    every = plan.cells()
    assert len(every) == 2 * 3 * 2 * 2
    assert [cell.method for cell in every[::4]] == ["bf16", "fp8", "thrift"] * 2  # rounds are interleaved
    assert {cell[:3] for cell in plan.cells(["thrift/2000"])} == {
        ("thrift", 2000, "single"),
        ("thrift", 2000, "capacity"),
    }
    assert {cell.method for cell in plan.cells(["/1000/single", "fp8"])} == {"bf16", "fp8", "thrift"}
    with pytest.raises(ValueError, match="no cell 'thrift/3000': METHOD/LENGTH/PART, of bf16, fp8, thrift, 1000, 2000"):
        plan.cells(["thrift/3000"])


def test_methods_differ_in_their_pages_alone() -> None:
    plan = ServePlan(thrift={"budget": 0.1}, engine={"enforce_eager": True}, ranks=2)
    made = {method: plan.job(method, "folder", []).engine_options() for method in plan.methods}
    assert made["bf16"].pop("attention_backend") == made["fp8"].pop("attention_backend") == "FLASH_ATTN"
    assert made["fp8"].pop("kv_cache_dtype") == "fp8"
    assert made["thrift"].pop("attention_backend") == "CUSTOM"
    assert made["thrift"].pop("additional_config") == {"thrift": {"budget": 0.1}}
    assert made["bf16"] == made["fp8"] == made["thrift"]
    assert made["bf16"]["tensor_parallel_size"] == 2
    assert made["bf16"]["gpu_memory_utilization"] == 0.9
    assert not made["bf16"]["enable_prefix_caching"]
    environment = SMALL.job("thrift", "folder", []).environment()
    assert environment["THRIFT_VLLM_CPU"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"methods": ("bf16", "turbo")}, "methods are bf16, fp8, thrift, got turbo"),
        ({"lengths": (64, 4096)}, "lengths must be above the timed steps, 64, got 64"),
        ({"lengths": ()}, "at least one method and one length"),
    ],
)
def test_plans_of_nothing_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan_of("full", **given)


def context(plan: ServePlan, **more: Any) -> dict[str, Any]:
    machine = {"cpu": "x86_64", "gpu": "H", "memory_bytes": 80, "driver_version": "5", "temperature_gpu": "40"}
    return {
        "commit": "abc",
        "sources": "s",
        "versions": {"vllm": "0.32.0"},
        "machine": machine,
        "settings": plan.settings,
        **more,
    }


def timed(cell: Cell, step: float, **more: Any) -> ServeRow:
    return ServeRow(cell=cell, status="timed", step_ms=[step] * 3, kv_tokens=1000, **{"sequences": 4, **more})


def test_calls_fill_one_record_where_all_agrees(tmp_path: Path) -> None:
    plan, path = ServePlan(out=tmp_path / "serve.json"), tmp_path / "serve.json"
    record = ServeRecord.open(path, context(plan))
    cell = Cell("thrift", 8192, "single", 0)
    record.put(ServeRow(cell=cell, status="failed", reason="x"))
    assert not record.done(cell)
    record.put(timed(cell, 2.0, first_token_s=[0.5]))
    assert record.done(cell)
    record.save(path)
    warmer = {**context(plan)["machine"], "temperature_gpu": "70"}
    again = ServeRecord.open(path, json.loads(json.dumps(context(plan, machine=warmer))))
    assert again.rows == record.rows
    for other, text in (
        ({"commit": "def"}, "another commit"),
        ({"sources": "t", "versions": {}}, "another sources, versions"),
        ({"machine": {**warmer, "gpu": "B"}}, "another machine"),
        ({"settings": {**plan.settings, "chunk": 2048}}, r"chunk \(8192, now 2048\)"),
    ):
        with pytest.raises(ValueError, match=text):
            ServeRecord.open(path, context(plan, **other))


def call(path: Path, method: Any, *, day: int, gate: Gate | None = None, **more: Any) -> Path:
    """The record of a call that timed a method."""
    plan = ServePlan(lengths=(8192,))
    record = ServeRecord(context=context(plan, created=f"2026-11-{day}", **more), gate=gate)
    record.put(timed(Cell(method, 8192, "single", 0), 2.0))
    record.save(path)
    return path


def test_records_of_calls_are_joined_where_all_agrees(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    ours, fp8 = call(tmp_path / "a.json", "thrift", day=1, gate=GREEN), call(tmp_path / "b.json", "fp8", day=2)
    bf16 = call(tmp_path / "c.json", "bf16", day=3, gate=GREEN.model_copy(update={"problem": "red"}))
    told = CliRunner().invoke(app, ["bench", "serve", "-o", str(out), "--join", str(ours), "--join", str(fp8)])
    assert told.exit_code == 0, told.output
    assert "thrift / fp8" in told.output
    record = ServeRecord.load(out)
    assert [row.cell.method for row in record.rows] == ["thrift", "fp8"]
    assert record.gate == GREEN
    assert record.context["created"] == "2026-11-1"
    assert record.context["joined"] == [{"created": "2026-11-2", "cells": ["fp8/8192/single, round 1"]}]
    record = join(out, [bf16])  # a red gate is not hidden by a green one
    assert record.gate is not None
    assert not record.gate.is_green
    assert [one["created"] for one in record.context["joined"]] == ["2026-11-2", "2026-11-3"]
    before = out.read_bytes()
    for path, text in (
        (fp8, "b.json cannot be joined: both have fp8/8192/single, round 1"),
        (call(tmp_path / "d.json", "fp8", day=4, commit="def"), "d.json cannot be joined: runs of another commit"),
    ):
        told = CliRunner().invoke(app, ["bench", "serve", "-o", str(out), "--join", str(path)])
        assert (told.exit_code, text in " ".join(told.output.split())) == (2, True), told.output
        assert out.read_bytes() == before
    told = CliRunner().invoke(app, ["bench", "serve", "-o", str(out), "--join", str(bf16), "--only", "bf16"])
    assert (told.exit_code, "nothing for --only to choose" in told.output) == (2, True), told.output
    assert out.read_bytes() == before


def test_figures_take_all_rounds_together_and_the_table_compares() -> None:
    plan = ServePlan(lengths=(8192,), rounds=2)
    record = ServeRecord(context=context(plan), gate=GREEN)
    for number, (plain, ours) in enumerate([(4.0, 2.0), (6.0, 2.0)]):
        record.put(timed(Cell("bf16", 8192, "single", number), plain, first_token_s=[1.0]))
        record.put(timed(Cell("bf16", 8192, "capacity", number), plain, held_tokens=900))
        record.put(timed(Cell("thrift", 8192, "capacity", number), ours, held_tokens=1800, sequences=8))
    bf16, thrift = (record.figures(method, 8192) for method in ("bf16", "thrift"))
    assert (bf16.first_token_s, bf16.step_ms, bf16.decoded_per_s) == (1.0, 5.0, 800.0)
    assert (thrift.held_tokens, thrift.first_token_s, thrift.decoded_per_s) == (1800, None, 4000.0)
    console = Console(width=150, record=True)
    console.print(record.table().drawn())
    said = console.export_text()
    assert "5.00x" in said
    assert "thrift / bf16" in said
    assert "thrift / fp8" not in said


def answer(tokens: list[int], *steps: dict[int, float]) -> Answer:
    return Answer(tokens, list(steps))


def test_a_gate_is_red_for_logprobs_tokens_or_too_little_to_compare() -> None:
    want = [answer([7, 8], {7: -0.1, 8: -3.0}, {8: -0.2, 7: -2.0})]
    assert not difference([answer([7, 8], {7: -0.12, 9: -3.0}, {8: -0.2, 7: -2.0})], want, 0.06).problem
    assert "logprobs differ by 0.1" in difference([answer([7, 8], {7: -0.2}, {8: -0.2})], want, 0.06).problem
    assert "not tied: 1.8" in difference([answer([7, 7], {7: -0.1}, {8: -0.2, 7: -2.0})], want, 0.06).problem
    tied = [answer([7, 8, 8], {7: -1.0, 8: -1.01}, {8: -0.2, 7: -2.0}, {8: -0.2, 7: -2.0})]
    parted = [answer([8, 9, 9], {7: -1.0, 8: -1.0}, {9: -1.0}, {9: -1.0})]
    assert not difference(parted, tied, 0.06).problem
    assert "only 1 of 3" in difference(parted, tied, 0.06, least=0.5).problem
    assert "differ by inf" in difference([answer([7, 8], {3: -0.1}, {8: -0.2})], want, 0.06).problem


def fake_engines(monkeypatch: pytest.MonkeyPatch, script: list[Any]) -> list[EngineJob]:
    """Let engines find what a script says: a result for each task, or a failure."""
    asked: list[EngineJob] = []

    def run(job: EngineJob, log: Path, *, seconds: float, on_start: Any = lambda facts: None) -> Any:
        asked.append(job)
        on_start(FACTS)
        for number, _ in enumerate(job.tasks):
            found = script.pop(0)
            if isinstance(found, Exception):
                raise found
            yield number, found

    monkeypatch.setattr(run_serve, "run_engine", run)
    monkeypatch.setattr(run_serve, "check_installed", lambda method, on_cpu: None)
    monkeypatch.setattr(run_serve, "context_of", lambda settings, on_cpu: {"settings": settings})
    return asked


ONE = {"sequences": 1, "step_ms": [2.0], "first_token_s": [0.5]}
FULL = {"sequences": 9, "step_ms": [4.0], "fits": 9, "held_tokens": 80}


def test_a_cell_that_ends_its_engine_is_noted_and_the_others_get_a_new_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = ServePlan(model=str(tmp_path), out=tmp_path / "serve.json", methods=("bf16",), lengths=(1000, 2000))
    asked = fake_engines(monkeypatch, [ONE, EngineFailed("out of memory", 1), ONE, FULL])
    said: list[str] = []
    record = run_serve.run(plan, log=said.append)
    assert [row.status for row in record.rows] == ["timed", "failed", "timed", "timed"]
    assert record.rows[1].reason == "out of memory"
    assert [len(job.tasks) for job in asked] == [4, 2]
    assert any("9 sequences hold 80 tokens" in line for line in said)
    asked = fake_engines(monkeypatch, [FULL])
    again = run_serve.run(plan, log=said.append)  # what failed is tried again, what is there is kept
    assert [len(job.tasks) for job in asked] == [1]
    assert all(row.status == "timed" for row in again.rows)


def test_an_engine_that_does_not_start_fails_all_its_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = ServePlan(model=str(tmp_path), out=tmp_path / "serve.json", methods=("bf16",), lengths=(1000,))
    fake_engines(monkeypatch, [EngineFailed("no such backend", None)])
    record = run_serve.run(plan, log=lambda line: None)
    assert [(row.status, row.reason) for row in record.rows] == [("failed", "no such backend")] * 2


def test_a_gate_whose_engine_does_not_start_is_red_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = ServePlan(model=str(tmp_path), out=tmp_path / "serve.json", methods=("thrift",), lengths=(1000,))
    fake_engines(monkeypatch, [EngineFailed("no such backend", None)])
    record = run_serve.run(plan, log=lambda line: None)
    assert record.gate is not None
    assert record.gate.problem == "bf16: no such backend"
    assert ServeRecord.load(plan.out) == record


def test_no_speed_is_told_behind_a_red_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = ServePlan(model=str(tmp_path), out=tmp_path / "serve.json", methods=("thrift",), lengths=(1000,))
    plain = {"answers": [{"tokens": [7], "logprobs": [{7: -0.1}]}]}
    other = {"answers": [{"tokens": [7], "logprobs": [{7: -0.9}]}]}
    asked = fake_engines(monkeypatch, [plain, other])
    record = run_serve.run(plan, log=lambda line: None)
    assert record.gate is not None
    assert not record.gate.is_green
    assert [row.status for row in record.rows] == ["wrong"] * 2
    assert "logprobs differ by 0.8" in record.rows[0].reason
    assert [job.method for job in asked] == ["bf16", "thrift"]
    assert asked[1].thrift == {"budget": 1}
    fake_engines(monkeypatch, [plain, plain, ONE, FULL])
    assert all(row.status == "timed" for row in run_serve.run(plan, log=lambda line: None).rows)


@pytest.mark.skipif(find_spec("vllm") is not None and find_spec("vllm").origin is not None, reason="vLLM is installed")
def test_without_vllm_the_command_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="vLLM is not installed"):
        check_installed("bf16", on_cpu=True)
    found = CliRunner().invoke(app, ["bench", "serve", "--preset", "small", "-o", str(tmp_path / "serve.json")])
    assert found.exit_code == 2
    assert "vLLM is not installed: pip install" in found.output
    with pytest.raises(EngineFailed, match="No module named 'vllm'") as caught:
        list(run_engine(EngineJob(method="bf16", model="x"), tmp_path / "log.txt", seconds=60))
    assert caught.value.task is None


def test_engines_that_are_not_what_is_meant_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_jobs.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    monkeypatch.setattr(engine_jobs, "has_cpu_engine", lambda: False)
    monkeypatch.setattr(engine_jobs.importlib.metadata, "entry_points", lambda group: [])
    check_installed("fp8", on_cpu=False)
    with pytest.raises(ImportError, match="needs vLLM's CPU engine, and here is another"):
        check_installed("bf16", on_cpu=True)
    with pytest.raises(ImportError, match="vLLM does not see thrift-attn"):
        check_installed("thrift", on_cpu=False)


SILENT = """
import subprocess, time
class LLM:
    def __init__(self, **options):
        print("loading", flush=True)
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
def test_an_engine_that_says_nothing_is_ended_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm.py").write_text(SILENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    started: list[Any] = []
    begin = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: started.append(begin(*given, **how)) or started[-1])
    log = tmp_path / "log.txt"
    with pytest.raises(EngineFailed, match="nothing was heard of the engine for 20 s"):
        list(run_engine(EngineJob(method="bf16", model="x"), log, seconds=20))
    assert "loading" in log.read_text()
    assert started[0].poll() is not None
    assert not engine_process._lives(started[0].pid)


def test_options_that_are_no_json_are_refused(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", "serve", "--engine", "[1]", "-o", str(tmp_path / "serve.json")])
    assert found.exit_code == 2
    assert "--engine must be a JSON object" in found.output


def test_a_model_whose_weights_are_made_up_is_its_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.4")
    write_config(tmp_path, transformers.LlamaConfig(num_hidden_layers=3), "LlamaForCausalLM")
    found = json.loads((tmp_path / "config.json").read_text())
    assert (found["architectures"], found["num_hidden_layers"]) == (["LlamaForCausalLM"], 3)


def test_losses_through_the_engine_are_paired_and_kept_beside_the_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokens = np.arange(3 * 501).reshape(3, 501)
    noise = np.random.default_rng(0).normal(size=(3, 500))
    plain = 2.0 + noise
    asked = fake_engines(monkeypatch, [])
    script = {"bf16": plain, "thrift": plain + 0.01, "fp8": plain + 0.1 * noise[::-1]}

    def run(job: EngineJob, log: Path, *, seconds: float) -> Any:
        asked.append(job)
        yield 0, {"nll": script[job.method].tolist(), "seconds": 3.0}

    monkeypatch.setattr(served_nll, "run_engine", run)
    monkeypatch.setattr(served_nll, "check_installed", lambda method, on_cpu: None)
    monkeypatch.setattr(served_nll, "context_of", lambda settings, on_cpu: {"settings": settings})
    plan = ServedPlan(model="m", out=tmp_path / "served.json", texts=("a", "b", "c"))
    said: list[str] = []
    first = evaluate(plan, "folder", tokens, on_cpu=True, only=["thrift"], log=said.append)
    assert first.rows[0].losses[0].loss is None
    evaluate(plan, "folder", tokens, on_cpu=True, log=said.append)
    assert [job.method for job in asked] == ["thrift", "bf16", "fp8"]
    record = ServedRecord.load(plan.out)
    assert [row.method for row in record.rows] == ["bf16", "fp8", "thrift"]
    assert [one.text for one in record.rows[2].losses] == ["all", "a", "b", "c"]
    for one in record.rows[2].losses:  # the noise of texts is not that of the difference
        assert one.loss == pytest.approx(0.01, abs=1e-6)
        assert one.interval == pytest.approx((0.01, 0.01), abs=1e-6)
    assert np.array_equal(record.nll["tokens"], tokens)
    assert any("fp8: starting an engine for 3 texts of 501 tokens" in line for line in said)
    console = Console(width=150, record=True)
    console.print(record.table().drawn())
    assert "+0.0100 to +0.0100" in console.export_text()
    with pytest.raises(ValueError, match="another tokens_sha256"):
        evaluate(plan, "folder", tokens + 1, on_cpu=True)
    with pytest.raises(ValueError, match="methods are bf16, fp8, thrift, got turbo"):
        evaluate(plan, "folder", tokens, on_cpu=True, only=["turbo"])
