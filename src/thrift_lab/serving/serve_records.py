"""What ``thrift bench serve`` leaves behind: cells, rows and gates, in one record that several calls may fill."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Field
from typing_extensions import Self

from thrift_lab.records import Record
from thrift_lab.serving.engine_jobs import MethodName

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

    KINDS: ClassVar[tuple[str, ...]] = ("serve",)

    kind: str = "serve"
    gate: Gate | None = None
    rows: list[ServeRow] = Field(default_factory=list)

    def put(self, row: ServeRow) -> None:
        """Add a row, in the place of an earlier one of its cell."""
        self.rows = [one for one in self.rows if one.cell != row.cell] + [row]

    def done(self, cell: Cell) -> bool:
        """Whether a cell needs no further run."""
        return any(row.cell == cell and row.done for row in self.rows)

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
