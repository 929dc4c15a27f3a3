"""The picture of a run: recovered share against budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thrift_attn.config import ThriftConfig, fraction
from thrift_lab.eval.dated import in_todays_words, older
from thrift_lab.eval.run_nll import NLLRecord, NLLRow, is_fp4
from thrift_lab.records import MARK
from thrift_lab.style import MARKERS, SMALL, SOFT, canvas, colour, legend, save, title

_WIDE = 30.0  # per cent; budgets beyond it make the axis logarithmic
_LOWEST = -50.0  # per cent; what lies below is drawn at the edge, with its value


def families(rows: list[NLLRow]) -> dict[str, list[NLLRow]]:
    """Rows that differ only in budget, by the name of the first of them without its budget, in order of budget.

    Names of what was recorded under an older default are marked.
    """
    groups: dict[ThriftConfig, list[NLLRow]] = {}
    for row in rows:
        if (
            row.method.config is not None
            and row.spent is not None
            and (row.recovered is not None or is_fp4(row.method))
        ):
            groups.setdefault(row.method.config.with_(budget=fraction(1)), []).append(row)
    named: dict[str, list[NLLRow]] = {}
    for group in groups.values():
        others = [row for row in group if not is_fp4(row.method)]
        if others:
            first = others[0].method
            old = MARK if older(first.name, first.config.to_dict() if first.config else None) else ""
            named[in_todays_words(first.family) + old] = sorted(group, key=_share)
    return named


def _share(row: NLLRow) -> float:
    return row.spent.share if row.spent else 0.0


def draw(result: NLLRecord, path: Path) -> None:
    """Write the PNG (or what the suffix says).

    Args:
        result: of `thrift_lab.eval.run_nll.evaluate`; with fp16 and fp4 among its methods.
        path: of the picture; its folder is made.

    Raises:
        ValueError: nothing to draw, for want of fp16, fp4 or a third method, or of a gap between the first two.
        MissingExtra: matplotlib is not installed.
    """
    lines = families(result.rows)
    gap = next((row for row in result.rows if is_fp4(row.method)), None)
    base = next((row for row in result.rows if row.method.plain), None)
    if not lines or gap is None or gap.loss is None or base is None:
        raise ValueError("nothing to plot: it takes fp16, fp4 (with a gap between them) and at least one other method")
    figure, axes = canvas(7.6, 5.0)
    for at, (name, rows) in enumerate(lines.items()):
        aside = 0.015 * (at - (len(lines) - 1) / 2)  # bars at the same budget stand side by side
        _line(axes, name, rows, aside, MARKERS[at % len(MARKERS)])
    _frame(axes, result, base, gap, [100 * _share(row) for rows in lines.values() for row in rows])
    columns = 2 if any(len(name) > 20 for name in lines) else 4
    drawn = legend(figure, loc="outside lower center", ncols=min(columns, len(lines)), frameon=False)
    old = f"; {MARK} recorded under an older default" if any(name.endswith(MARK) for name in lines) else ""
    drawn.set_title(f"bars: 95% intervals of a paired bootstrap{old}")
    drawn.get_title().set_fontsize(SMALL)
    save(figure, path)


def _line(axes: Any, name: str, rows: list[NLLRow], aside: float, marker: str) -> None:
    """Draw one family: points, 95% bars where known, a thin line between, dotted for variants of a kind."""
    shade = colour(name)
    xs = [100 * _share(row) * (1 + aside) for row in rows]
    true = [100 * (row.recovered or 0.0) for row in rows]
    ys = [max(y, _LOWEST) for y in true]
    axes.plot(xs, true, ":" if ":" in name else "-", color=shade, linewidth=1.4, alpha=0.8)
    inside = [(x, y, row) for x, y, row, t in zip(xs, ys, rows, true, strict=True) if t >= _LOWEST]
    bars = [row.recovered_interval or (y / 100, y / 100) for _, y, row in inside]
    below = [max(0.0, y - max(100 * low, _LOWEST)) for (_, y, _), (low, _) in zip(inside, bars, strict=True)]
    above = [max(0.0, 100 * high - y) for (_, y, _), (_, high) in zip(inside, bars, strict=True)]
    axes.errorbar(
        [x for x, _, _ in inside],
        [y for _, y, _ in inside],
        yerr=[below, above],
        fmt=marker,
        color=shade,
        markersize=5.5,
        markerfacecolor="white" if ":" in name else shade,
        markeredgecolor=shade if ":" in name else "white",
        markeredgewidth=0.7,
        elinewidth=1.1,
        capsize=2.5,
        label=name,
        zorder=3,
    )
    for x, t in zip(xs, true, strict=True):
        if t < _LOWEST:
            axes.plot([x], [_LOWEST], marker="v", color=shade, markersize=7, clip_on=False, zorder=4)
            axes.annotate(
                f"{t:.0f}%", (x, _LOWEST), (-7, 3), textcoords="offset points", ha="right", fontsize=SMALL, color=shade
            )


def _frame(axes: Any, result: NLLRecord, base: NLLRow, gap: NLLRow, shares: list[float]) -> None:
    """Reference lines, axes and words."""
    context = result.context
    for y, side, words in ((100, 0, f"fp16, NLL {base.nll:.4f}"), (0, 1, f"fp4 everywhere, NLL {gap.nll:.4f}")):
        axes.axhline(y, color=SOFT, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            words,
            (side, y),
            (-4 if side else 4, 3),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right" if side else "left",
            fontsize=8,
            color=SOFT,
        )
    right = max([*shares, 10])
    spread = right > _WIDE  # then small budgets need room
    if spread:
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    steps = (0, 1, 2, 5, 10, 20, 50, 100) if spread else (0, 5, 10, 15, 20, 25, 30)
    ticks = [step for step in steps if step <= right * 1.05]
    axes.set_xticks(ticks, [f"{tick}%" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(-0.12 if spread else -0.03 * right, right * (1.25 if spread else 1.06))
    bars = [row.recovered_interval for row in result.rows if row.recovered_interval]
    ends = [100 * end for bar in bars for end in bar] + [100 * (row.recovered or 0.0) for row in result.rows]
    axes.set_ylim(max(min([*ends, -2]) - 4, _LOWEST - 2), max([*ends, 105]) + 4)
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:.0f}%")
    axes.set_xlabel("blocks in high precision, share of all visible ones" + (" (log scale above 1%)" if spread else ""))
    axes.set_ylabel("share of the fp4 loss brought back")
    title(
        axes,
        f"{context['model']['spec']}, {context['text']['spec']}, {context['windows']} x {context['length']:,} tokens",
    )
    axes.grid(axis="y")
