"""``thrift eval serve``: the loss of every token of texts as vLLM's engine tells it, over pages of thrift, 16 bits and FP8.

Prompts go through the engine as a user's do: a first part, then others over the pages of those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from thrift_lab.console import Log
from thrift_lab.eval.bootstrap import Bootstrap, Interval, between, interval
from thrift_lab.eval.run_nll import beside
from thrift_lab.records import digest, load_arrays, pack_arrays
from thrift_lab.serving.engine_jobs import (
    METHODS,
    EngineJob,
    MethodName,
    Task,
    check_installed,
    check_methods,
    engine_options,
)
from thrift_lab.serving.engine_process import run_engine
from thrift_lab.serving.run_serve import context_of
from thrift_lab.serving.serve_records import GrownRecord
from thrift_lab.sheet import Sheet

PLAIN: MethodName = "bf16"
"""What losses are over."""

Arrays = dict[str, "np.ndarray[Any, Any]"]


class Loss(BaseModel):
    """What a method loses over 16-bit pages.

    Args:
        text: which, or ``"all"``.
        nll: nats a token.
        loss: less that of 16-bit pages; None where those were not run.
        interval: 95%, paired, of ``loss``.
    """

    text: str
    nll: float
    loss: float | None = None
    interval: Interval | None = None


class ServedRow(BaseModel):
    """One method.

    Args:
        method: whose pages.
        losses: of all texts together, then of each.
        seconds: that the engine took for all of them.
    """

    method: MethodName
    losses: list[Loss]
    seconds: float


class ServedRecord(GrownRecord):
    """Losses through the engine; those of every token lie beside the record.

    Args:
        rows: by method.
        nll: float32 ``[texts, length - 1]`` by method, in nats, and ``tokens`` int64 ``[texts, length]``.
    """

    kind: str = "served-nll"
    rows: list[ServedRow] = Field(default_factory=list)
    nll: Arrays = Field(default_factory=dict, exclude=True)

    def save(self, path: Path) -> None:
        """Write the record and the loss of every token, both or neither."""
        arrays = pack_arrays(self.nll)
        names = {"per_token": beside(path).name, "per_token_sha256": digest(arrays)}
        self.model_copy(update={"context": {**self.context, **names}})._write(path, {beside(path): arrays})

    @classmethod
    def from_json(cls, found: dict[str, Any], path: Path) -> ServedRecord:
        """See `Record.from_json`."""
        context = found["context"]
        arrays = load_arrays(path.with_name(context.pop("per_token")), context.pop("per_token_sha256"))
        return cls.model_validate({**found, "nll": arrays})

    def table(self) -> Sheet:
        """Return losses over 16-bit pages, of all texts together and of each."""
        settings = self.context["settings"]
        rows = []
        for row in self.rows:
            for one in row.losses:
                told = one.loss is not None and row.method != PLAIN
                over = [f"{one.loss:+.4f}", between(one.interval)] if told else ["", ""]
                rows.append([row.method, one.text, f"{one.nll:.4f}", *over])
        title = f"{settings['model']} in vLLM, {settings['length']:,} tokens of each text, nats a token"
        return Sheet(("method", "text", "NLL", f"over {PLAIN}", "95%"), rows, title=title, left=2)

    def add(self, method: MethodName, nll: np.ndarray[Any, Any], seconds: float) -> None:
        """Take the losses of a method, ``[texts, length - 1]``, and work out all rows anew."""
        spent = {row.method: row.seconds for row in self.rows} | {method: seconds}
        self.nll = {**self.nll, method: nll.astype(np.float32)}
        texts = self.context["settings"]["texts"]
        plain = self.nll.get(PLAIN)
        self.rows = [
            ServedRow(method=name, losses=_losses(self.nll[name], plain, texts), seconds=spent[name])
            for name in METHODS
            if name in spent
        ]


def _losses(nll: np.ndarray[Any, Any], plain: np.ndarray[Any, Any] | None, texts: Sequence[str]) -> list[Loss]:
    """All texts together, then each."""
    parts = [("all", slice(None)), *((name, slice(at, at + 1)) for at, name in enumerate(texts))]
    found = []
    for name, rows in parts:
        mine = nll[rows].astype(np.float64)
        one = Loss(text=name, nll=float(mine.mean()))
        if plain is not None:
            lost = mine - plain[rows]
            one.loss, one.interval = float(lost.mean()), interval(Bootstrap.over(*lost.shape).means(lost))
        found.append(one)
    return found


@dataclass(frozen=True, kw_only=True)
class ServedPlan:
    """What to run.

    Args:
        model: what the user called it.
        out: the record's file.
        texts: their names.
        methods: whose pages.
        chunk: tokens of a step.
        memory: share of a GPU's memory for an engine: logits of a whole chunk need much beside it.
        ranks: GPUs of an engine.
        dtype: of weights and of K and V.
        thrift: options of its section.
        engine: further options of ``vllm.LLM``, for all methods.
        seconds: that an engine may take to start, or for all texts.
    """

    model: str
    out: Path
    texts: tuple[str, ...]
    methods: tuple[MethodName, ...] = tuple(METHODS)
    chunk: int = 8192
    memory: float = 0.6
    ranks: int = 1
    dtype: str = "bfloat16"
    thrift: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    seconds: float = 1800.0

    def __post_init__(self) -> None:
        check_methods(self.methods)

    def job(self, method: MethodName, folder: str, tokens: list[list[int]], *, on_cpu: bool) -> EngineJob:
        """An engine of a method."""
        options = engine_options(
            dtype=self.dtype,
            tokens=len(tokens[0]) + 1,
            sequences=4,
            chunk=self.chunk,
            memory=self.memory,
            ranks=self.ranks,
        )
        if on_cpu:
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
        return EngineJob(
            method=method, model=folder, on_cpu=on_cpu, thrift=self.thrift, options={**options, **self.engine},
            tasks=[Task(do="nll", prompts=tokens)],
        )  # fmt: skip


def evaluate(
    plan: ServedPlan,
    folder: str,
    tokens: np.ndarray[Any, Any],
    *,
    on_cpu: bool,
    only: Sequence[str] = (),
    log: Log = print,
) -> ServedRecord:
    """Losses of the methods that are asked for and not in the record yet; saved after each.

    Args:
        plan: what there is to run.
        folder: of the model.
        tokens: int64 ``[texts, length]``.
        on_cpu: whether vLLM's CPU engine is meant.
        only: methods of this call; all by default.
        log: called with a line for everything that begins or is found.

    Raises:
        ValueError: a record of something else in the place of this one, or an unknown method.
        ImportError: no vLLM, or one that does not see thrift.
        EngineFailed: an engine ended too soon.
    """
    check_methods(only, plan.methods)
    wanted: list[MethodName] = [method for method in plan.methods if not only or method in only]
    for method in wanted:
        check_installed(method, on_cpu=on_cpu)
    settings = {
        "model": plan.model, "texts": list(plan.texts), "length": tokens.shape[1],
        "tokens_sha256": digest(tokens.astype(np.int64).tobytes()), "chunk": plan.chunk, "ranks": plan.ranks,
        "dtype": plan.dtype, "thrift": plan.thrift, "engine": plan.engine, "on_cpu": on_cpu,
    }  # fmt: skip
    record = ServedRecord.open(plan.out, context_of(settings, on_cpu=on_cpu))
    record.nll.setdefault("tokens", tokens)
    for method in wanted:
        if method in record.nll:
            continue
        log(f"{method}: starting an engine for {len(tokens)} texts of {tokens.shape[1]:,} tokens")
        job = plan.job(method, folder, tokens.tolist(), on_cpu=on_cpu)
        ((_, found),) = run_engine(job, plan.out.with_suffix(".log"), seconds=plan.seconds)
        record.add(method, np.array(found["nll"]), found["seconds"])
        record.save(plan.out)
        log(describe(next(row for row in record.rows if row.method == method)))
    return record


def describe(row: ServedRow) -> str:
    """A row as a line of text."""
    whole = row.losses[0]
    told = f"{row.method}: {whole.nll:.4f} nats a token after {row.seconds:.0f} s"
    if row.method == PLAIN or whole.loss is None:
        return told
    limits = f" ({between(whole.interval)})" if whole.interval else ""
    return f"{told}, {whole.loss:+.4f}{limits} over {PLAIN}"
