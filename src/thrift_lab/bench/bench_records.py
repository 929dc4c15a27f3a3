"""What a run leaves behind: one JSON file with everything that was measured, and how to read it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from thrift_attn.config import check_choice
from thrift_lab.bench.cases import Case, DecodeCase, PrefillCase
from thrift_lab.bench.check import Check
from thrift_lab.bench.timing import percentile
from thrift_lab.bench.variants import Kind
from thrift_lab.provenance import commit, machine, now, versions, write_json

SCHEMA = 1

CASES: dict[str, type[DecodeCase] | type[PrefillCase]] = {"decode": DecodeCase, "prefill": PrefillCase}
"""Kinds of records, and what their rows are about."""

Status = Literal["timed", "absent", "failed", "wrong", "skipped"]
"""``wrong``: the correctness gate was red, so there is no speed; ``skipped``: not asked for, no memory or no time."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel timed alone.

    Args:
        name: of the kernel.
        bytes: what it must move.
        runs_us: microseconds of every replay.
    """

    name: str
    bytes: int
    runs_us: list[float]

    @property
    def p50_us(self) -> float:
        """Median."""
        return percentile(self.runs_us, 0.5)


@dataclass(frozen=True)
class Row:
    """One method on one case.

    Args:
        case: what was computed; for a baseline the case's shape.
        method: name.
        kind: ``"thrift"``, ``"bf16"`` or ``"fp8"``.
        precision: operands in words.
        status: what came of it.
        reason: why there is no speed; empty when there is one.
        bytes: what the step must move.
        bytes_per_token: of the cache, one layer.
        setting: the fastest setting, the one that was timed.
        tried: median microseconds of every setting, or why it has none.
        checks: comparisons with float64, before and after the timing.
        runs_us: microseconds of every replay.
        kernels: kernels timed alone.
        profile: microseconds per step by kernel name, as the profiler saw them in an ordinary launch.
        notes: what went wrong beside the timing.

    Raises:
        ValueError: times without green checks, or a timed row without times.
    """

    case: Case
    method: str
    kind: Kind
    precision: str
    status: Status
    reason: str = ""
    bytes: int = 0
    bytes_per_token: float = 0.0
    setting: str = ""
    tried: dict[str, float | str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    runs_us: list[float] = field(default_factory=list)
    kernels: list[KernelTime] = field(default_factory=list)
    profile: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("status", self.status, Status)
        check_choice("kind", self.kind, Kind)
        if (self.status == "timed") != bool(self.runs_us):
            raise ValueError(f"a row has times exactly when its status is 'timed', got {self.status!r}")
        if self.runs_us and not (self.checks and all(check.ok for check in self.checks)):
            raise ValueError(f"{self.method} on {self.case.name}: no speed without a green correctness gate")
        if self.status != "timed" and not self.reason:
            raise ValueError(f"{self.method} on {self.case.name} has no times and no reason why")

    @property
    def p50_us(self) -> float:
        """Median microseconds; only of a timed row."""
        return percentile(self.runs_us, 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, percentiles included."""
        found = asdict(self)
        if self.runs_us:
            found |= {f"p{at}_us": percentile(self.runs_us, at / 100) for at in (20, 50, 80)}
        return found

    @classmethod
    def from_dict(cls, found: dict[str, Any], kind: str = "decode") -> Row:
        """The inverse of `to_dict`."""
        rest = {key: value for key, value in found.items() if not (key.startswith("p") and key.endswith("0_us"))}
        rest["case"] = CASES[kind](**rest["case"])
        rest["checks"] = [Check(**check) for check in rest["checks"]]
        rest["kernels"] = [KernelTime(**kernel) for kernel in rest["kernels"]]
        return cls(**rest)


@dataclass
class Record:
    """A run: where, when, with what, and its rows.

    Args:
        context: machine, versions, commit, settings.
        copy: bytes per second of a device-to-device copy (read and written), measured in this run.
        matmul: FLOP per second of a bfloat16 matrix product, measured in this run.
        rows: results in the order they were made.
        kind: ``"decode"`` or ``"prefill"``.
    """

    context: dict[str, Any]
    copy: float
    matmul: float
    rows: list[Row] = field(default_factory=list)
    kind: str = "decode"

    def save(self, path: Path) -> None:
        """Write the JSON file whole or not at all; its folder is made."""
        found = {
            "kind": self.kind,
            "schema": SCHEMA,
            "context": self.context,
            "copy_bytes_per_s": self.copy,
            "matmul_flop_per_s": self.matmul,
            "rows": [row.to_dict() for row in self.rows],
        }
        write_json(path, found)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a file that `save` wrote.

        Raises:
            ValueError: another kind of file or an unknown schema.
        """
        found = json.loads(path.read_text())
        kind = found.get("kind") if isinstance(found, dict) else None
        if kind not in CASES or found.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a {' or '.join(CASES)} record of schema {SCHEMA}")
        rows = [Row.from_dict(row, kind) for row in found["rows"]]
        return cls(found["context"], found["copy_bytes_per_s"], found["matmul_flop_per_s"], rows, kind)

    def find(self, case: Case, method: str) -> Row | None:
        """The row of a method on a case."""
        return next((row for row in self.rows if row.case == case and row.method == method), None)

    def speedups(self) -> list[Speedup]:
        """Our timed rows against the fastest timed baselines on the same shape."""
        found = []
        for row in self.rows:
            if row.kind == "thrift" and row.status == "timed":
                best = {
                    kind: min(
                        (r for r in self.rows if r.kind == kind and r.status == "timed" and r.case == row.case.shape),
                        key=lambda r: r.p50_us,
                        default=None,
                    )
                    for kind in ("bf16", "fp8")
                }
                found.append(Speedup(row, best["bf16"], best["fp8"]))
        return found


@dataclass(frozen=True)
class Speedup:
    """One of our rows and the fastest baselines beside it; None where no baseline of that precision was timed."""

    ours: Row
    bf16: Row | None
    fp8: Row | None

    def over(self, kind: Literal["bf16", "fp8"]) -> float | None:
        """How many times faster than the fastest baseline of that kind."""
        other = getattr(self, kind)
        return None if other is None else other.p50_us / self.ours.p50_us

    def ceiling(self, kind: Literal["bf16", "fp8"]) -> float | None:
        """The same if both moved their bytes at one speed."""
        other = getattr(self, kind)
        return None if other is None else other.bytes / self.ours.bytes


PACKAGES = ("torch", "triton", "fa3_fwd", "flash_attn", "flashinfer-python", "sageattention", "apache-tvm-ffi", "numpy")


def make_context(settings: dict[str, Any]) -> dict[str, Any]:
    """Everything needed to know what was measured.

    Args:
        settings: of the run.
    """
    return {
        "created": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "settings": settings,
    }
