"""Chapters of the report on speed and memory, from records of `thrift bench` as they lie in their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrift_attn.crossovers import CROSSOVERS
from thrift_lab.eval.charts import Axis, Series, bars, lines
from thrift_lab.eval.figures import Chart
from thrift_lab.records import MARK, OLDER, before_today
from thrift_lab.style import colour

SPEED_KINDS = ("decode", "prefill", "e2e")
"""Kinds of records that are read here."""

SIDES = ("thrift", "fp8", "bf16")
"""In the order of charts; ``fp8`` and ``bf16`` are the fastest of their kind."""

_USUAL = "Batch x tokens; 32 query and 8 KV heads of D 128 where nothing else is said."

_OLD = f"{MARK} {OLDER}."


@dataclass(frozen=True)
class Shape:
    """One shape with the times of ours and of the fastest baselines.

    Args:
        phase: ``"decode"`` or ``"prefill"``.
        words: the shape, for people.
        tokens: keys of a sequence.
        head_dim: D.
        batch: sequences.
        rows: the fastest timed row of each side, as it lies in the record.
        record: path, day, commit, GPU and torch of the record.
        older: whether the record is older than today's defaults.
    """

    phase: str
    words: str
    tokens: int
    head_dim: int
    batch: int
    rows: dict[str, dict[str, Any]]
    record: dict[str, str]
    older: bool

    @property
    def name(self) -> str:
        """The shape in words, marked where its record is old."""
        return self.words + (MARK if self.older else "")

    def time(self, side: str) -> float | None:
        """Median microseconds of a side."""
        return self.rows[side]["p50_us"] if side in self.rows else None

    def relative(self, side: str) -> float | None:
        """Time of a side in that of the fastest BF16."""
        mine, base = self.time(side), self.time("bf16")
        return None if mine is None or base is None else mine / base


def _about(path: Path, found: dict[str, Any]) -> dict[str, str]:
    context = found["context"]
    return {
        "path": str(path),
        "day": context["created"][:10],
        "commit": str(context["commit"])[:12],
        "gpu": context["machine"]["gpu"] or "CPU",
        "torch": context["versions"]["torch"],
    }


def shapes(paths: Iterable[Path]) -> list[Shape]:
    """Return every shape of records of decode and prefill; of several records of one shape the newest speaks.

    Args:
        paths: of records; those of other kinds are passed over.
    """
    found: dict[tuple[str, str], Shape] = {}
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("kind") not in ("decode", "prefill"):
            continue
        about, phase = _about(path, record), record["kind"]
        cases: dict[str, list[dict[str, Any]]] = {}
        for row in record["rows"]:
            if row["status"] == "timed" and row["case"].get("tq", 1) == 1:
                cases.setdefault(_words(row["case"]), []).append(row)
        for words, rows in cases.items():
            best = {side: _fastest(rows, side) for side in SIDES}
            kept = {side: row for side, row in best.items() if row is not None}
            if "thrift" not in kept or "bf16" not in kept:
                continue
            case = rows[0]["case"]
            shape = Shape(
                phase, words, case["kv"], case["head_dim"], case["batch"], kept, about, before_today(about["day"])
            )
            other = found.get((phase, words))
            if other is None or other.record["day"] <= about["day"]:
                found[phase, words] = shape
    return sorted(found.values(), key=lambda shape: (shape.head_dim != 128, shape.batch, shape.tokens))


def _words(case: dict[str, Any]) -> str:
    heads, dim = (case["q_heads"], case["kv_heads"]), case["head_dim"]
    words = f"{case['batch']} x {case['kv']:,}"
    words += "" if heads == (32, 8) else f", {heads[0]}/{heads[1]} heads"
    return words + ("" if dim == 128 else f", D {dim}")


def _fastest(rows: Sequence[dict[str, Any]], side: str) -> dict[str, Any] | None:
    """Return the fastest row of a side; of ours with the default configuration alone."""
    own = [
        row
        for row in rows
        if row["kind"] == side and row["case"].get("config_name", row["case"].get("recipe", "default")) == "default"
    ]
    return min(own, key=lambda row: row["p50_us"], default=None)


def _compared(found: Sequence[Shape], title: str, words: str) -> Chart:
    """Draw times in those of the fastest BF16, shape by shape."""
    values = {side: [100 * (shape.relative(side) or float("nan")) for shape in found] for side in SIDES}
    told = {
        side: [
            f"{shape.rows[side]['method']}: {shape.time(side):,.1f} us" if side in shape.rows else "" for shape in found
        ]
        for side in SIDES
    }
    high = 1.05 * max(value for sizes in values.values() for value in sizes if value == value)
    figure = bars("fastest BF16 is 100", [shape.name for shape in found], values, high, told)
    return Chart(title, figure, words)


def _table(found: Sequence[Shape]) -> tuple[list[str], list[list[str]]]:
    head = ["shape", "thrift, us", "fastest BF16, us", "fastest FP8, us", "over BF16", "over FP8", "recorded"]
    body = []
    for shape in found:
        cells = [shape.name, f"{shape.time('thrift'):,.1f}"]
        for side in ("bf16", "fp8"):
            row = shape.rows.get(side)
            cells.append("-" if row is None else f"{row['p50_us']:,.1f} ({row['method']})")
        for side in ("bf16", "fp8"):
            other, mine = shape.time(side), shape.time("thrift")
            cells.append("-" if other is None or mine is None else f"{other / mine:.2f}x")
        body.append([*cells, shape.record["day"]])
    return head, body


def speed(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Return the chapter on speed, or None without a record.

    Args:
        paths: of records of `thrift bench`.
    """
    found = shapes(paths)
    if not found:
        return None
    parts, charts, findings, losses = [], [], [], []
    for phase, words in (
        ("prefill", "A causal prompt, quantisation and choice of blocks included."),
        ("decode", "One step through the cache, 5% of the blocks promoted from the nested plane."),
    ):
        own = [shape for shape in found if shape.phase == phase]
        if not own:
            parts.append({"title": phase.title(), "note": "Not recorded.", "tables": []})
            continue
        notes = f"{words} {_USUAL} Medians of CUDA graph replays; every row has passed a check against float64."
        charts.append(
            _compared(own, f"{phase.title()}: time against the fastest baselines", f"{notes} Lower is better.")
        )
        if phase == "prefill" and (chart := _by_length(own)) is not None:
            charts.append(chart)
        head, body = _table(own)
        caption = notes + (f" {_OLD}" if any(shape.older for shape in own) else "")
        parts.append({"title": phase.title(), "tables": [{"head": head, "body": body, "caption": caption}]})
        said, lost = _findings(phase, own)
        findings += said
        losses += lost
    return {
        "model": "Speed",
        "name": ", ".join(dict.fromkeys(shape.record["gpu"] for shape in found)),
        "findings": findings + _exact_below(),
        "losses": losses,
        "parts": parts,
        "charts": charts,
        "circumstances": _circumstances(shape.record for shape in found),
    }


def _by_length(found: Sequence[Shape]) -> Chart | None:
    """Draw how many times faster than the fastest BF16, by length, heads of 128."""
    own = [shape for shape in found if shape.head_dim == 128 and shape.batch == 1]
    if len({shape.tokens for shape in own}) < 3:
        return None
    series = []
    for side in SIDES:
        points = [(shape.tokens, 1 / value) for shape in own if (value := shape.relative(side)) is not None]
        series.append(Series(side, colour(side), points))
    x = Axis("tokens of the prompt (log)", form=",.0f", log=True, ticks=[shape.tokens for shape in own])
    y = Axis("speed, fastest BF16 is 1", form=".2f")
    words = "Named as fp8, whatever the length: by default short prompts are attended exactly instead."
    return Chart("Prefill: speed by length", lines(x, y, series), words)


def _findings(phase: str, found: Sequence[Shape]) -> tuple[list[str], list[str]]:
    """Say where thrift is faster than both kinds of baselines, and where it is not."""
    said, lost = [], []
    for side, words in (("bf16", "BF16"), ("fp8", "FP8")):
        ratios = [(other / mine, shape) for shape in found
                  if (other := shape.time(side)) is not None and (mine := shape.time("thrift")) is not None]  # fmt: skip
        if not ratios:
            continue
        best, at = max(ratios, key=lambda pair: pair[0])
        won = [pair for pair in ratios if pair[0] >= 1]
        said.append(
            f"{phase.title()}: faster than the fastest {words} on {len(won)} of {len(ratios)} shapes; at best "
            f"{best:.2f}x ({at.name})."
        )
        behind = sorted((pair for pair in ratios if pair[0] < 1), key=lambda pair: pair[0])
        if behind:
            named = "; ".join(f"{shape.name} {ratio:.2f}x" for ratio, shape in behind)
            lost.append(f"{phase.title()}, slower than the fastest {words}: {named}.")
    return said, lost


def _exact_below() -> list[str]:
    """Say below which length prompts are exact by default, as `thrift_attn.crossovers` has it."""
    rows = "; ".join(f"{row.keys:,} tokens (D {row.head_dim}, {row.server})" for row in CROSSOVERS)
    return [f"By default a prompt on an H100 runs exact attention, which is faster there, below {rows}."]


def _circumstances(records: Iterable[dict[str, str]]) -> list[tuple[str, str]]:
    seen = {about["path"]: about for about in records}
    return [
        (
            "/".join(Path(path).parts[-2:]),
            f"{about['day']} on {about['gpu']}, torch {about['torch']}, commit {about['commit']}",
        )
        for path, about in sorted(seen.items())
    ]


def memory(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Return the chapter on memory, or None without a record.

    Args:
        paths: of records of `thrift bench`.
    """
    sizes = _token_sizes(shapes(paths))
    models = [(path, found) for path in paths if (found := json.loads(path.read_text())).get("kind") == "e2e"]
    if not sizes and not models:
        return None
    charts, parts, findings = [], [], []
    if sizes:
        base = sizes["bf16"]
        share = {side: 100 * size / base for side, size in sizes.items()}
        told = {side: [f"{size:,.0f} bytes a token"] for side, size in sizes.items()}
        figure = bars("16 bits are 100", ["KV cache"], {s: [v] for s, v in share.items()}, 105, told)
        words = "One layer of 8 KV heads, D 128. thrift holds the 4-bit base, its residual and the means of blocks."
        charts.append(Chart("Bytes of the KV cache", figure, words))
        findings.append(
            f"A token takes {sizes['thrift']:,.0f} bytes of the cache of a layer (8 KV heads, D 128), "
            f"{share['thrift']:.0f}% of 16 bits."
        )
    for _, found in models:
        chart, part, said = _model(found, before_today(found["context"]["created"]))
        charts.append(chart)
        parts.append(part)
        findings += said
    return {
        "model": "Memory",
        "name": ", ".join(str(found["model"]) for _, found in models),
        "findings": findings,
        "losses": [],
        "parts": parts,
        "charts": charts,
        "circumstances": _circumstances(_about(path, found) for path, found in models),
    }


def _token_sizes(found: Sequence[Shape]) -> dict[str, float]:
    """Return bytes of a token of one layer by side, of the newest decode record with 8 KV heads and D 128."""
    own = [s for s in found if s.phase == "decode" and s.rows["thrift"]["case"]["kv_heads"] == 8 and s.head_dim == 128]
    newest = max(own, key=lambda shape: shape.record["day"], default=None)
    return {} if newest is None else {side: row["bytes_per_token"] for side, row in newest.rows.items()}


def _model(found: dict[str, Any], old: bool) -> tuple[Chart, dict[str, Any], list[str]]:
    """Chart, table and sentences about a whole model."""
    mark = MARK if old else ""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        case = row["case"]
        if row["status"] == "timed":
            groups.setdefault(f"{case['batch']} x {case['context']:,}{mark}", {})[row["side"]] = row
    head = ["context", "side", "KV cache, GB", "peak, GB", "prompt, s", "token, ms"]
    body = []
    for name, sides in groups.items():
        for side, row in sides.items():
            prompt = "-" if row["prefill_s"] is None else f"{row['prefill_s']:.2f}"
            steps = sorted(row["decode_ms"])
            peak = max(row["peak_prefill"] or 0, row["peak_decode"] or 0)
            gigabytes = [f"{size / 1e9:.1f}" for size in (row["kv_bytes"], peak)]
            body.append([name, side, *gigabytes, prompt, f"{steps[len(steps) // 2]:.2f}"])
    values = {
        side: [sides[side]["kv_bytes"] / 1e9 if side in sides else float("nan") for sides in groups.values()]
        for side in ("thrift", "bf16")
    }
    high = 1.05 * max(size for sizes in values.values() for size in sizes if size == size)
    words = f"{found['model']}, random weights: sizes and times do not depend on them. {_OLD if old else ''}".strip()
    chart = Chart(f"KV cache of {found['model']}", bars("GB", list(groups), values, high), words)
    said = []
    if found.get("largest"):
        ours, other = found["largest"]["thrift"]["tokens"], found["largest"]["bf16"]["tokens"]
        said.append(
            f"{found['model']}{mark}: {ours:,.0f} tokens of context fit beside the weights, {other:,.0f} in BF16."
        )
    table = {"head": head, "body": body, "caption": words}
    return chart, {"title": f"{found['model']}, whole model", "tables": [table]}, said
