"""The ``thrift`` command."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from support.tiny_eval import TEXT, save_model
from thrift_attn.transformers.versions import RANGE
from thrift_lab import cli
from thrift_lab.assets import MIRROR


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(tmp_path_factory.mktemp("model"))
    (made / "houses.txt").write_text(TEXT, encoding="utf-8")
    return made


def thrift(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "120"})


def run_nll(folder: Path, *arguments: str) -> Result:
    common = ("--model", str(folder), "--text", str(folder / "houses.txt"), "--length", "256", "--device", "cpu")
    return thrift("eval", "nll", *common, *arguments)


def test_nll_prints_and_writes(folder: Path, tmp_path: Path) -> None:
    record, picture = tmp_path / "out" / "record.json", tmp_path / "out" / "recovery.png"
    methods = "fp16,fp4,paper,thrift:budget=0.1,promoted_storage=nested"
    result = run_nll(folder, "--methods", methods, "--budgets", "20%", "--json", str(record))
    assert result.exit_code == 0, result.output
    for word in (
        "fp16",
        "fp4",
        "paper",
        "thrift:budget=0.1,promoted_storage=nested",
        "paper:budget=0.2",
        "recovered",
        "nats",
    ):
        assert word in result.output
    assert [row["name"] for row in json.loads(record.read_text())["methods"]][-1] == "paper:budget=0.2"
    assert record.with_suffix(".npz").is_file()
    assert not picture.exists()
    again = thrift("eval", "show", str(record), "--methods", "paper", "--markdown")
    assert again.exit_code == 0, again.output
    assert "| `paper:budget=0.2` |" in again.output
    assert "nested" not in again.output
    assert thrift("eval", "show", str(record.with_suffix(".npz"))).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "magic"), "error: unknown method 'magic': there are fp16, fp4"),
        (("--methods", "thrift:budget=-1"), "got '-1'"),
        (("--methods", "thrift:budget=nan"), "got 'nan'"),
        (("--methods", "fp16,fp16"), "are the same computation"),
        (("--budgets", "2"), "error: budget must be a share"),
        (("--length", "500", "--windows", "99"), "49,500 are needed"),
        (("--length", "513"), "over the 512 positions"),
        (("--device", "toaster"), "error: device must be"),
        (("--text", "gone.txt"), "error: no text 'gone.txt'"),
        (("--model", "./gone"), "error: no model './gone'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run_nll(folder, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path))
    monkeypatch.setattr("pooch.HTTPDownloader", lambda **_: refuse)
    result = thrift("eval", "nll", "--model", "x", "--text", "shakespeare", "--length", "64")
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("error: could not fetch shakespeare into")
    assert result.output.splitlines()[-1].endswith("no network")


def test_demo_runs_four_methods_and_budgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def run(model: str, text: str, methods: str, budgets: list[str], **options: Any) -> None:
        asked.update(options, model=model, text=text, methods=methods, budgets=budgets, mirror=os.environ.get(MIRROR))

    monkeypatch.setattr(cli, "run_nll", run)
    monkeypatch.setenv(MIRROR, "")
    result = thrift("demo", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert (asked["model"], asked["text"], asked["length"]) == ("smollm2-135m", "shakespeare", 2048)
    assert (asked["methods"], asked["budgets"]) == ("fp16,fp4,paper,thrift", ["0", "0.15"])
    assert asked["json"] == tmp_path / "record.json"
    assert asked["plot"] == tmp_path / "recovery.png"
    assert asked["mirror"] == ""
    thrift("demo", "--mirror", "pypi")
    assert asked["mirror"] == "pypi"


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path))
    result = thrift("doctor")
    assert result.exit_code == 0, result.output
    for word in ("python", "torch", "triton", "transformers", "smollm2-135m", "shakespeare", "fetched when first used"):
        assert word in result.output
    assert f"(served: {RANGE})" in result.output
    assert "(served: >=2.10)" in result.output
    assert "emulated" in result.output
    assert "cached" not in result.output
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.setenv(MIRROR, "pypi")
    assert "cached" in thrift("doctor").output


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = thrift("doctor")
    assert result.exit_code == 1
    assert "matplotlib is not installed: pip install 'thrift-attn[plot]'" in " ".join(result.output.split())
    assert "not usable" in result.output


def test_a_picture_without_matplotlib_fails_before_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run_nll(folder, "--plot", "x.png")
    assert result.exit_code == 2
    assert "thrift-attn[plot]" in result.output


def test_help_is_light() -> None:
    code = "import sys, thrift_lab.cli; print({'transformers', 'matplotlib', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("module", ["typer", "rich.console"])
def test_the_command_without_its_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "thrift_lab.cli")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"the thrift command needs .*: pip install 'thrift-attn\[eval\]'"):
        importlib.import_module("thrift_lab.cli")
