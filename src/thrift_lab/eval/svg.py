"""Small charts as inline SVG. Colours come from CSS variables of the page, so that light and dark need no second picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 14, 44

Range = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line or cloud of points.

    Args:
        name: for the legend.
        colour: number of the CSS colour.
        points: x and y, in order.
        bars: an interval of y for each point, or None.
        dashed: whether the line is.
        line: whether there is one.
        hollow: a second variant of its colour.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    bars: Sequence[Range | None] = ()
    dashed: bool = False
    line: bool = True
    hollow: bool = False

    @property
    def css(self) -> str:
        """Classes of its colour."""
        return f"c{self.colour}{' hollow' if self.hollow else ''}"


@dataclass(frozen=True)
class Axis:
    """One axis: its words, its range, its ticks, and whether it is logarithmic."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    form: str = "{:g}"
    log: bool = False

    def at(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two ends of the picture; kept inside."""
        low, high, x = (math.log10(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return start + (end - start) * min(1.0, max(0.0, (x - low) / ((high - low) or 1.0)))


def nice(label: str, values: Sequence[float], form: str = "{:g}", *, zero: bool = False, room: float = 0.06) -> Axis:
    """A linear axis with round ticks that holds all values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    span = (high - low) or abs(high) or 1.0
    low, high = low - (0 if zero and low == 0 else room * span), high + room * span
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    first = math.ceil(low / step - 1e-9)
    return Axis(label, low, high, [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)], form)


@dataclass
class Canvas:
    """A frame with axes; everything drawn is a string of SVG."""

    x: Axis
    y: Axis
    height: int = HEIGHT
    left: int = LEFT
    parts: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Across."""
        return self.x.at(value, self.left, WIDTH - RIGHT)

    def py(self, value: float) -> float:
        """Down."""
        return self.y.at(value, self.height - BOTTOM, TOP)

    def frame(self) -> None:
        """Grid, ticks and words."""
        for tick in self.y.ticks:
            y = self.py(tick)
            self.line(self.left, y, WIDTH - RIGHT, y, "grid")
            self.text(self.left - 7, y + 4, self.y.form.format(tick), "end")
        bottom = self.height - BOTTOM
        self.line(self.left, bottom, WIDTH - RIGHT, bottom, "axis")
        for tick in self.x.ticks:
            x = self.px(tick)
            self.line(x, bottom, x, bottom + 4, "axis")
            self.text(x, bottom + 18, self.x.form.format(tick))
        self.text((self.left + WIDTH - RIGHT) / 2, self.height - 8, self.x.label, css="label")
        middle = (TOP + bottom) / 2
        turn = f' transform="rotate(-90 14 {middle:.0f})"'
        self.parts.append(
            f'<text class="label" x="14" y="{middle:.0f}" text-anchor="middle"{turn}>{escape(self.y.label)}</text>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, css: str) -> None:
        """A straight line."""
        self.parts.append(f'<line class="{css}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')

    def text(self, x: float, y: float, words: str, anchor: str = "middle", css: str = "tick") -> None:
        """Words."""
        self.parts.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def draw(self, series: Series) -> None:
        """A series: its line, intervals and points. Points beyond the edge become arrows, and the line stops before them."""
        inside = [self.y.low <= y <= self.y.high for _, y in series.points]
        places = [(self.px(x), self.py(y)) for x, y in series.points]
        if series.line and len(places) > 1:
            pen = [
                f"{'L' if i and inside[i - 1] else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places) if inside[i]
            ]
            dash = ' stroke-dasharray="5 4"' if series.dashed else ""
            self.parts.append(f'<path class="line {series.css}"{dash} d="{" ".join(pen)}"/>' if pen else "")
        for i, bar in enumerate(series.bars):
            if bar is not None and inside[i]:
                x = places[i][0]
                self.line(x, self.py(bar[0]), x, self.py(bar[1]), f"bar {series.css}")
        for (x, y), (true_x, true_y), within in zip(places, series.points, inside, strict=True):
            tip = f"<title>{escape(series.name)}: {true_x:.4g}, {true_y:.4g}</title>"
            if not within and not series.dashed:
                down = 7 if true_y < self.y.low else -7
                arrow = f"M{x - 5:.1f} {y - down:.1f} L{x + 5:.1f} {y - down:.1f} L{x:.1f} {y:.1f} Z"
                self.parts.append(f'<path class="dot {series.css}" d="{arrow}">{tip}</path>')
            elif not series.dashed:
                self.parts.append(f'<circle class="dot {series.css}" cx="{x:.1f}" cy="{y:.1f}" r="4">{tip}</circle>')

    def box(self, x0: float, y0: float, x1: float, y1: float, css: str, tip: str) -> None:
        """A filled box in pixels."""
        self.parts.append(
            f'<rect class="box {css}" x="{x0:.1f}" y="{min(y0, y1):.1f}" width="{x1 - x0:.1f}" '
            f'height="{abs(y1 - y0):.1f}"><title>{escape(tip)}</title></rect>'
        )

    def done(self, title: str) -> str:
        """The SVG."""
        shape = f'viewBox="0 0 {WIDTH} {self.height}"'
        return f'<svg {shape} role="img" aria-label="{escape(title)}">{"".join(self.parts)}</svg>'


def legend(series: Sequence[Series]) -> str:
    """Names with their colours, as HTML that wraps."""
    marks = (
        f'<span class="key"><i class="swatch {s.css}{" dashed" if s.dashed else ""}"></i>{escape(s.name)}</span>'
        for s in series
    )
    return f'<div class="legend">{"".join(marks)}</div>'


def lines(title: str, x: Axis, y: Axis, series: Sequence[Series], marks: Sequence[tuple[float, str]] = ()) -> str:
    """A chart of lines and points with its legend; ``marks`` are named horizontal lines.

    The legend gives the values of points that lie beyond the edge.
    """
    canvas = Canvas(x, y)
    canvas.frame()
    for value, words in marks:
        if y.low <= value <= y.high:
            canvas.line(canvas.left, canvas.py(value), WIDTH - RIGHT, canvas.py(value), "mark")
            canvas.text(WIDTH - RIGHT - 2, canvas.py(value) - 5, words, "end")
    named: list[Series] = []
    for one in series:
        canvas.draw(one)
        beyond = [value for _, value in one.points if not y.low <= value <= y.high]
        if beyond and not one.dashed:
            ends = dict.fromkeys((y.form.format(min(beyond)), y.form.format(max(beyond))))
            one = replace(one, name=f"{one.name} ({' to '.join(ends)})")
        named.append(one)
    return canvas.done(title) + legend(named)


def bars(
    title: str, label: str, groups: Sequence[str], series: Sequence[tuple[Series, Sequence[float]]], high: float
) -> str:
    """Horizontal bars in groups, one bar per series (its points are not used), values from 0 to ``high``."""
    thick, gap, left = 7, 8, 172
    row = thick * len(series) + gap
    height = TOP + BOTTOM + row * len(groups)
    axis = Axis(label, 0, high, nice("", [0, high], zero=True, room=0).ticks)
    canvas = Canvas(axis, Axis("", 0, 1, ()), height, left)
    canvas.frame()
    for i, group in enumerate(groups):
        top = TOP + row * i + gap / 2
        canvas.text(left - 8, top + (row - gap) / 2 + 4, group, "end")
        for j, (one, values) in enumerate(series):
            y = top + thick * j
            tip = f"{group}, {one.name}: {values[i]:.3g}"
            canvas.box(left, y, max(canvas.px(values[i]), left + 1), y + thick - 1, one.css, tip)
    return canvas.done(title) + legend([one for one, _ in series])
