"""Tables with intervals that hold for all rows: loss by language and kind of text, score by task."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK
from thrift_lab.eval.corrected import Difference, difference
from thrift_lab.sheet import Sheet
from thrift_lab.style import SOFT, canvas, colour, legend, save

Records = list[dict[str, Any]]

MOST_LOSS = 0.006
"""Nats above exact attention that a language or kind may lose at 5%."""

LEAST_POINTS = {8192: -1.0, 32768: -2.0}
"""Points that RULER's pooled paired difference must surely stay above, by length."""


def half_share(shares: list[float], held: list[float]) -> float:
    """Share of the blocks, by attention mass, that holds half of the error: read off the curve, in log of the share."""
    if held[0] >= 0.5:
        return shares[0]
    for (x0, y0), (x1, y1) in pairwise(zip(shares, held, strict=True)):
        if y1 >= 0.5:
            return float(np.exp(np.interp(0.5, [y0, y1], np.log([x0, x1]))))
    raise ValueError(f"expected a curve that reaches 1, got {held}")


def by_kind(records: Records, base: str = "fp16") -> dict[tuple[str, int], dict[str, Difference]]:
    """Loss of every method on every text and length, corrected for their number.

    Args:
        records: lines of a run of `thrift eval suite`.
        base: the method that others are compared with.
    """
    found: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for record in records:
        if record["kind"] == "nll":
            place = found.setdefault((record["task"], record["length"]), {})
            place.setdefault(record["method"], {})[record["index"]] = record
    tests = len({text for text, _ in found})
    rows: dict[tuple[str, int], dict[str, Difference]] = {}
    for place, methods in found.items():
        for name, windows in methods.items():
            shared = sorted(set(windows) & set(methods.get(base, {})))
            if name == base or not shared:
                continue
            gaps = np.concatenate([np.subtract(windows[i]["sums"], methods[base][i]["sums"]) for i in shared])
            sizes = np.concatenate([_sizes(windows[i]["tokens"]) for i in shared])
            rows.setdefault(place, {})[name] = difference(gaps, sizes, tests=tests)
    return rows


def _sizes(tokens: int) -> Any:
    starts = np.arange(0, tokens, BOOTSTRAP_BLOCK)
    return np.diff(starts, append=tokens).astype(np.float64)


def kinds_table(records: Records, method: str, fp4: str = "fp4") -> str:
    """Markdown: loss of 4 bits and of a method, what it brings back, and how concentrated the error is; worst first."""
    rows, tests = by_kind(records), len({r["task"] for r in records if r["kind"] == "nll"})
    half = {
        r["task"]: half_share(r["shares"], np.mean([head["shares"] for head in r["heads"]], 0).tolist())
        for r in records
        if r["kind"] == "concentration"
    }
    head = (
        *("text", "tokens", f"`{fp4}`", f"`{method}`", "brought back"),
        *("blocks that hold half of the error", f"at most {MOST_LOSS}"),
    )
    cells = []
    ranked = sorted(
        ((place, row) for place, row in rows.items() if method in row), key=lambda item: -item[1][method].mean
    )
    for (text, length), row in ranked:
        mine, four = row[method], row.get(fp4)
        back = "-" if four is None or four.low is None or four.low <= 0 else f"{1 - mine.mean / four.mean:.1%}"
        share = f"{half[text]:.1%}" if text in half else "-"
        met = "yes" if mine.mean <= MOST_LOSS else "**no**"
        lost = "-" if four is None else f"{four.mean:+.4f}"
        cells.append((text, f"{length:,}", lost, str(mine), back, share, met))
    return f"Intervals hold for all {tests} texts at once (95%).\n\n{Sheet(head, cells).markdown()}\n"


def draw_kinds(records: Records, method: str, path: Path, fp4: str = "fp4") -> Path:
    """Write a picture: loss of 4 bits and of a method on every text, with intervals that hold for all of them.

    Raises:
        ValueError: the method has no loss on any text.
        MissingExtra: matplotlib is not installed.
    """
    found = by_kind(records)
    lengths = sorted({length for (_, length), row in found.items() if method in row})
    if not lengths:
        raise ValueError(f"nothing to draw: no text has a loss of {method!r}")
    texts = sorted({text for (text, _), row in found.items() if method in row}, reverse=True)
    figure, axes = canvas(1.6 + 4.4 * len(lengths), 1.4 + 0.24 * len(texts), len(lengths), sharey=True, squeeze=False)
    for ax, length in zip(axes.flat, lengths, strict=True):
        for name, shade, aside in ((fp4, colour("fp4"), 0.15), (method, colour(method), -0.15)):
            rows = [(at, found.get((text, length), {}).get(name)) for at, text in enumerate(texts)]
            rows = [(at, row) for at, row in rows if row is not None]
            reach = [0.0 if row.high is None else row.high - row.mean for _, row in rows]
            places = [at + aside for at, _ in rows]
            ax.errorbar(
                [row.mean for _, row in rows], places, xerr=reach, fmt="o", color=shade, markersize=4, label=name
            )
        ax.axvline(MOST_LOSS, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        ax.set_yticks(range(len(texts)), texts)
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_xlabel(f"nats above exact attention, {length:,} tokens; dashed: {MOST_LOSS}")
        ax.grid(axis="x")
    legend(figure, *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return save(figure, path)


def power_table(records: Records, base: str = "fp16") -> str:
    """Markdown: for each length and method the pooled paired difference of scores, and each task with a corrected interval.

    Scores are in points, 0 to 100; beside them the loss of the right answer in nats.
    """
    tasks = [r for r in records if r["kind"] == "task"]
    lines: list[str] = []
    for length in sorted({r["length"] for r in tasks}):
        done: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
        for r in tasks:
            if r["length"] == length:
                done.setdefault(r["method"], {})[r["task"], r["index"]] = r
        for method, mine in done.items():
            if method != base and base in done:
                lines += _power_rows(mine, done[base], method, length)
    return "\n".join(lines) + "\n"


def _power_rows(mine: dict[Any, Any], exact: dict[Any, Any], method: str, length: int) -> list[str]:
    """The rows of one method and length."""
    shared = sorted(set(mine) & set(exact))
    names = list(dict.fromkeys(task for task, _ in shared))
    groups = [[unit for unit in shared if unit[0] == name] for name in names]
    gaps = [np.array([100.0 * (mine[u]["score"] - exact[u]["score"]) for u in group]) for group in groups]
    nats = [np.array([mine[u]["gold_nll"] - exact[u]["gold_nll"] for u in group]) for group in groups]
    pooled = difference(np.concatenate(gaps), groups=[len(group) for group in groups])
    least = LEAST_POINTS.get(length)
    said = "too few samples for an interval" if pooled.low is None else f"lower end {pooled.low:+.2f}"
    if least is not None and pooled.low is not None:
        said += f", {'above' if pooled.low > least else '**not above**'} {least:+.0f}"
    told = f"`{method}`, {length:,} tokens: pooled {_points(pooled)} points over {len(shared)} samples; {said}."
    interval = f"difference [holds for all {len(names)}]"
    head = ("task", "samples", "exact", f"`{method}`", interval, "right answer, nats")
    rows = []
    for name, group, gap, nat in zip(names, groups, gaps, nats, strict=True):
        scores = [100 * float(np.mean([side[u]["score"] for u in group])) for side in (exact, mine)]
        points = _points(difference(gap, tests=len(names)))
        right = str(difference(nat, tests=len(names)))
        rows.append((name, str(len(group)), f"{scores[0]:.1f}", f"{scores[1]:.1f}", points, right))
    return [told, "", Sheet(head, rows).markdown(), ""]


def _points(found: Difference) -> str:
    return f"{found.mean:+.2f}" + ("" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]")


def between(records: Records, low: float = 0.2, high: float = 0.95, base: str = "fp16") -> list[str]:
    """Tasks that exact attention scores between these on: those on which a method can be seen to lose or gain."""
    scores: dict[str, list[float]] = {}
    for r in records:
        if r["kind"] == "task" and r["method"] == base:
            scores.setdefault(r["task"], []).append(r["score"])
    return [name for name, found in scores.items() if low <= float(np.mean(found)) <= high]
