"""Every block of Python in the README and the docs runs as pasted, and prints what the block after it shows.

The blocks of a page run from top to bottom in one namespace, each page in a folder of its own. A local folder stands in
for the model of the hub.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from support.small_model import HUB_ID, small_model

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"-?\d+(?:\.\d+)?")
TOLERANCE = 0.03
"""Figures are compared to 3% or one unit of their last digit: sums run in another order on another machine."""


@dataclass(frozen=True)
class Block:
    """A block of code, its line in the page, and what it shall print (None: it does not say)."""

    line: int
    code: str
    output: str | None


def blocks(page: Path) -> list[Block]:
    """The Python of a page, with the output that follows at once."""
    found, fences = [], list(re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    for fence, then in zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        shown = then is not None and then[1] == "output" and not fence.string[fence.end() : then.start()].strip()
        line = fence.string.count("\n", 0, fence.start()) + 2
        found.append(Block(line, fence[2], then[2] if shown and then else None))
    return found


PAGES = {
    str(path.relative_to(ROOT)): found
    for path in (
        ROOT / "README.md",
        ROOT / "DESIGN.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if (found := blocks(path))
}


def same(got: str, want: str) -> bool:
    """Whether two outputs have the same words, and figures that are close."""
    if NAMED.sub("#", got).split() != NAMED.sub("#", want).split():
        return False
    for mine, theirs in zip(NAMED.findall(got), NAMED.findall(want), strict=True):
        unit = 1.01 * 10.0 ** -len(theirs.partition(".")[2]) if "." in theirs else 0.0
        if abs(float(mine) - float(theirs)) > max(TOLERANCE * abs(float(theirs)) if unit else 0.0, unit):
            return False
    return True


def run(block: Block, page: str, names: dict[str, Any]) -> str:
    """Run a block and return what it printed; blocks with prompts are compared by doctest itself."""
    if block.code.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.code, names, page, page, block.line)
        told = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        failed = runner.run(test, out=told.write, clear_globs=False).failed
        names.update(test.globs)
        assert not failed, told.getvalue()
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for block in PAGES[page]:
            if HUB_ID in block.code:
                block = Block(block.line, block.code.replace(HUB_ID, str(small_model())), block.output)
            got = run(block, page, names)
            if block.output is not None:
                assert same(got, block.output), f"{page}:{block.line} prints\n{got}\nand shows\n{block.output}"


def test_the_readme_shows_what_its_code_prints() -> None:
    shown = PAGES["README.md"]
    assert len(shown) == 2
    assert all(block.output for block in shown)


@pytest.mark.parametrize(
    ("got", "want", "close"),
    [("a 0.56 b", "a 0.55 b", True), ("a 0.56", "a 0.53", False), ("a 7", "a 8", False), ("a 1 b", "a 1 c", False)],
)
def test_figures_are_compared_closely(got: str, want: str, close: bool) -> None:
    assert same(got, want) is close
