"""``thrift bench serve``: engines one after the other, a gate before the first speed, a record saved after every cell."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import thrift_attn
from thrift_lab.bench.e2e_model import SHAPES
from thrift_lab.console import Log
from thrift_lab.provenance import digest_of_sources
from thrift_lab.records import make_context
from thrift_lab.serving.engine_gate import NOISE, TOKENS, Answer, difference, gate_prompts
from thrift_lab.serving.engine_jobs import PACKAGES, Task, check_installed, write_config, write_tiny_model
from thrift_lab.serving.engine_process import EngineFailed, run_engine
from thrift_lab.serving.serve_plan import ServePlan
from thrift_lab.serving.serve_records import Cell, Gate, ServeRecord, ServeRow

ROOMS = ("kernels", "prefill", "decode", "reference", "cache", "vllm")
"""Folders of ``thrift_attn`` whose sources a record speaks for."""

GATE_WORDS = 256
"""Vocabulary of the model of the gate."""


def context_of(settings: dict[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """Machine, versions, commit, sources, settings; asked in a process of its own, which gives the GPU back.

    Raises:
        OSError: no CUDA device where one is needed.
    """
    sources = digest_of_sources(Path(thrift_attn.__file__).parent, ROOMS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        context = pool.submit(make_context, PACKAGES, sources=sources, settings=settings).result()
    if not on_cpu and context["machine"]["gpu"] is None:
        raise OSError(
            "no CUDA device here; vLLM's CPU engine runs thrift bench serve --preset small, and thrift eval serve"
        )
    return context


def run(plan: ServePlan, *, only: Iterable[str] = (), log: Log = print) -> ServeRecord:
    """Time the cells that are asked for and not in the record yet.

    Args:
        plan: what there is to time.
        only: see `ServePlan.cells`.
        log: called with a line for everything that begins or is found.

    Raises:
        ValueError: a record of something else in the place of this one.
        ImportError: no vLLM, or one that does not see thrift.
    """
    cells = plan.cells(only)
    for cell in {cell.method: cell for cell in cells}.values():
        check_installed(cell.method, on_cpu=plan.on_cpu)
    record = ServeRecord.open(plan.out, context_of(plan.settings, on_cpu=plan.on_cpu))
    todo = [cell for cell in cells if not record.done(cell)]
    log(f"{len(todo)} of {len(cells)} cells to time; engines write to {plan.log}")
    if any(cell.method == "thrift" for cell in todo) and not (record.gate and record.gate.is_green):
        record.gate = gate(plan, log)
        record.save(plan.out)
    with _model(plan) as (folder, options):
        for _, group in groupby(todo, key=lambda cell: (cell.round, cell.method)):
            _time(plan, list(group), record, folder, options, log)
    return record


def gate(plan: ServePlan, log: Log) -> Gate:
    """Let a tiny random model answer over pages of thrift, every block promoted, and over vLLM's own."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(Path(folder), words=GATE_WORDS))
        prompts = gate_prompts(GATE_WORDS)
        task = Task(do="answers", prompts=prompts, steps=TOKENS)
        small = {"max_model_len": 1024, "max_num_batched_tokens": 512, "max_num_seqs": 16}
        found: list[list[Answer]] = []
        for method in ("bf16", "thrift"):
            log(f"gate: {method} answers {len(prompts)} prompts of a tiny random model")
            job = plan.job(method, model, [task])
            job = job.model_copy(update={"thrift": {"budget": 1}, "options": {**job.options, **small}})
            try:
                ((_, result),) = run_engine(job, plan.log, seconds=plan.seconds)
            except EngineFailed as error:
                noise = NOISE[plan.dtype]
                return Gate(worst=float("inf"), noise=noise, compared=0, total=0, problem=f"{method}: {error.reason}")
            found.append([Answer(one["tokens"], one["logprobs"]) for one in result["answers"]])
    plain, ours = found
    seen = difference(ours, plain, NOISE[plan.dtype])
    told = f"gate: logprobs differ by up to {seen.worst:.3g} nats over {seen.compared} of {seen.total} tokens"
    log(f"{told}; {seen.problem or 'green'}")
    return Gate(noise=NOISE[plan.dtype], **seen._asdict())


@contextmanager
def _model(plan: ServePlan) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder of the model, and how its weights come."""
    if plan.model not in SHAPES:
        yield plan.model, {}
        return
    import transformers

    shape = SHAPES[plan.model]  # which leaves open how far positions go, and vLLM keeps angles of them all
    options = {**shape.common, **shape.options, "max_position_embeddings": max(plan.lengths)}
    config = getattr(transformers, shape.config)(**options)
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config, shape.config.replace("Config", "ForCausalLM"))
        yield folder, {"load_format": "dummy"}


def _time(
    plan: ServePlan, cells: list[Cell], record: ServeRecord, model: str, options: dict[str, Any], log: Log
) -> None:
    """Time cells of one method; one that ends its engine is noted, and the others get a new engine."""

    def note(row: ServeRow) -> None:
        record.put(row)
        record.save(plan.out)
        log(describe(row))

    method = cells[0].method
    if method == "thrift" and not (record.gate and record.gate.is_green):
        reason = "the gate is red: " + (record.gate.problem if record.gate else "it was not tried")
        for cell in cells:
            note(ServeRow(cell=cell, status="wrong", reason=reason))
        return
    left = list(cells)
    while left:
        facts: dict[str, Any] = {}
        log(f"{method}, round {left[0].round + 1}: starting an engine for {len(left)} cells")

        def started(said: dict[str, Any], facts: dict[str, Any] = facts) -> None:
            facts |= said
            log(f"started after {said['start_s']:.0f} s; it says that {said['kv_tokens']:,} tokens fit")

        job, now = plan.job(method, model, [plan.task(cell) for cell in left], **options), list(left)
        try:
            for number, found in run_engine(job, plan.log, seconds=plan.seconds, on_start=started):
                note(_row(now[number], facts, found))
                left.remove(now[number])
        except EngineFailed as error:
            at = now if error.task is None else [now[error.task]]
            for cell in [cell for cell in at if cell in left]:
                note(ServeRow(cell=cell, status="failed", reason=error.reason))
                left.remove(cell)


def _row(cell: Cell, facts: dict[str, Any], found: dict[str, Any]) -> ServeRow:
    """What an engine found, as a row."""
    told = {name: facts[name] for name in ("start_s", "kv_tokens", "memory_mib")} | found
    if not found["sequences"]:
        return ServeRow(cell=cell, status="skipped", reason="no sequence of this length fits", **told)
    if not found["step_ms"]:
        reason = (
            f"{found['fits']} sequences fit as the engine says, {found['sequences']} decoded before the first one ended"
        )
        return ServeRow(cell=cell, status="failed", reason=reason, **told)
    reason = f"{found['preemptions']:.0f} preemptions" if found.get("preemptions") else ""
    return ServeRow(cell=cell, status="timed", reason=reason, **told)


def describe(row: ServeRow) -> str:
    """A row as a line of text."""
    head = f"{row.cell.name}:"
    if row.status != "timed":
        return f"{head} {row.status}: {row.reason}"
    steps = sorted(row.step_ms)
    step = f"{steps[len(steps) // 2]:.2f} ms a step"
    if row.cell.part == "single":
        return f"{head} first token {min(row.first_token_s):.3f} s, {step}"
    rate = 1e3 * row.sequences * len(steps) / sum(steps)
    return (
        f"{head} {row.sequences} sequences hold {row.held_tokens:,} tokens, {step}, {rate:,.0f} tokens/s {row.reason}"
    )
