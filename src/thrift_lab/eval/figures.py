"""The charts of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thrift_lab.eval.svg import Axis, Series, bars, lines, nice

Row = dict[str, Any]
Figure = tuple[str, str, str]
"""Title, drawing, and a sentence below it."""

COLOURS = {"thrift": 0, "paper": 1, "fp4": 2, "quest": 3, "topk": 4, "local": 5, "snapkv": 6, "fp16": 7}
_LOWEST = -0.5  # recovered shares below it are drawn at the edge


def colour(method: str) -> int:
    """The colour of a method, by its kind."""
    return COLOURS.get(method.partition(":")[0], 2)


def _series(name: str, points: list[tuple[float, float]], sure: list[Any], *, line: bool = True) -> Series:
    """A series in the colour of its method; variants of a kind (``thrift:math=16bit``) are hollow."""
    options = [option for option in name.partition(":")[2].split(",") if not option.startswith(("budget=", "keep="))]
    return Series(name, colour(name), points, sure, line=line, hollow=any(options))


def of_run(metrics: Row) -> list[Figure]:
    """Every chart that the metrics of a run can fill."""
    makers = (recovery, pareto, by_length, by_position, concentration, by_layer)
    return [figure for figure in (make(metrics) for make in makers) if figure is not None] + task_bars(metrics)


def _overall(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["text"] == "all"] or rows


def _longest(metrics: Row) -> list[Row]:
    length = max((row["length"] for row in metrics["nll"]), default=0)
    return _overall([row for row in metrics["nll"] if row["length"] == length])


def _plain_families(metrics: Row) -> dict[str, list[Row]]:
    """Selected methods that differ only in budget, in the order of their share of the blocks; sparse ones left out."""
    kept = _families(metrics)
    found: dict[str, list[Row]] = {}
    for about in metrics["methods"]:
        if about["family"] in kept and about["share"] is not None and not about["sparse"] and not about["fp4"]:
            found.setdefault(about["family"], []).append(about)
    return {name: sorted(rows, key=lambda row: row["share"]) for name, rows in found.items()}


def recovery(metrics: Row) -> Figure | None:
    """Recovered share against the share of the blocks that is promoted."""
    rows = {row["method"]: row for row in _longest(metrics) if row["recovered"] is not None}
    series = []
    for name, members in _plain_families(metrics).items():
        shown = [about for about in members if about["name"] in rows and about["share"] > 0]
        points = [(about["share"], rows[about["name"]]["recovered"]) for about in shown]
        if points:
            sure = [rows[about["name"]]["recovered_interval"] for about in shown]
            series.append(_series(name, points, sure))
    sparse = [about for about in metrics["methods"] if about["sparse"] and about["name"] in rows and about["share"]]
    for about in sparse:
        point = (about["share"], rows[about["name"]]["recovered"])
        series.append(
            Series(about["name"], colour(about["name"]), [point], [rows[about["name"]]["recovered_interval"]])
        )
    if not series:
        return None
    values = [y for one in series for _, y in one.points]
    low = max(_LOWEST, min([*values, 0.0]) - 0.05)
    ticks = [t for t in (-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1) if t >= low]
    shares = [x for one in series for x, _ in one.points]
    x = Axis(
        "blocks in high precision (log)", 0.8 * min(shares), 1.25 * max(shares), _log_ticks(shares), "{:.0%}", True
    )
    y = Axis("share of the fp4 loss brought back", low, 1.06, ticks, "{:.0%}")
    words = "Bars: 95% intervals. quest, topk and local drop all other blocks. Triangles lie beyond the edge."
    return (
        "Recovery against budget",
        lines("recovery against budget", x, y, series, [(1.0, "fp16"), (0.0, "fp4")]),
        words,
    )


def _log_ticks(shares: list[float]) -> list[float]:
    steps = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
    return [step for step in steps if 0.8 * min(shares) <= step <= 1.25 * max(shares)]


_VARIANTS = (":math=16bit", ":high=nested", ":low=mxfp4")


def selected(metrics: Row, most: int = 9) -> list[str]:
    """The few methods that fit into a chart: one of each family, with its default budget if that is there.

    Where there are too many, families without options (``thrift``, not ``thrift:scales=max``) come first, then `_VARIANTS`.
    """
    chosen: dict[str, str] = {}
    for about in metrics["methods"]:
        if not about["plain"] and (about["family"] not in chosen or about["name"] == about["family"]):
            chosen[about["family"]] = about["name"]
    kept = sorted(chosen, key=lambda family: (":" in family, not family.endswith(_VARIANTS)))[:most]
    return [name for family, name in chosen.items() if family in kept]


def _families(metrics: Row) -> set[str]:
    """Families of the selected methods."""
    return {about["family"] for about in metrics["methods"] if about["name"] in selected(metrics)}


def by_length(metrics: Row) -> Figure | None:
    """Loss against the length of the window."""
    lengths = sorted({row["length"] for row in metrics["nll"]})
    if len(lengths) < 2:
        return None
    rows = {(row["method"], row["length"]): row for length in lengths for row in _at(metrics, length)}
    series = []
    for name in selected(metrics):
        shown = [rows[name, length] for length in lengths if (name, length) in rows]
        points = [(row["length"], row["loss"]) for row in shown if row["loss"] is not None]
        if points:
            series.append(_series(name, points, [row["loss_interval"] for row in shown]))
    if not series:
        return None
    x = Axis("tokens in the window", 0.9 * lengths[0], 1.1 * lengths[-1], lengths, "{:,}", True)
    return "NLL against length", lines("loss against length", x, _loss_axis(series), series), _UPPER


_UPPER = "Nats per token above fp16, 0 is fp16. Triangles lie beyond the edge; the legend gives their values."


def _loss_axis(series: list[Series]) -> Axis:
    """An axis for losses that ends a little above uniform fp4, if that is there, and not at the worst method."""
    values = [y for one in series for _, y in one.points]
    top = max((y for one in series if one.name == "fp4" for _, y in one.points), default=0.0)
    kept = [value for value in values if value <= 1.2 * top] if top > 0 else values
    return nice("nats per token above fp16", kept or values, "{:.3g}", zero=True)


def _at(metrics: Row, length: int) -> list[Row]:
    return _overall([row for row in metrics["nll"] if row["length"] == length])


def by_position(metrics: Row) -> Figure | None:
    """Loss by position in the longest window."""
    rows = metrics["positions"]
    series = []
    for name in selected(metrics):
        mine = [row for row in rows if row["method"] == name]
        points = [((row["from"] + row["to"]) / 2, row["loss"]) for row in mine]
        if len(points) > 1:
            series.append(_series(name, points, [row["loss_interval"] for row in mine]))
    if not series:
        return None
    length = rows[0]["length"]
    x = Axis("position in the window", 0, length, [length * i // 4 for i in range(5)], "{:,}")
    title = f"NLL by position, windows of {length:,} tokens"
    return title, lines("loss by position", x, _loss_axis(series), series), _UPPER


def pareto(metrics: Row) -> Figure | None:
    """Loss against prefill cost; the line joins what nothing beats in both."""
    rows = {row["method"]: row for row in _longest(metrics) if row["loss"] is not None}
    kept = _families(metrics)
    known = [about for about in metrics["methods"] if about["name"] in rows and about["prefill_cost"] is not None]
    shown = [about for about in known if about["family"] in kept]
    if len(shown) < 2:
        return None
    families: dict[str, list[Row]] = {}
    for about in shown:
        families.setdefault(about["family"], []).append(about)
    series = []
    for name, members in families.items():
        points = [(about["prefill_cost"], rows[about["name"]]["loss"]) for about in members]
        series.append(_series(name, points, [rows[a["name"]]["loss_interval"] for a in members], line=False))
    best: list[tuple[float, float]] = []
    for point in sorted(point for one in series for point in one.points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    costs = [x for one in series for x, _ in one.points]
    x = nice("prefill cost, dense 16-bit attention is 1", [*costs, 1.0], "{:.2g}", zero=True)
    frontier = Series("frontier", 7, best, dashed=True)
    words = (
        "Operations weighted by tensor-core rate (Blackwell). Lower left is better; dashed: nothing is better in both."
    )
    return "Quality and cost", lines("quality and cost", x, _loss_axis(series), [*series, frontier]), words


def concentration(metrics: Row) -> Figure | None:
    """Share of the error in the first blocks by mass."""
    if not metrics["concentration"]:
        return None
    found = metrics["concentration"][0]
    shares = found["shares"]

    def points(name: str) -> list[tuple[float, float]]:
        return list(zip(shares, found[name], strict=True))

    series = [
        Series("error", 1, points("error_share")),
        Series("attention mass", 0, points("mass_share")),
        Series("evenly spread", 2, [(share, share) for share in shares], dashed=True),
    ]
    ticks = [share for share in shares if share != 0.005]
    x = Axis("blocks, by attention mass (log)", shares[0], 1.0, ticks, "{:.0%}", True)
    y = Axis("share of the total", 0, 1.03, [0, 0.25, 0.5, 0.75, 1], "{:.0%}")
    words = (
        f"Mean over {found['heads']} heads, {found['length']:,} tokens of {Path(found['text']).name}, uniform NVFP4."
    )
    return "Where the 4-bit error sits", lines("error concentration", x, y, series), words


def by_layer(metrics: Row) -> Figure | None:
    """Share of the error in the top 1, 5 and 10% of the blocks, layer by layer."""
    if not metrics["concentration"]:
        return None
    found = metrics["concentration"][0]
    layers = found["layers"]
    if len(layers) < 2:
        return None
    series = [
        Series(
            f"top {share:.0%}",
            number,
            [(row["layer"], row["error_share"][found["shares"].index(share)]) for row in layers],
        )
        for share, number in ((0.01, 1), (0.05, 0), (0.1, 3))
    ]
    last = layers[-1]["layer"]
    x = Axis("layer", 0, last, sorted({round(last * i / 5) for i in range(6)}))
    y = Axis("share of the error", 0, 1.03, [0, 0.25, 0.5, 0.75, 1], "{:.0%}")
    words = "Blocks ordered by attention mass, mean over the heads of a layer."
    return "Error concentration by layer", lines("error concentration by layer", x, y, series), words


def in_tasks(metrics: Row) -> list[str]:
    """The selected methods among those that have answered: they can be others than those with an NLL."""
    there = {row["method"] for row in metrics["tasks"]}
    return selected({"methods": [about for about in metrics["methods"] if about["name"] in there]})


def task_bars(metrics: Row) -> list[Figure]:
    """Scores of every task, in charts of at most 16 tasks."""
    lengths = {row["length"] for row in metrics["tasks"]}
    rows = [row for row in metrics["tasks"] if row["length"] == max(lengths) and not row["group"]]
    cells = {(row["task"], row["method"]): row["score"] for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    base = [about["name"] for about in metrics["methods"] if about["plain"]]
    kinds = [
        name for name in in_tasks(metrics) if name.partition(":")[0] in ("fp4", "paper", "thrift", "topk", "snapkv")
    ]
    chosen = [one for one in (_series(name, [], []) for name in [*base, *kinds]) if not one.hollow]
    shown = [one for one in chosen if all((task, one.name) in cells for task in tasks)]
    figures: list[Figure] = []
    count = -(-len(tasks) // 16)
    for part in range(count):
        own = tasks[part * len(tasks) // count : (part + 1) * len(tasks) // count]
        names = [task.replace("ruler_", "").replace("longbench_", "lb ").replace("helmet_", "hm ") for task in own]
        series = [(one, [100 * cells[task, one.name] for task in own]) for one in shown]
        words = f"Per cent, {max(lengths):,} tokens. lb: LongBench, hm: HELMET, the others RULER."
        title = "Tasks" + (f" ({part + 1} of {count})" if count > 1 else "")
        figures.append((title, bars("task scores", "score", names, series, 100), words))
    return figures
