"""What a run leaves behind: one JSON file with everything that was measured, and how to read it again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, InstanceOf

from thrift_attn.config import check_choice
from thrift_lab import records
from thrift_lab.bench.cases import Case, DecodeCase, PrefillCase
from thrift_lab.bench.check import Check
from thrift_lab.bench.variants import Kind
from thrift_lab.sheet import Sheet

CASES: dict[str, type[DecodeCase] | type[PrefillCase]] = {"decode": DecodeCase, "prefill": PrefillCase}
"""Kinds of records, and what their rows are about."""

OLD_NAMES = {"high": "promoted_storage", "low": "base_format", "math": "compute", "recipe": "config_name"}
"""What older records call the fields of a case."""

Status = Literal["timed", "absent", "failed", "wrong", "skipped"]
"""``wrong``: the correctness check failed, so there is no speed; ``skipped``: not asked for, no memory or no time."""


def percentile(runs: Sequence[float], percent: int) -> float:
    """Return a percentile of some runs by linear interpolation, 1 to 99; a single run is its own."""
    if len(runs) == 1:
        return runs[0]
    return statistics.quantiles(runs, n=100, method="inclusive")[percent - 1]


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
        """Median microseconds."""
        return statistics.median(self.runs_us)


@dataclass(frozen=True)
class BenchRow:
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
        ignored: options of our configuration that have no effect in it; None for a baseline, and in records from before.

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
    ignored: list[str] | None = None

    def __post_init__(self) -> None:
        check_choice("status", self.status, Status)
        check_choice("kind", self.kind, Kind)
        if (self.status == "timed") != bool(self.runs_us):
            raise ValueError(f"a row has times exactly when its status is 'timed', got {self.status!r}")
        if self.runs_us and not (self.checks and all(check.ok for check in self.checks)):
            raise ValueError(f"{self.method} on {self.case.name}: no speed without a passed correctness check")
        if self.status != "timed" and not self.reason:
            raise ValueError(f"{self.method} on {self.case.name} has no times and no reason why")

    @property
    def ours(self) -> bool:
        """Whether the row is one of ours, not a baseline."""
        return self.kind == "thrift"

    @property
    def p50_us(self) -> float:
        """Median microseconds; only of a timed row."""
        return statistics.median(self.runs_us)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, percentiles included."""
        row = asdict(self)
        if self.runs_us:
            row |= {f"p{at}_us": percentile(self.runs_us, at) for at in (20, 50, 80)}
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any], kind: str = "decode") -> BenchRow:
        """Return the row that `to_dict` wrote, in this or an older version."""
        row = {key: value for key, value in row.items() if not (key.startswith("p") and key.endswith("0_us"))}
        case: dict[str, Any] = {OLD_NAMES.get(key) or key: value for key, value in row["case"].items()}
        row["case"] = CASES[kind](**case)
        row["checks"] = [Check(**check) for check in row["checks"]]
        row["kernels"] = [KernelTime(**kernel) for kernel in row["kernels"]]
        return cls(**row)


class BenchRecord(records.Record):
    """A run of kernels: where, when, with what, and its rows.

    Args:
        context: machine, versions, commit, settings.
        copy_bytes_per_s: rate of a device-to-device copy (read and written), measured in this run.
        matmul_flop_per_s: rate of a bfloat16 matrix product, measured in this run.
        rows: results in the order they were made.
        kind: ``"decode"`` or ``"prefill"``.
    """

    KINDS: ClassVar[tuple[str, ...]] = tuple(CASES)

    kind: str = "decode"
    copy_bytes_per_s: float
    matmul_flop_per_s: float
    rows: list[InstanceOf[BenchRow]] = Field(default_factory=list)

    @classmethod
    def from_json(cls, found: dict[str, Any], path: Path) -> BenchRecord:
        """See `Record.from_json`."""
        return cls(**{**found, "rows": [BenchRow.from_dict(row, found["kind"]) for row in found["rows"]]})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, percentiles of the rows included."""
        head = self.model_copy(update={"rows": []})
        return {**super(BenchRecord, head).to_json(), "rows": [row.to_dict() for row in self.rows]}

    def table(self) -> Sheet:
        """See `Record.table`: all rows, and how far ahead of the fastest baselines ours are."""
        speed = ("TFLOP/s", "of matmul") if self.kind == "prefill" else ("of copy", "bytes/token")
        over = {id(one.ours): one for one in self.speedups()}
        found, styles = [], {}
        for at, row in enumerate(self.rows):
            if row.status != "timed":
                found.append((row.case.name, row.method, "", row.status, *[""] * 5))
                styles[at] = "yellow"
                continue
            if row.ours:
                styles[at] = "bold"
            ahead = over.get(id(row))
            ratios = ["" if not ahead or (x := ahead.over(kind)) is None else f"{x:.2f}x" for kind in ("bf16", "fp8")]
            found.append(
                (
                    row.case.name,
                    row.method,
                    f"{row.case.promoted_share:.1%}" if row.ours else "",
                    f"{row.p50_us:,.1f}",
                    *self._rates(row),
                    f"{max(check.error or 0.0 for check in row.checks):.1e}",
                    *ratios,
                )
            )
        head = ("case", "method", "promoted", "p50 us", *speed, "error", "over BF16", "over FP8")
        return Sheet(head, found, f"{self.kind.title()} on {self.context['machine']['gpu']}", left=2, styles=styles)

    def _rates(self, row: BenchRow) -> tuple[str, str]:
        """What a timed row reaches of this GPU's rates, in words."""
        if self.kind == "prefill":
            rate = row.case.flops / row.p50_us * 1e6
            return f"{rate / 1e12:.0f}", f"{rate / self.matmul_flop_per_s:.0%}"
        return f"{row.bytes / row.p50_us * 1e6 / self.copy_bytes_per_s:.0%}", f"{row.bytes_per_token:,.0f}"

    def find(self, case: Case, method: str) -> BenchRow | None:
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

    ours: BenchRow
    bf16: BenchRow | None
    fp8: BenchRow | None

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
    """Return everything needed to know what was measured.

    Args:
        settings: of the run.
    """
    return records.make_context(PACKAGES, settings=settings)
