"""The charts of the report: what is drawn from the metrics of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from thrift_lab import console
from thrift_lab.eval.charts import Axis, Series, bars, lines
from thrift_lab.eval.dated import in_todays_words, marked, older
from thrift_lab.records import MARK
from thrift_lab.style import OTHER, SOFT, colour

Row = dict[str, Any]


class Chart(NamedTuple):
    """One chart: its title, a plotly figure, and a sentence below it."""

    title: str
    figure: Any
    words: str


_LOWEST = -0.5  # recovered shares below it are drawn at the edge


def _series(
    metrics: Row, name: str, points: list[tuple[float, float]], sure: list[Any], *, line: bool = True
) -> Series:
    """Return a series in the colour of its method; variants (``thrift:compute=16bit``), old ones too, are hollow."""
    words = label(metrics, name)
    hollow = _is_variant(name) or words.endswith(MARK)
    return Series(words, colour(name), points, sure, line=line, hollow=hollow)


def _is_variant(name: str) -> bool:
    """Whether a method has options beside its budget."""
    given = console.words(name.partition(":")[2])
    return any(not option.startswith(("budget=", "keep=")) or option.startswith("budget=max(") for option in given)


def _kin(about: Row) -> str:
    """Return what makes one line: the family in today's words, marked where the record is older than today's default."""
    return in_todays_words(about["family"]) + (MARK if older(about["name"], about["config"]) else "")


def label(metrics: Row, name: str) -> str:
    """Return the name of a method in today's words, marked where its record is older than today's default."""
    about = next((row for row in metrics["methods"] if row["name"] == name), None)
    return name if about is None else marked(name, about["config"])


def of_run(metrics: Row) -> list[Chart]:
    """Return every chart that the metrics of a run can fill."""
    makers = (recovery, pareto, by_length, by_position, concentration, by_layer)
    return [chart for chart in (make(metrics) for make in makers) if chart is not None] + task_bars(metrics)


def _at(metrics: Row, length: int) -> list[Row]:
    rows = [row for row in metrics["nll"] if row["length"] == length]
    return [row for row in rows if row["text"] == "all"] or rows


def _longest(metrics: Row) -> list[Row]:
    return _at(metrics, max((row["length"] for row in metrics["nll"]), default=0))


def _plain_families(metrics: Row) -> dict[str, list[Row]]:
    """Return selected methods that differ only in budget, in the order of their share; sparse ones left out."""
    kept = _families(metrics)
    found: dict[str, list[Row]] = {}
    for about in metrics["methods"]:
        if about["family"] in kept and about["share"] is not None and not about["sparse"] and not about["fp4"]:
            found.setdefault(_kin(about), []).append(about)
    return {name: sorted(rows, key=lambda row: row["share"]) for name, rows in found.items()}


def recovery(metrics: Row) -> Chart | None:
    """Recovered share against the share of the blocks that is promoted."""
    rows = {row["method"]: row for row in _longest(metrics) if row["recovered"] is not None}
    groups = dict(_plain_families(metrics))
    groups |= {about["name"]: [about] for about in metrics["methods"] if about["sparse"] and about["share"]}
    series = []
    for name, members in groups.items():
        shown = [about for about in members if about["name"] in rows and about["share"] > 0]
        points = [(about["share"], rows[about["name"]]["recovered"]) for about in shown]
        if points:
            series.append(
                _series(metrics, name, points, [rows[about["name"]]["recovered_interval"] for about in shown])
            )
    if not series:
        return None
    low = max(_LOWEST, min([0.0, *(y for one in series for _, y in one.points)]) - 0.05)
    x = Axis("blocks in high precision (log)", form=".0%", log=True, ticks=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    y = Axis("fp4 loss brought back", (low, 1.06), form=".0%")
    words = "Bars: 95% intervals. quest, topk and local drop all other blocks. Triangles lie beyond the edge."
    return Chart("Recovery against budget", lines(x, y, series, {1.0: "fp16", 0.0: "fp4"}), words)


_VARIANTS = (":compute=16bit", ":promoted_storage=nested", ":base_format=mxfp4", ":math=16bit", ":high=nested")


def selected(metrics: Row, most: int = 9) -> list[str]:
    """Return the few methods that fit into a chart: one of each family, with its default budget if that is there.

    Where there are too many, families without options (``thrift``, not ``thrift:scales=max``) come first, then `_VARIANTS`.
    """
    chosen: dict[str, str] = {}
    for about in metrics["methods"]:
        if not about["plain"] and (about["family"] not in chosen or about["name"] == about["family"]):
            chosen[about["family"]] = about["name"]
    kept = sorted(chosen, key=lambda family: (":" in family, not family.endswith(_VARIANTS)))[:most]
    return [name for family, name in chosen.items() if family in kept]


def _families(metrics: Row) -> set[str]:
    """Return the families of the selected methods."""
    return {about["family"] for about in metrics["methods"] if about["name"] in selected(metrics)}


_UPPER = "Nats per token above fp16, 0 is fp16. Triangles lie beyond the edge; they tell their values."


def _loss_axis(series: list[Series]) -> Axis:
    """Return an axis for losses that ends a little above uniform fp4, if that is there, and not at the worst method."""
    values = [0.0, *(y for one in series for _, y in one.points)]
    top = max((y for one in series if one.name == "fp4" for _, y in one.points), default=0.0)
    kept = [value for value in values if value <= 1.2 * top] if top > 0 else values
    room = 0.06 * ((max(kept) - min(kept)) or 1.0)
    return Axis("nats per token above fp16", (min(kept) - room, max(kept) + room), form=".4f")


def _floored(about: Row) -> bool:
    """Whether a method has the budget with a floor, the default of the library."""
    return about["config"] is not None and str(about["config"].get("budget", "")).startswith("max(")


def by_length(metrics: Row) -> Chart | None:
    """Loss against the length of the window."""
    lengths = sorted({row["length"] for row in metrics["nll"]})
    rows = {(row["method"], row["length"]): row for length in lengths for row in _at(metrics, length)}
    series = []
    floors = [row["name"] for row in metrics["methods"] if row["family"] == "thrift" and _floored(row)]
    for name in [*selected(metrics), *(name for name in floors if name not in selected(metrics))]:
        shown = [rows[name, length] for length in lengths if (name, length) in rows]
        points = [(row["length"], row["loss"]) for row in shown if row["loss"] is not None]
        if points:
            series.append(_series(metrics, name, points, [row["loss_interval"] for row in shown]))
    if not series or len(lengths) < 2:
        return None
    x = Axis("tokens in the window", form=",.0f", log=True, ticks=lengths)
    return Chart("NLL against length", lines(x, _loss_axis(series), series), _UPPER)


def by_position(metrics: Row) -> Chart | None:
    """Loss by position in the longest window."""
    rows = metrics["positions"]
    series = []
    for name in selected(metrics):
        mine = [row for row in rows if row["method"] == name]
        points = [((row["from"] + row["to"]) / 2, row["loss"]) for row in mine]
        if len(points) > 1:
            series.append(_series(metrics, name, points, [row["loss_interval"] for row in mine]))
    if not series:
        return None
    length = rows[0]["length"]
    x = Axis("position in the window", (0, length), form=",.0f")
    return Chart(f"NLL by position, windows of {length:,} tokens", lines(x, _loss_axis(series), series), _UPPER)


def pareto(metrics: Row) -> Chart | None:
    """Loss against prefill cost; the line joins what nothing beats in both."""
    rows = {row["method"]: row for row in _longest(metrics) if row["loss"] is not None}
    kept = _families(metrics)
    known = [about for about in metrics["methods"] if about["name"] in rows and about["prefill_cost"] is not None]
    families: dict[str, list[Row]] = {}
    for about in known:
        if about["family"] in kept:
            families.setdefault(_kin(about), []).append(about)
    if sum(map(len, families.values())) < 2:
        return None
    series = []
    for name, members in families.items():
        points = [(about["prefill_cost"], rows[about["name"]]["loss"]) for about in members]
        series.append(_series(metrics, name, points, [rows[a["name"]]["loss_interval"] for a in members], line=False))
    best: list[tuple[float, float]] = []
    for point in sorted(point for one in series for point in one.points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    costs = [1.0, *(x for one in series for x, _ in one.points)]
    x = Axis("prefill cost, dense 16-bit attention is 1", (0, 1.06 * max(costs)), form=".3f")
    y = _loss_axis(series)
    words = (
        "Operations weighted by tensor-core rate (Blackwell). Lower left is better; dashed: nothing is better in both."
    )
    return Chart("Quality and cost", lines(x, y, [*series, Series("frontier", SOFT, best, dashed=True)]), words)


_SHARE = 0.05
"""Of the blocks that the method ``thrift`` promotes."""


def concentration(metrics: Row) -> Chart | None:
    """Share of the error in the first blocks by mass."""
    if not metrics["concentration"]:
        return None
    found = metrics["concentration"][0]
    shares = found["shares"]
    kinds = (("error", OTHER[1], "error_share"), ("attention mass", OTHER[0], "mass_share"))
    series = [Series(name, shade, list(zip(shares, found[key], strict=True))) for name, shade, key in kinds]
    series.append(Series("evenly spread", SOFT, [(share, share) for share in shares], dashed=True))
    series.append(Series("thrift promotes", colour("thrift"), [(_SHARE, 0.0), (_SHARE, 1.0)], dashed=True))
    x = Axis("blocks, by attention mass (log)", form=".1~%", log=True, ticks=[s for s in shares if s != 0.005])
    y = Axis("share of the total", (0, 1.03), form=".0%")
    words = (
        f"Mean over {found['heads']} heads, {found['length']:,} tokens of {Path(found['text']).name}, uniform NVFP4."
    )
    return Chart("Where the 4-bit error sits", lines(x, y, series), words)


def by_layer(metrics: Row) -> Chart | None:
    """Share of the error in the top 1, 5 and 10% of the blocks, layer by layer."""
    if not metrics["concentration"] or len(metrics["concentration"][0]["layers"]) < 2:
        return None
    found = metrics["concentration"][0]
    series = []
    for shade, share in zip(OTHER, (0.01, 0.05, 0.1), strict=False):
        at = found["shares"].index(share)
        points = [(row["layer"], row["error_share"][at]) for row in found["layers"]]
        promoted = share == _SHARE
        words = f"top {share:.0%}" + ", as many as thrift promotes" * promoted
        series.append(Series(words, colour("thrift") if promoted else shade, points))
    x, y = Axis("layer", form=".0f"), Axis("share of the error", (0, 1.03), form=".0%")
    words = "Blocks ordered by attention mass, mean over the heads of a layer."
    return Chart("Error concentration by layer", lines(x, y, series), words)


def in_tasks(metrics: Row) -> list[str]:
    """Return the selected methods among those that have answered: they can be others than those with an NLL."""
    answered = {row["method"] for row in metrics["tasks"]}
    return selected({"methods": [about for about in metrics["methods"] if about["name"] in answered]})


def task_bars(metrics: Row) -> list[Chart]:
    """Return scores of every task, in charts of at most 16 tasks."""
    lengths = {row["length"] for row in metrics["tasks"]}
    rows = [row for row in metrics["tasks"] if row["length"] == max(lengths) and not row["group"]]
    cells = {(row["task"], row["method"]): row["score"] for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    base = [about["name"] for about in metrics["methods"] if about["plain"]]
    kinds = ("fp4", "paper", "thrift", "quest", "topk", "snapkv")
    chosen = [*base, *(name for name in in_tasks(metrics) if name.partition(":")[0].removesuffix(MARK) in kinds)]
    shown = [name for name in chosen if not _is_variant(name)]
    charts: list[Chart] = []
    count = -(-len(tasks) // 16)
    for part in range(count):
        own = tasks[part * len(tasks) // count : (part + 1) * len(tasks) // count]
        names = [task.replace("ruler_", "").replace("longbench_", "lb ").replace("helmet_", "hm ") for task in own]
        values = {label(metrics, name): [100 * cells.get((task, name), float("nan")) for task in own] for name in shown}
        words = f"Per cent, {max(lengths):,} tokens. lb: LongBench, hm: HELMET, the others RULER."
        if any((task, name) not in cells for task in own for name in shown):
            words += " Bars that lack were not run."
        title = "Tasks" + (f" ({part + 1} of {count})" if count > 1 else "")
        charts.append(Chart(title, bars("score", names, values, 100), words))
    return charts
