"""The figures that pictures and tables show, out of the records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from thrift_lab.bench.bench_records import BenchRecord, Speedup
from thrift_lab.eval.cost import costs
from thrift_lab.eval.dated import scored_before_default
from thrift_lab.eval.methods import from_description
from thrift_lab.records import before_today

ROOT = Path(__file__).parents[3]


def _results() -> Path:
    """The records: of the checkout that this is, or else that the current folder lies in, as a notebook's does."""
    found = [place / "benchmarks" / "results" for place in (ROOT, Path.cwd(), *Path.cwd().parents)]
    return next(filter(Path.is_dir, found), found[0])


RESULTS = _results()


@cache
def read(name: str) -> dict[str, Any]:
    """A record by its path below benchmarks/results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Loss:
    """Quality of a method on a text, and what its KV cache costs.

    Args:
        nats: above the model's own attention, per token.
        low: lower end of the 95% interval.
        high: upper end.
        reads: bytes that a decode step reads, a 16-bit cache being 1.
        stores: bytes that are kept, a 16-bit cache being 1.
        older: recorded before today's default.
    """

    nats: float
    low: float
    high: float
    reads: float
    stores: float
    older: bool


def loss(record: str, method: str, ours: bool = False) -> Loss:
    """A row of a record of ``thrift eval nll``.

    Args:
        record: its path below benchmarks/results.
        method: the name of the row.
        ours: whether the row speaks for the default of this package.
    """
    found = read(record)
    row = next(row for row in found["methods"] if row["name"] == method)
    done = from_description(method, row["config"])
    cost = costs(done, row["share_promoted"], found["model"]["head_dim"], found["length"])
    low, high = row["loss_interval"]
    older = ours and done.config is not None and scored_before_default(done.config)
    return Loss(row["loss"], low, high, cost.read, cost.stored, older)


@dataclass(frozen=True)
class Timed:
    """A decode or prefill case: our time beside the fastest baselines, in microseconds."""

    case: str
    speedup: Speedup
    older: bool


def timed(record: str, **wanted: Any) -> list[Timed]:
    """The cases of a record of ``thrift bench`` whose fields are as wanted, the default recipe only."""
    found = BenchRecord.load(RESULTS / record)
    rows = []
    for speedup in found.speedups():
        case = speedup.ours.case
        if case.config_name == "default" and all(getattr(case, name) == value for name, value in wanted.items()):
            rows.append(Timed(case.name, speedup, before_today(found.context["created"])))
    return rows
