"""The table of models: no family is served wrong, and docs/models.md says what a run finds."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from thrift_lab import model_table
from thrift_lab.cli import app
from thrift_lab.families import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_family_is_wrong_and_the_page_says_so(family: Family) -> None:
    if not model_table.known(family):
        pytest.skip(f"this transformers has no {family.kind}")
    row, text = model_table.check(family), PAGE.read_text(encoding="utf-8")
    assert "wrong" not in row.verdicts(), row
    if model_table.made_here(text):
        assert row.markdown() in text.splitlines()


def test_the_page_has_a_row_for_every_family() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [family.name for family in FAMILIES]
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 50


def test_a_page_that_cannot_be_written_is_refused_before_the_first_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_table, "check", lambda family: pytest.fail("checked a family"))
    for bad in (tmp_path, tmp_path / "file" / "page.md"):
        (tmp_path / "file").touch()
        found = CliRunner().invoke(app, ["doctor", "--models", str(bad)])
        assert found.exit_code == 2
        assert str(bad if bad == tmp_path else tmp_path / "file") in found.output.replace("\n", "")
