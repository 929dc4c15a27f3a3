"""What ``thrift bench e2e`` leaves behind: cases, rows and the record of a whole model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from thrift_attn.config import BLOCK, Budget
from thrift_attn.reference.budget import promoted_in_decode
from thrift_lab.bench.bench_records import percentile
from thrift_lab.records import Record
from thrift_lab.sheet import Sheet

Side = Literal["transformers", "bf16", "thrift", "residuals"]
SIDES: dict[Side, str] = {
    "transformers": "SDPA and StaticCache as transformers has them",
    "bf16": "StaticCache, cuDNN attention over all slots, no mask",
    "thrift": "ThriftCache",
    "residuals": "ThriftCache in which a share of the blocks keeps its residual",
}
OURS: tuple[Side, ...] = ("thrift", "residuals")
"""Sides that are ours, not a baseline."""


@dataclass(frozen=True)
class ModelCase:
    """What is run.

    Args:
        context: slots of the cache when the last new token has been appended.
        batch: sequences.
        prompt: whether the model reads a prompt; else the cache is filled with random K and V and only decode is timed.
    """

    context: int
    batch: int
    prompt: bool

    @property
    def name(self) -> str:
        """For tables."""
        return f"B{self.batch} x {self.context:,}{'' if self.prompt else ', filled'}"


@dataclass(frozen=True)
class ModelRow:
    """One side of one case.

    Args:
        case: the case.
        side: whose cache and attention.
        status: ``"timed"``, ``"skipped"`` or ``"failed"``.
        reason: why there are no times.
        prefill_s: seconds for the prompt.
        first_token_s: until the first new token is on the host.
        decode_ms: milliseconds of every timed step.
        kv_bytes: bytes of K and V and what belongs to them, allocated for this context.
        peak_prefill: most bytes allocated on the device while the prompt was read, weights included.
        peak_decode: likewise while decoding.
        weights: bytes of the weights.
    """

    case: ModelCase
    side: Side
    status: Literal["timed", "skipped", "failed"]
    reason: str = ""
    prefill_s: float | None = None
    first_token_s: float | None = None
    decode_ms: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    peak_prefill: int | None = None
    peak_decode: int | None = None
    weights: int = 0

    @property
    def ours(self) -> bool:
        """Whether the row is ours, not a baseline."""
        return self.side in OURS

    @property
    def p50_ms(self) -> float:
        """Median milliseconds of a step."""
        return statistics.median(self.decode_ms)


class ModelRecord(Record):
    """A run of a whole model.

    Args:
        context: machine, versions, commit, settings.
        model: its name.
        check: relative distance of logits, see `check`.
        rows: results.
        largest: for each side the longest context that was held and decoded, with bytes and milliseconds.
        full: likewise the fullest batch of sequences of at least some length: ``sequences``, ``context``, ``tokens`` of all of
            them, ``peak`` bytes allocated and ``tokens_per_s`` besides.
    """

    kind: str = "e2e"
    model: str
    check: dict[str, float] = Field(default_factory=dict)
    rows: list[ModelRow] = Field(default_factory=list)
    largest: dict[str, dict[str, int | float]] = Field(default_factory=dict)
    full: dict[str, dict[str, int | float]] = Field(default_factory=dict)

    @classmethod
    def from_json(cls, found: dict[str, Any], path: Path) -> ModelRecord:
        """See `Record.from_json`; ``check`` was called ``gate``."""
        return cls.model_validate({**found, "check": found.get("check", found.get("gate", {}))})

    def baseline(self, case: ModelCase) -> ModelRow | None:
        """The fastest timed baseline of a case."""
        rows = [row for side in ("bf16", "transformers") if (row := self.row(case, side))]
        return min(rows, key=lambda row: row.p50_ms, default=None)

    def promoted_share(self, case: ModelCase) -> float:
        """Share of the complete KV blocks that a decode step of ours promotes when the cache is full."""
        budget = Budget.parse(self.context["settings"]["config"]["budget"])
        return promoted_in_decode(budget, case.context) / max(1, case.context // BLOCK)

    def table(self) -> Sheet:
        """See `Record.table`: all rows, and how far ahead of the fastest baseline ours are."""
        machine = self.context["machine"]["gpu"] or self.context["machine"]["cpu"]
        head = (
            "case",
            "side",
            "promoted",
            "prefill s",
            "first token s",
            "ms/token",
            "KV GiB",
            "peak GiB",
            "prefill",
            "decode",
        )
        found, styles = [], {}
        for at, row in enumerate(self.rows):
            if row.status != "timed":
                found.append((row.case.name, row.side, "", row.status, *[""] * 6))
                styles[at] = "yellow"
                continue
            if row.ours:
                styles[at] = "bold"
            base = self.baseline(row.case) if row.ours else None
            plain = self.row(row.case, "bf16")
            peak = max(row.peak_prefill or 0, row.peak_decode or 0)
            faster = plain.prefill_s / row.prefill_s if base and plain and plain.prefill_s and row.prefill_s else None
            found.append(
                (
                    row.case.name,
                    row.side,
                    f"{self.promoted_share(row.case):.1%}" if row.ours else "",
                    "" if row.prefill_s is None else f"{row.prefill_s:.2f}",
                    "" if row.first_token_s is None else f"{row.first_token_s:.2f}",
                    f"{row.p50_ms:.2f}",
                    f"{row.kv_bytes / 2**30:.2f}",
                    f"{peak / 2**30:.1f}",
                    "" if faster is None else f"{faster:.2f}x",
                    f"{base.p50_ms / row.p50_ms:.2f}x" if base else "",
                )
            )
        for side, row in self.full.items():
            sizes = (f"{row['decode_ms']:.2f}", f"{row['kv_bytes'] / 2**30:.2f}", f"{row.get('peak', 0) / 2**30:.1f}")
            rates = (f"{row['tokens']:,} tokens", f"{row['tokens_per_s']:,.0f}/s")
            found.append((f"fullest: B{row['sequences']} x {row['context']:,}", side, "", "", "", *sizes, *rates))
        return Sheet(head, found, f"{self.model} on {machine}", left=2, styles=styles)

    def row(self, case: ModelCase, side: Side) -> ModelRow | None:
        """The timed row of a side."""
        return next((r for r in self.rows if (r.case, r.side, r.status) == (case, side, "timed")), None)


def describe(row: ModelRow) -> str:
    """A row as a line of text."""
    head = f"{row.case.name:<22} {row.side:<13}"
    if row.status != "timed":
        return f"{head} {row.status}: {row.reason}"
    first = "" if row.prefill_s is None else f"prefill {row.prefill_s:.2f} s, first token {row.first_token_s:.2f} s, "
    low, high = (percentile(row.decode_ms, share) for share in (20, 80))
    peaks = [f"{x / 2**30:.1f}" for x in (row.peak_prefill, row.peak_decode) if x]
    return (
        f"{head} {first}decode {row.p50_ms:.2f} ms ({low:.2f} to {high:.2f}), KV {row.kv_bytes / 2**30:.2f} GiB, "
        f"peak {' and '.join(peaks)} GiB"
    )
