"""Tables as text."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from thrift_lab.sheet import Sheet

SHEET = Sheet(("method", "NLL\n[95%]"), [("a[b]", "1.25  [1, 2]"), ("x", "-")], "Title", "Caption", styles={1: "bold"})


def test_a_terminal_shows_what_it_holds() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(SHEET.drawn())
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[0] == "Title"
    assert lines[-1] == "Caption"
    assert [line.split() for line in lines[1:-1]] == [
        ["NLL"],
        ["method", "[95%]"],
        ["a[b]", "1.25", "[1,", "2]"],
        ["x", "-"],
    ]


def test_words_are_folded_and_numbers_are_not() -> None:
    out = io.StringIO()
    Console(file=out, width=40).print(Sheet(("a", "b"), [("w" * 60, "1,234,567")]).drawn())
    assert "1,234,567" in out.getvalue()
    assert out.getvalue().count("w") == 60


def test_markdown_is_one_line_a_row() -> None:
    assert SHEET.markdown() == "| method | NLL [95%] |\n|---|---|\n| a[b] | 1.25 [1, 2] |\n| x | - |"
    assert SHEET.markdown(code=True).splitlines()[-1] == "| `x` | - |"


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match=r"expected 2 cells, one for each column, got \['a'\]"):
        Sheet(("a", "b"), [("a",)])
