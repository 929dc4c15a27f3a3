"""What a report is about: folders of `thrift eval suite` and records of `thrift eval nll`, one run for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK
from thrift_lab.eval.methods import from_description
from thrift_lab.eval.run_nll import NLLRecord
from thrift_lab.eval.speed import SPEED_KINDS
from thrift_lab.eval.suite_folder import Folder, SuitePlan
from thrift_lab.eval.summary import summarise
from thrift_lab.records import MARK, kind_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run with its metrics, finished or not."""

    name: str
    plan: dict[str, Any]
    environments: list[dict[str, Any]]
    metrics: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """From its folder; metrics are worked out anew.

        Raises:
            FileNotFoundError: no run there.
            ValueError: a run of another schema, or one without a single result.
        """
        plan, environments, records = Folder(folder).load()
        if not records:
            raise ValueError(f"{folder} holds no results yet")
        head_dim = environments[-1]["model"]["head_dim"] if environments else 128
        methods = [from_description(name, described) for name, described in plan["computed"].items()]
        return cls(folder.name, plan, environments, summarise(methods, records, head_dim))

    @classmethod
    def of_records(cls, paths: Sequence[Path]) -> Run:
        """One run from records of `thrift eval nll` of one model, a text or a length each.

        Raises:
            FileNotFoundError: no such record.
            ValueError: not such records, or records of different models.
        """
        results = _newest([NLLRecord.load(path) for path in paths])
        contexts = [result.context for result in results]
        if len({context["model"]["spec"] for context in contexts}) > 1:
            raise ValueError(f"records of one model expected, got {', '.join(c['model']['spec'] for c in contexts)}")
        methods = {row.method.name: row.method for result in results for row in result.rows}
        plan = SuitePlan(
            model=contexts[0]["model"]["spec"],
            methods=",".join(methods),
            texts=tuple(dict.fromkeys(context["text"]["spec"] for context in contexts)),
            nll_lengths=tuple(sorted({context["length"] for context in contexts})),
            windows=max(context["windows"] for context in contexts),
        )
        environments = [
            {
                "started": c["created"],
                **{key: c[key] for key in ("commit", "device", "model", "versions")},
                "dtype": c["model"]["dtype"],
            }
            for c in contexts
        ]
        model = contexts[0]["model"]
        head_dim = model["head_dim"] or model["hidden_size"] // model["num_attention_heads"]
        records = [line for result in results for line in lines_of(result)]
        name = ", ".join(path.stem for path in paths)
        return cls(name, plan.to_dict(), environments, summarise(list(methods.values()), records, head_dim))

    def with_others(self, others: Sequence[Run]) -> Run:
        """This run with what it lacks (NLL, tasks, error concentration) from other runs of the same model."""
        metrics = dict(self.metrics)
        for other in (_apart(other, metrics["methods"]) for other in others):
            known = {row["name"] for row in metrics["methods"]}
            metrics["methods"] = metrics["methods"] + [
                row for row in other.metrics["methods"] if row["name"] not in known
            ]
            for part in ("nll", "tasks"):  # lengths that are not there yet
                lengths = {row["length"] for row in metrics[part]}
                metrics[part] = metrics[part] + [row for row in other.metrics[part] if row["length"] not in lengths]
            metrics["positions"] = metrics["positions"] or other.metrics["positions"]
            both = metrics["concentration"] + other.metrics["concentration"]
            metrics["concentration"] = sorted(both, key=lambda row: -row["length"])  # the report shows the first
        plan = dict(self.plan)
        for other in others:
            for key in ("tasks", "lengths", "concentration"):
                plan[key] = plan[key] or other.plan[key]
            if other.plan["tasks"] and plan["tasks"] == other.plan["tasks"]:
                plan |= {key: other.plan[key] for key in ("samples", "max_new", "chat", "data", "seed")}
        environments = [entry for run in (self, *others) for entry in run.environments]
        return replace(self, metrics=metrics, plan=plan, environments=environments)

    @property
    def longest(self) -> int | None:
        """Longest NLL window."""
        return max((row["length"] for row in self.metrics["nll"]), default=None)

    def nll(self, length: int | None = None) -> list[Row]:
        """Rows of one length over all texts."""
        rows = [row for row in self.metrics["nll"] if row["length"] == (length or self.longest)]
        overall = [row for row in rows if row["text"] == "all"]
        return overall or rows

    def tasks(self, length: int | None = None) -> list[Row]:
        """Rows of the longest (or given) length."""
        lengths = {row["length"] for row in self.metrics["tasks"]}
        return [row for row in self.metrics["tasks"] if row["length"] == (length or max(lengths, default=0))]

    def methods(self) -> dict[str, Row]:
        """What is known of each method, by its name."""
        return {row["name"]: row for row in self.metrics["methods"]}


def _apart(run: Run, known: Sequence[Row]) -> Run:
    """A run whose methods that mean something else than known ones of the same name have a mark behind their names."""
    means = {row["name"]: row["config"] for row in known}
    other = {row["name"] for row in run.metrics["methods"] if means.get(row["name"], row["config"]) != row["config"]}

    def marked(rows: list[Row], key: str) -> list[Row]:
        return [row | {key: row[key] + MARK} if row[key] in other else row for row in rows]

    keys = {"methods": "name", "nll": "method", "tasks": "method", "positions": "method"}
    return replace(run, metrics=run.metrics | {part: marked(run.metrics[part], key) for part, key in keys.items()})


def _newest(results: list[NLLRecord]) -> list[NLLRecord]:
    """Leave out rows whose name means something else in a newer record: a default has changed in between."""
    means: dict[str, Any] = {}
    for result in sorted(results, key=lambda one: one.context["created"]):
        means |= {row.method.name: row.method.config for row in result.rows}
    return [
        result.model_copy(update={"rows": [row for row in result.rows if row.method.config == means[row.method.name]]})
        for result in results
    ]


def lines_of(result: NLLRecord) -> list[dict[str, Any]]:
    """An NLL record as lines of a run."""
    lines: list[dict[str, Any]] = []
    context = result.context
    for row in result.rows:
        spent = (
            {"share": row.spent.share, "high_mass": row.spent.high_mass}
            if row.spent
            else {"share": None, "high_mass": None}
        )
        for index, nll in enumerate(result.nll[row.method.name].astype(np.float64)):
            head = {"kind": "nll", "task": context["text"]["spec"], "length": context["length"], "index": index}
            sums = np.add.reduceat(nll, np.arange(0, len(nll), BOOTSTRAP_BLOCK))
            lines.append(
                {
                    **head,
                    "method": row.method.name,
                    "nll": float(nll.mean()),
                    "sums": sums.tolist(),
                    "tokens": len(nll),
                    **spent,
                    "unserved": list(row.unserved),
                }
            )
    return lines


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs and NLL records, put together by model.

    Args:
        paths: folders of runs, and JSON records of `thrift eval nll`.

    Raises:
        FileNotFoundError, ValueError: see `Run.load` and `Run.of_records`.
    """
    by_model: dict[str, list[Run]] = {}
    records: dict[str, list[Path]] = {}
    for path in paths:
        if path.suffix == ".json" and kind_of(path) not in SPEED_KINDS:
            records.setdefault(NLLRecord.load(path).context["model"]["spec"], []).append(path)
    for spec, of_model in records.items():
        by_model.setdefault(spec, []).append(Run.of_records(of_model))
    for path in paths:
        if path.suffix != ".json":
            run = Run.load(path)
            by_model.setdefault(run.plan["model"], []).append(run)
    return [first.with_others(others) for first, *others in by_model.values()]
