"""What ``thrift bench serve`` leaves behind: cells, rows and gates, in one record that several calls may fill."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field
from typing_extensions import Self

from thrift_lab.records import Record
from thrift_lab.serving.engine_jobs import MethodName
from thrift_lab.sheet import Sheet

Part = Literal["single", "capacity"]
PARTS: dict[Part, str] = {"single": "one sequence alone", "capacity": "as many sequences as fit"}

SAME_MACHINE = ("cpu", "gpu", "memory_bytes", "driver_version")
"""What of a machine must agree; clocks and temperatures move."""


class Cell(NamedTuple):
    """What is timed at once.

    Args:
        method: whose pages.
        length: tokens of a sequence when it ends.
        part: one sequence alone, or as many as fit.
        round: an engine is started anew for each.
    """

    method: MethodName
    length: int
    part: Part
    round: int

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.method}/{self.length}/{self.part}, round {self.round + 1}"


class ServeRow(BaseModel):
    """What was found in a cell.

    Args:
        cell: which.
        status: ``"timed"``; ``"skipped"``: no sequence of this length fits; ``"failed"``; ``"wrong"``: the gate is red, so
            there is no speed.
        reason: why there are no times, or what is odd about them.
        start_s: seconds that the engine took to start.
        kv_tokens: tokens that fit, as the engine says at its start.
        fits: sequences of this length that its pool has blocks for.
        sequences: that decoded at once.
        held_tokens: tokens that they held at the end of the timed steps.
        first_token_s: seconds to the first token of each timed prompt.
        step_ms: milliseconds between tokens, that is of every timed step.
        whole_s: seconds from the first prompt of all to the end of the timed steps.
        preemptions: requests that were put back meanwhile.
        memory_mib: MiB in use on each GPU at the end.
    """

    cell: Cell
    status: Literal["timed", "skipped", "failed", "wrong"]
    reason: str = ""
    start_s: float | None = None
    kv_tokens: int | None = None
    fits: int | None = None
    sequences: int = 0
    held_tokens: int | None = None
    first_token_s: list[float] = Field(default_factory=list)
    step_ms: list[float] = Field(default_factory=list)
    whole_s: float | None = None
    preemptions: float = 0
    memory_mib: list[int] | None = None

    @property
    def ours(self) -> bool:
        """Whether the row is ours, not a baseline."""
        return self.cell.method == "thrift"

    @property
    def done(self) -> bool:
        """Whether there is nothing to try again."""
        return self.status in ("timed", "skipped")


class Gate(BaseModel):
    """Answers of a tiny random model with every block promoted, beside those of vLLM's own attention.

    Args:
        worst: largest difference of a logprob, in nats.
        noise: what is allowed.
        compared: tokens before texts part at a tie.
        total: tokens.
        problem: what is wrong, or nothing.
    """

    worst: float
    noise: float
    compared: int
    total: int
    problem: str = ""

    @property
    def is_green(self) -> bool:
        """Whether speeds count."""
        return not self.problem


class GrownRecord(Record):
    """A record that several calls may fill, where all agree in what they ran."""

    @classmethod
    def open(cls, path: Path, context: dict[str, Any]) -> Self:
        """Return the record in a file that another call left, or a new one.

        Args:
            path: of the record.
            context: of this call.

        Raises:
            ValueError: what is there is of another commit, machine or setting, or no such record.
        """
        if not path.exists():
            return cls(kind=cls.KINDS[0], context=context)
        found = cls.load(path)
        if differing := differences(found.context, context):
            raise ValueError(f"{path} has runs of another {', '.join(differing)}: name another file with --out")
        return found


class ServeRecord(GrownRecord):
    """Methods side by side in vLLM on one machine.

    Args:
        context: machine, versions, commit, digest of the sources, settings.
        gate: of thrift; None before it was tried.
        rows: one for each cell that was tried.
    """

    kind: str = "serve"
    gate: Gate | None = None
    rows: list[ServeRow] = Field(default_factory=list)

    def put(self, row: ServeRow) -> None:
        """Add a row, in the place of an earlier one of its cell."""
        self.rows = [one for one in self.rows if one.cell != row.cell] + [row]

    def done(self, cell: Cell) -> bool:
        """Whether a cell needs no further run."""
        return any(row.cell == cell and row.done for row in self.rows)

    def join(self, other: ServeRecord, path: Path) -> None:
        """Take the rows and the gate of another call's record, and note when that call was made.

        Of two gates the worse one stays.

        Args:
            other: that record.
            path: of its file, for what is refused.

        Raises:
            ValueError: a record of another commit, machine or setting, or a cell that has been timed in both.
        """
        if differing := differences(self.context, other.context):
            raise ValueError(f"{path} cannot be joined: runs of another {', '.join(differing)}")
        if twice := [row.cell.name for row in other.rows if row.done and self.done(row.cell)]:
            raise ValueError(f"{path} cannot be joined: both have {twice[0]}")
        for row in other.rows:
            if not self.done(row.cell):
                self.put(row)
        gates = [gate for gate in (self.gate, other.gate) if gate is not None]
        self.gate = max(gates, key=lambda gate: (not gate.is_green, gate.worst), default=None)
        note = {"created": other.context["created"], "cells": [row.cell.name for row in other.rows]}
        self.context = {**self.context, "joined": [*self.context.get("joined", []), note]}

    def of(self, method: str, length: int, part: Part) -> list[ServeRow]:
        """The timed rows of all rounds."""
        wanted = (method, length, part)
        return [row for row in self.rows if row.status == "timed" and row.cell[:3] == wanted]

    def figures(self, method: str, length: int) -> Figures:
        """What is told of a method at a length, all rounds together."""
        alone, full = self.of(method, length, "single"), self.of(method, length, "capacity")
        firsts = [x for row in alone for x in row.first_token_s]
        step, full_step = ([x for row in rows for x in row.step_ms] for rows in (alone, full))
        held = min((row.held_tokens or 0 for row in full), default=None)
        sequences = min((row.sequences for row in full), default=None)
        return Figures(
            kv_tokens=min((row.kv_tokens or 0 for row in (*alone, *full)), default=None),
            held_tokens=held,
            sequences=sequences,
            first_token_s=statistics.median(firsts) if firsts else None,
            step_ms=statistics.median(step) if step else None,
            full_step_ms=statistics.median(full_step) if full_step else None,
            decoded_per_s=_rate(full),
        )

    def table(self) -> Sheet:
        """Return methods at each length, and thrift over the others."""
        settings, machine = self.context["settings"], self.context["machine"]
        rows: list[list[str]] = []
        dim = {}
        for length in settings["lengths"]:
            found = {method: self.figures(method, length) for method in settings["methods"]}
            for method, one in found.items():
                pairs = zip(one, FORMS.values(), strict=True)
                rows.append([f"{length:,}", method, *("" if x is None else format(x, form) for x, form in pairs)])
            for method, one in found.items():
                if method == "thrift" or "thrift" not in found:
                    continue
                pairs = zip(found["thrift"], one, strict=True)
                ratios = [f"{ours / other:.2f}x" if ours and other else "" for ours, other in pairs]
                if any(ratios):
                    dim[len(rows)] = "dim"
                    rows.append(["", f"thrift / {method}", *ratios])
        title = f"{settings['model']} in vLLM on {machine['gpu'] or machine['cpu']}"
        return Sheet(("tokens", "method", *FORMS), rows, title=title, left=2, styles=dim)


FORMS = {
    "fit, it says": ",.0f",
    "held": ",.0f",
    "sequences": ",.0f",
    "first token s": ".3f",
    "ms/token alone": ".2f",
    "ms/step full": ".2f",
    "tokens/s full": ",.0f",
}
"""Columns of a table, one for each of `Figures`, and how their numbers are written."""


def join(out: Path, paths: Iterable[Path]) -> ServeRecord:
    """Add records of other calls to the one in a file, which is made of the first of them where there is none, and save it.

    Raises:
        FileNotFoundError: no such record.
        ValueError: see `ServeRecord.join`; nothing is written then.
    """
    others = [(path, ServeRecord.load(path)) for path in paths]
    record = ServeRecord.load(out) if out.exists() else others.pop(0)[1]
    for path, other in others:
        record.join(other, path)
    record.save(out)
    return record


class Figures(NamedTuple):
    """What is told of a method at a length; None where nothing was timed.

    Args:
        kv_tokens: that fit, as the engine says.
        held_tokens: that were held while all of them decoded.
        sequences: that decoded at once.
        first_token_s: seconds, median.
        step_ms: milliseconds a token of one sequence alone, median.
        full_step_ms: milliseconds of a step of all of them, median.
        decoded_per_s: tokens that all of them decode in a second.
    """

    kv_tokens: int | None
    held_tokens: int | None
    sequences: int | None
    first_token_s: float | None
    step_ms: float | None
    full_step_ms: float | None
    decoded_per_s: float | None


def _rate(rows: list[ServeRow]) -> float | None:
    """Tokens a second over the timed steps."""
    tokens = sum(row.sequences * len(row.step_ms) for row in rows)
    return 1e3 * tokens / sum(sum(row.step_ms) for row in rows) if tokens else None


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return what keeps runs of two contexts from standing in one record, in words."""
    found = [name for name in ("commit", "sources", "versions") if one.get(name) != other.get(name)]
    machines = [{key: x.get("machine", {}).get(key) for key in SAME_MACHINE} for x in (one, other)]
    if machines[0] != machines[1]:
        found.append("machine")
    mine, theirs = (x.get("settings", {}) for x in (one, other))
    found += [
        f"{key} ({mine.get(key)}, now {theirs.get(key)})"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]
    return found
