"""Blocks of code in pages of the documentation, and what they show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that documentation loads; tests put a local folder in its place."""

TOLERANCE = 0.03
"""Figures are compared to 3% or one unit of their last digit: sums run in another order on another machine."""

_FIGURE = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Block:
    """A block of Python in a page.

    Args:
        line: of the page on which it starts.
        code: the block.
        output: what it shall print; None where the page does not say.
    """

    line: int
    code: str
    output: str | None


def blocks(page: Path) -> list[Block]:
    """The Python of a page, each with the output that follows at once."""
    found, fences = (
        [],
        list(re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)),
    )
    for fence, then in zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        shown = then is not None and then[1] == "output" and not fence.string[fence.end() : then.start()].strip()
        line = fence.string.count("\n", 0, fence.start()) + 2
        found.append(Block(line, fence[2], then[2] if shown and then else None))
    return found


def same(got: str, want: str) -> bool:
    """Whether two outputs have the same words, and figures that are close."""
    if _FIGURE.sub("#", got).split() != _FIGURE.sub("#", want).split():
        return False
    for mine, theirs in zip(_FIGURE.findall(got), _FIGURE.findall(want), strict=True):
        unit = 1.01 * 10.0 ** -len(theirs.partition(".")[2]) if "." in theirs else 0.0
        if abs(float(mine) - float(theirs)) > max(TOLERANCE * abs(float(theirs)) if unit else 0.0, unit):
            return False
    return True
