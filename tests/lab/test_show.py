"""``thrift show``: the table of any record."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import thrift_lab
from thrift_lab import cli
from thrift_lab.serving.engine_jobs import METHODS
from thrift_lab.serving.serve_records import Cell, ServeRecord, ServeRow
from thrift_lab.serving.served_nll import ServedRecord
from thrift_lab.show_cli import classes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def show(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["show", *map(str, arguments)], env={"COLUMNS": "120"})


def test_every_class_of_records_is_known() -> None:
    """Found in the sources: a class that says what its kind is."""
    found = set()
    for path in Path(thrift_lab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Record") for base in node.bases):
                said = (
                    x for x in node.body if isinstance(x, ast.AnnAssign) and x.value and ast.unparse(x.target) == "kind"
                )
                found |= {node.name for _ in said}
    assert found == {made.__name__ for made in classes()}
    kinds = [kind for made in classes() for kind in made.KINDS]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("h100/smollm2-135m-shakespeare-2048.json", ("thrift:budget=0.02", "[95% interval]", "float32 on NVIDIA H100")),
        ("h100/decode/target.json", ("Decode on NVIDIA H100", "over FP8", "commit 10beeb6")),
        ("fuzz.json", ("truncate", "nothing found")),
        ("gpu-tests.json", ("laws on random shapes", "passed")),
        ("compile/after-rooms.json", ("sm_120", "more")),
    ],
)
def test_a_record_is_shown_whatever_its_kind(record: str, told: tuple[str, ...]) -> None:
    result = show(RESULTS / record)
    assert result.exit_code == 0, result.output
    for words in told:
        assert words in result.output


def test_records_of_serving_are_shown(tmp_path: Path) -> None:
    served = ServedRecord(context={"commit": "abc", "settings": {"model": "m", "length": 129, "texts": ["letters"]}})
    for at, method in enumerate(METHODS):
        served.add(method, np.full((1, 128), 2.0 + at), 1.0)
    served.save(tmp_path / "served.json")
    assert "letters" in show(tmp_path / "served.json").output
    assert "+2.0000" in show(tmp_path / "served.json").output
    assert "| fp8 | letters | 3.0000 | +1.0000 |" in show(tmp_path / "served.json", "--markdown").output
    settings = {"model": "m", "lengths": [8192], "methods": ["thrift"]}
    row = ServeRow(cell=Cell("thrift", 8192, "single", 0), status="timed", step_ms=[1.5], kv_tokens=9000)
    ServeRecord(context={"settings": settings, "machine": {"gpu": "a GPU"}}, rows=[row]).save(tmp_path / "serve.json")
    assert "1.50" in show(tmp_path / "serve.json").output
    assert "| 8,192 | thrift | 9,000 |  |  |  | 1.50 |  |  |" in show(tmp_path / "serve.json", "--markdown").output


def test_markdown_is_printed_and_methods_are_chosen() -> None:
    path = RESULTS / "h100" / "smollm2-135m-shakespeare-2048.json"
    result = show(path, "--markdown", "--methods", "paper")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "| method | NLL | vs fp16 | recovered [95% interval] | blocks | mass |"
    assert {line.split("`")[1].partition(":")[0] for line in lines[2:]} == {"fp16", "fp4", "paper"}
    old = CliRunner().invoke(cli.app, ["eval", "show", str(path), "--markdown", "--methods", "paper"])
    assert old.output == result.output


def test_what_is_no_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"kind": "letter"}')
    for path, message in (
        (tmp_path, "is a folder: `thrift eval report` tells"),
        (tmp_path / "gone.json", "No such file"),
        (tmp_path / "x.json", "names no kind of record that is known: there are compile, crossover, decode"),
        (Path(__file__), "is not JSON"),
        (
            RESULTS / "compile" / "prefill.json",
            "is not a record of kind compile and schema 2, got kind compile, schema 1",
        ),
    ):
        result = show(path)
        assert result.exit_code == 2
        assert message in result.stderr
    result = show(RESULTS / "fuzz.json", "--methods", "paper")
    assert (result.exit_code, "are for records of `thrift eval nll`" in result.stderr) == (2, True)
