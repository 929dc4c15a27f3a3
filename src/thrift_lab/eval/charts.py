"""Lines and bars as plotly figures: values under the pointer, colours that serve a light and a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrift_lab.extras import need
from thrift_lab.style import SOFT, colour

Interval = Sequence[float]


@dataclass(frozen=True)
class Series:
    """One line or cloud of points.

    Args:
        name: for the legend.
        colour: of its line and markers.
        points: x and y, in order.
        intervals: of y for each point, or None.
        dashed: a line without markers.
        line: whether there is one.
        hollow: a second variant of its colour.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[Interval | None] = ()
    dashed: bool = False
    line: bool = True
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis: its words, its range (None: as the values need), the format of its values, a logarithm, its ticks."""

    label: str
    range: tuple[float, float] | None = None
    form: str = ""
    log: bool = False
    ticks: Sequence[float] | None = None


def _layout(x: Axis, y: Axis, height: int, **more: Any) -> Any:
    """Return an empty figure with two axes."""
    figure = need("plotly.graph_objects").Figure()
    for name, axis in (("xaxis", x), ("yaxis", y)):
        options: dict[str, Any] = {"title": {"text": axis.label}, "tickformat": axis.form, "zeroline": False}
        options |= {"type": "log"} if axis.log else {}
        options |= {"range": list(axis.range)} if axis.range else {}
        options |= {"tickvals": list(axis.ticks)} if axis.ticks else {}
        figure.update_layout({name: {**options, "gridcolor": "rgba(128,128,128,0.25)", "automargin": True}})
    figure.update_layout(
        template="none", height=height, margin={"l": 60, "r": 14, "t": 10, "b": 40}, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xref": "container"}, **more,
    )  # fmt: skip
    return figure


def lines(x: Axis, y: Axis, series: Sequence[Series], marks: Mapping[float, str] | None = None) -> Any:
    """Return a chart of lines and points.

    Points beyond the range of y lie at its edge as triangles; under the pointer they tell their true value.

    Args:
        x: the axis across.
        y: the axis upwards.
        series: what is drawn.
        marks: named horizontal lines by their height.
    """
    graph = need("plotly.graph_objects")
    figure = _layout(x, y, 440)
    for height, words in (marks or {}).items():
        figure.add_hline(height, line={"color": SOFT, "width": 1, "dash": "dot"}, annotation_text=words)
    low, high = y.range or (float("-inf"), float("inf"))
    for one in series:
        xs, true = [point[0] for point in one.points], [point[1] for point in one.points]
        symbols = ["triangle-down" if v < low else "triangle-up" if v > high else "circle" for v in true]
        intervals = [bar or (v, v) for bar, v in zip(one.intervals or [None] * len(true), true, strict=True)]
        inside = [low <= v <= high for v in true]
        bars = [(v - a, b - v) if ok else (0, 0) for (a, b), v, ok in zip(intervals, true, inside, strict=True)]
        sure = [f"<br>[{a:{y.form}}, {b:{y.form}}]" if b > a else "" for a, b in intervals]
        figure.add_trace(
            graph.Scatter(
                x=xs,
                y=[min(max(v, low), high) for v in true],
                name=one.name,
                mode="lines" if one.dashed else "lines+markers" if one.line else "markers",
                line={"color": one.colour, "width": 2, "dash": "dash" if one.dashed else "dot" if one.hollow else "solid"},
                marker={"symbol": [f"{s}-open" if one.hollow else s for s in symbols], "size": 9, "color": one.colour},
                error_y={
                    "array": [above for _, above in bars], "arrayminus": [below for below, _ in bars],
                    "thickness": 1.2, "width": 3, "visible": bool(one.intervals),
                },
                customdata=[[f"{v:{y.form}}", words] for v, words in zip(true, sure, strict=True)],
                hovertemplate=f"%{{x:{x.form}}}: %{{customdata[0]}}%{{customdata[1]}}<extra>%{{fullData.name}}</extra>",
            )
        )  # fmt: skip
    return figure


def bars(
    label: str,
    groups: Sequence[str],
    values: Mapping[str, Sequence[float]],
    high: float,
    told: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Return horizontal bars in groups.

    Args:
        label: of the axis.
        groups: names, from top to bottom.
        values: of each group, by method; NaN where there is none.
        high: where the axis ends.
        told: what the pointer shows besides, likewise.
    """
    graph = need("plotly.graph_objects")
    axis = Axis(label, (0, high), form=".0f")
    figure = _layout(axis, Axis(""), 90 + len(groups) * (12 * len(values) + 10), bargap=0.25)
    for name, sizes in values.items():
        hover = f"%{{y}}: %{{x:.1f}}{'<br>%{customdata}' if told else ''}<extra>%{{fullData.name}}</extra>"
        figure.add_trace(
            graph.Bar(
                y=list(groups),
                x=[None if size != size else size for size in sizes],
                customdata=list(told[name]) if told else None,
                name=name,
                orientation="h",
                marker={"color": colour(name)},
                hovertemplate=hover,
            )
        )
    figure.update_layout(yaxis={"autorange": "reversed", "tickformat": None}, legend={"y": 1, "yanchor": "top"})
    return figure
