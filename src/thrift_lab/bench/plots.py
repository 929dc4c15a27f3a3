"""Pictures of a record: speed-up over the fastest baselines, and the roofline. Drawn from records only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from thrift_lab.bench.bench_records import BenchRecord, BenchRow, Speedup
from thrift_lab.records import OLDER, before_today
from thrift_lab.style import COLOURS, INK, SMALL, canvas, legend, save, title
from thrift_lab.style import WORDS as POINTS

WORDS = {"thrift": "thrift", "bf16": "BF16 baselines", "fp8": "FP8 baselines"}
MARKERS = {"thrift": "o", "bf16": "s", "fp8": "D"}


def _title(axes: Any, text: str, record: BenchRecord) -> None:
    machine, versions = record.context["machine"], record.context["versions"]
    how = OLDER if before_today(record.context["created"]) else "medians of CUDA graph replays in one run"
    title(axes, text, f"{machine['gpu']}, torch {versions['torch']}, {how}")


def speedup(record: BenchRecord, path: Path) -> None:
    """Bars of our speed-up over the fastest BF16 and the fastest FP8 baseline, one pair per case, with the byte ceiling.

    Args:
        record: with at least one of our rows timed beside a timed baseline.
        path: of the picture.

    Raises:
        ValueError: nothing to draw.
        MissingExtra: matplotlib is not installed.
    """
    found = [one for one in record.speedups() if one.bf16 or one.fp8]
    if not found:
        raise ValueError("nothing to draw: it takes a timed row of ours and a timed baseline on the same shape")
    found.reverse()  # the first case on top
    figure, axes = canvas(8.2, 1.5 + 0.62 * len(found))
    height = 0.34
    widest = max(max(one.over(kind) or 0, one.ceiling(kind) or 0) for one in found for kind in ("bf16", "fp8"))
    for kind, offset in (("bf16", height / 2), ("fp8", -height / 2)):
        for at, one in enumerate(found):
            _bar(axes, one, kind, at + offset, height, widest)
    axes.axvline(1, color=INK, linewidth=1, zorder=3)
    axes.set_yticks(range(len(found)), [f"{one.ours.case.name}\n{one.ours.method}" for one in found], fontsize=POINTS)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlim(0, widest * 1.42)
    axes.set_xlabel("times faster than the fastest baseline of its kind (1 = equal)")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}x")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    handles = [axes.barh([-9], [0], color=COLOURS[kind], label=f"over {WORDS[kind]}") for kind in ("bf16", "fp8")]
    handles += axes.plot([], [], "|", color=INK, markersize=11, markeredgewidth=2, label="if only bytes counted")
    legend(axes,
        handles=handles, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.9 / (0.9 + 0.62 * len(found)))
    )  # fmt: skip
    _title(axes, "Decode: whole step against the fastest baseline", record)
    save(figure, path)


def _bar(axes: Any, one: Speedup, kind: Any, y: float, height: float, widest: float) -> None:
    """One bar, its ceiling mark, and in words what it is measured against."""
    ratio, ceiling, other = one.over(kind), one.ceiling(kind), getattr(one, kind)
    if ratio is None or ceiling is None or other is None:
        axes.annotate(f"no {kind} baseline", (0, y), (4, 0), textcoords="offset points", va="center", fontsize=SMALL)
        return
    axes.barh(y, ratio, height * 0.92, color=COLOURS[kind], alpha=0.9, zorder=2)
    axes.plot([ceiling], [y], "|", color=INK, markersize=11, markeredgewidth=2, zorder=4)
    axes.annotate(
        f"{ratio:.2f}x",
        (0, y),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=POINTS,
        fontweight="bold",
        color="white",
    )
    words = f"{other.method}: {other.p50_us:,.0f} us, ours {one.ours.p50_us:,.0f} us"
    at = (max(ratio, ceiling), y)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.annotate(words, at, (8, 0), textcoords="offset points", va="center", fontsize=SMALL, color=INK, bbox=clear)


def _timed(record: BenchRecord) -> list[BenchRow]:
    """The timed rows of a record; ValueError if there is none."""
    rows = [row for row in record.rows if row.status == "timed"]
    if not rows:
        raise ValueError("nothing to draw: no row of the record was timed")
    return rows


def roofline(record: BenchRecord, path: Path) -> None:
    """FLOP rate against FLOP per byte that must move, under the copy bandwidth and matrix rate of the same run.

    Args:
        record: with at least one timed row.
        path: of the picture.

    Raises:
        ValueError: nothing to draw.
        MissingExtra: matplotlib is not installed.
    """
    rows = _timed(record)
    figure, axes = canvas(8.2, 5.2)
    intensity: Callable[[BenchRow], float] = lambda row: row.case.flops / row.bytes  # noqa: E731
    rate: Callable[[BenchRow], float] = lambda row: row.case.flops / row.p50_us / 1e6  # noqa: E731
    xs, ys = [intensity(row) for row in rows], [rate(row) for row in rows]
    left, right = min(xs) / 1.6, max(xs) * 2.2
    roof = record.copy_bytes_per_s / 1e12
    peak = record.matmul_flop_per_s / 1e12
    ends = (left, min(right, peak / roof))
    axes.plot(ends, [roof * x for x in ends], color=INK, linewidth=1.6, zorder=2)
    if right > peak / roof:
        axes.plot((peak / roof, right), (peak, peak), color=INK, linewidth=1.6, zorder=2)
    for share in (0.5, 0.25):
        axes.plot(
            ends, [share * roof * x for x in ends], color="#bbbbbb", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1
        )
        axes.annotate(f"{share:.0%}", (ends[1], share * roof * ends[1]), (3, -3), textcoords="offset points",
                      fontsize=SMALL, color="#8a8a8a")  # fmt: skip
    for kind in ("bf16", "fp8", "thrift"):
        picked = [at for at, row in enumerate(rows) if row.kind == kind]
        axes.scatter(
            [xs[at] for at in picked],
            [ys[at] for at in picked],
            s=46 if kind == "thrift" else 30,
            marker=MARKERS[kind],
            color=COLOURS[kind],
            edgecolor="white",
            linewidth=0.7,
            alpha=0.95,
            zorder=4 if kind == "thrift" else 3,
            label=WORDS[kind],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xlim(left, right)
    bottom, top = min(ys) / 1.8, max(max(ys), roof * ends[1]) * 1.5
    axes.set_ylim(bottom, top)
    _label_ours(axes, rows, intensity, rate)
    axes.annotate(f"copy bandwidth of this run, {roof:.2f} TB/s", (left, roof * left), (10, 16), fontsize=POINTS,
                  textcoords="offset points", color=INK, rotation=_slope(axes, left, right, bottom, top),
                  rotation_mode="anchor")  # fmt: skip
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.set_xlabel("floating-point operations of exact attention per byte that must move")
    axes.set_ylabel("TFLOP/s of exact attention")
    axes.grid(which="major")
    legend(axes, loc="lower right", edgecolor="none", framealpha=1)
    _title(axes, "Decode: how close to the memory roof", record)
    save(figure, path)


def _slope(axes: Any, left: float, right: float, bottom: float, top: float) -> float:
    """Angle on the page of a line that rises as fast as it runs."""
    import math

    box = axes.get_position()
    width, height = axes.figure.get_size_inches()
    run = box.width * width / math.log10(right / left)
    rise = box.height * height / math.log10(top / bottom)
    return math.degrees(math.atan2(rise, run))


def _label_ours(
    axes: Any, rows: list[BenchRow], intensity: Callable[[BenchRow], float], rate: Callable[[BenchRow], float]
) -> None:
    """Case names beside our points, moved apart where they would overlap."""
    points = sorted(((rate(row), intensity(row), row) for row in rows if row.kind == "thrift"), key=lambda p: -p[0])
    if len(points) > 14:
        return  # the record and the table have them all
    last = float("inf")
    for y, x, row in points:
        to = min(y, last / 1.13)
        last = to
        axes.annotate(f"{row.case.name} {row.case.config.promoted_storage}", (x, y), (x * 1.13, to), fontsize=7.2,
        va="center", color=COLOURS["thrift"],
                      arrowprops={"arrowstyle": "-", "color": COLOURS["thrift"], "linewidth": 0.4, "shrinkB": 2})  # fmt: skip


def throughput(record: BenchRecord, path: Path) -> None:
    """Bars of every timed method's rate, one group per shape, in order of the record.

    Args:
        record: of prefill, with at least one timed row.
        path: of the picture.

    Raises:
        ValueError: nothing to draw.
        MissingExtra: matplotlib is not installed.
    """
    rows = _timed(record)
    names = list(dict.fromkeys(row.case.name for row in rows))
    places: list[tuple[float, BenchRow | None, str]] = []
    y = 0.0
    for name in names:
        places.append((y, None, name))
        for row in sorted((row for row in rows if row.case.name == name), key=lambda row: row.p50_us):
            y -= 1
            places.append((y, row, row.method))
        y -= 1.6
    figure, axes = canvas(8.2, 1.2 + 0.3 * -y)
    rates = {id(row): row.case.flops / row.p50_us / 1e6 for row in rows}
    widest = max(rates.values())
    for at, row, text in places:
        if row is None:
            axes.annotate(text, (0, at), (2, 0), textcoords="offset points", va="center", fontsize=9, fontweight="bold")
            continue
        axes.barh(at, rates[id(row)], 0.82, color=COLOURS[row.kind], alpha=0.9, zorder=2)
        figures = f"{rates[id(row)]:.0f} TFLOP/s, {row.p50_us / 1e3:,.1f} ms"
        axes.annotate(figures, (rates[id(row)], at), (5, 0), textcoords="offset points", va="center", fontsize=8)
    bars = [(at, text) for at, row, text in places if row is not None]
    axes.set_yticks([at for at, _ in bars], [text for _, text in bars], fontsize=POINTS)
    axes.set_ylim(y + 1, 0.8)
    axes.set_xlim(0, widest * 1.3)
    axes.set_xlabel("TFLOP/s of exact causal attention, the whole call")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    words = {**WORDS, "fp8": "8-bit baselines"}
    handles = [axes.barh([9], [0], color=COLOURS[kind], label=words[kind]) for kind in ("thrift", "bf16", "fp8")]
    legend(axes, handles=handles, loc="lower right")
    _title(axes, "Prefill: causal, one call", record)
    save(figure, path)


def draw(record: BenchRecord, folder: Path) -> list[Path]:
    """The pictures of the record's kind, as far as it has what they need.

    Args:
        record: of a run.
        folder: for ``speedup.png`` and ``roofline.png``, or ``prefill.png``.

    Returns:
        The files that were written.
    """
    written = []
    decode = (("speedup", speedup), ("roofline", roofline))
    for name, make in (("prefill", throughput),) if record.kind == "prefill" else decode:
        path = folder / f"{name}.png"
        try:
            make(record, path)
        except ValueError:
            continue
        written.append(path)
    return written
