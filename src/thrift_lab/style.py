"""How charts look, in print (matplotlib) and in the report (plotly): one colour per method, one size of words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from thrift_lab.extras import need

COLOURS = {
    "thrift": "#0b6e8f",
    "residuals": "#5fb0c9",
    "paper": "#c9562c",
    "fp4": "#5c6bb0",
    "quest": "#4f7f2e",
    "topk": "#7a4f9a",
    "local": "#a67c00",
    "snapkv": "#b03a6e",
    "fp16": "#8f9aa3",
    "bf16": "#8f9aa3",
    "fp8": "#2f8f6b",
    "transformers": "#6b6b6b",
    "peer": "#e08a5a",
    "fp8kv": "#2f8f6b",
    "nvfp4kv": "#8a6fd1",
    "kivi": "#c2185b",
    "turboquant": "#3a7bd5",
    "diagonal": "#7f7f2e",
    "mass": "#0fa3b1",
}
"""Methods of evaluations, kinds of benchmarks and sides of whole models."""

OTHER = ("#d9a441", "#8c6d5a", "#9fb8c4", "#5f8f8a", "#b5a1c9", "#c77f8a")
"""Of lines that are no methods, in order; none is that of a method."""

INK, SOFT, RULE = "#333333", "#6b6b6b", "#dddddd"
MARKERS = "osD^vPX"
SMALL, WORDS, TITLE = 7.5, 8.5, 11
"""Points: of notes, of labels, of titles."""


def colour(method: str) -> str:
    """Return the colour of a method by its kind, the word before the colon and before any mark."""
    kind = re.match(r"\w*", method)
    return COLOURS.get(kind[0] if kind else "", SOFT)


def canvas(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, without touching pyplot's state.

    Args:
        width: in inches.
        height: in inches.
        columns: axes side by side; more than one are returned as an array.
        **options: of ``Figure.subplots``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    need("matplotlib", "plot")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks: dict[Any, Any] = {
        "font.size": WORDS,
        "axes.titlesize": WORDS + 1,
        "axes.labelsize": WORDS + 1,
        "grid.color": RULE,
    }
    looks |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.linewidth": 0.6}
    with rc_context(looks):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(1, columns, **options)


def title(axes: Any, text: str, below: str = "") -> None:
    """Write a title over axes, left, and in smaller words below it where the figures come from."""
    axes.set_title(text, loc="left", fontsize=TITLE, fontweight="bold", pad=22 if below else None)
    if below:
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(below, (0, 1), (0, 7), fontsize=SMALL + 0.5, color=SOFT, **place)


def legend(place: Any, *entries: Any, **options: Any) -> Any:
    """Draw the legend of axes or of a figure; matplotlib reads its looks only now."""
    return place.legend(*entries, **{"fontsize": WORDS, "edgecolor": "none", **options})


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the suffix says; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
