"""A small SVG writer with a light and a dark theme: the same input gives the same bytes on every machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from thrift_lab.style import COLOURS

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Shades:
    """Colours of a theme.

    Args:
        ink: words.
        soft: notes.
        rule: lines and frames.
        pale: large areas behind words.
        lit: what the eye goes to.
        low: 4-bit data.
    """

    ink: str
    soft: str
    rule: str
    pale: str
    lit: str
    low: str


SHADES: dict[Theme, Shades] = {
    "light": Shades("#1f2328", "#57606a", "#c9d1d9", "#f3f6f8", "#d1603d", "#b9d9e3"),
    "dark": Shades("#e6edf3", "#9da7b1", "#3d444d", "#1b2129", "#f0885f", "#1f5365"),
}
DARK_COLOURS = {
    "thrift": "#3fb6dc", "paper": "#e8835c", "fp4": "#8f9df0", "quest": "#86c05a", "topk": "#b98ae0", "local": "#d6a72c",
    "fp16": "#8f9aa3", "bf16": "#8f9aa3", "fp8": "#5cc49a",
}  # fmt: skip
"""The colours of methods on a dark page; on a light one they are `thrift_lab.style.COLOURS`."""


@dataclass
class Picture:
    """A picture being drawn.

    Args:
        width: in pixels.
        height: in pixels.
        theme: light or dark.
        label: what is to be seen, for people who hear it read.
    """

    width: int
    height: int
    theme: Theme
    label: str
    parts: list[str] = field(default_factory=list)

    @property
    def shades(self) -> Shades:
        """Colours of the theme."""
        return SHADES[self.theme]

    def colour(self, method: str) -> str:
        """The colour of a method in this theme."""
        return (COLOURS if self.theme == "light" else DARK_COLOURS)[method]

    def box(
        self, at: tuple[float, float], size: tuple[float, float], fill: str, edge: str = "none", round: float = 0
    ) -> None:
        """Draw a rectangle by its upper left corner."""
        corners = f' rx="{round:g}"' if round else ""
        place = f'x="{at[0]:g}" y="{at[1]:g}" width="{size[0]:g}" height="{size[1]:g}"'
        self.parts.append(f'<rect {place}{corners} fill="{fill}" stroke="{edge}"/>')

    def words(
        self,
        at: tuple[float, float],
        text: str,
        size: float = 13,
        colour: str = "",
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Write a line of text from its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{at[0]:g}" y="{at[1]:g}" font-size="{size:g}" fill="{colour or self.shades.ink}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: str = "", width: float = 1) -> None:
        """Draw a line."""
        self.parts.append(
            f'<line x1="{start[0]:g}" y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}" '
            f'stroke="{colour or self.shades.rule}" stroke-width="{width:g}"/>'
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = "") -> None:
        """Draw a curve from left to right with a head at its end."""
        colour, half = colour or self.shades.soft, (start[0] + end[0]) / 2
        self.parts.append(
            f'<path d="M{start[0]:g} {start[1]:g} C{half:g} {start[1]:g} {half:g} {end[1]:g} {end[0] - 7:g} {end[1]:g}" '
            f'fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<path d="M{end[0]:g} {end[1]:g} l-9 -4.5 v9 z" fill="{colour}"/>'
        )

    def drop(self, start: tuple[float, float], bottom: float, colour: str) -> None:
        """Draw a straight arrow downwards."""
        self.line(start, (start[0], bottom - 8), colour, 2)
        self.parts.append(f'<path d="M{start[0]:g} {bottom:g} l-4.5 -9 h9 z" fill="{colour}"/>')

    def svg(self) -> str:
        """The file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-label={quoteattr(self.label)} font-family={quoteattr(FONT)}>'
        )
        return "\n".join([head, *self.parts, "</svg>"]) + "\n"
