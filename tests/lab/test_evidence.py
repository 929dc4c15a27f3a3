"""Languages and kinds of text, tasks with power, and intervals that hold for a whole table."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.tiny_eval import TEXT, loaded, save_model
from thrift_lab.cli import app
from thrift_lab.eval import evidence, kinds
from thrift_lab.eval.answer import answer
from thrift_lab.eval.corrected import difference
from thrift_lab.eval.methods import described, from_description, parse_method, parse_methods
from thrift_lab.eval.nll import check_reads_text
from thrift_lab.eval.suite_folder import Folder
from thrift_lab.eval.texts import load_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "houses.txt").write_text(TEXT)
    return str(tmp_path / "houses.txt")


# -- texts ------------------------------------------------------------------------------------------------------------

PAGE = """<html><head><title>No</title></head><body><div id="banner">No</div><ul class="docnav top"><li>Prev</li></ul>
<div class="para">
   {words} <code>apt</code>
   here.</div><pre>  two  spaces</pre><ul class="docnav"><li>No</li></ul></body></html>"""


def package(path: Path, pages: dict[str, str]) -> Path:
    """A Debian package with pages of the handbook."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, html in pages.items():
            entry = tarfile.TarInfo(f"./usr/share/doc/debian-handbook/html/{name}")
            entry.size = len(html.encode())
            archive.addfile(entry, io.BytesIO(html.encode()))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar.getvalue())]
    head = b"".join(
        f"{n:<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(c):<10}`\n".encode() + c + b"\n" * (len(c) % 2) for n, c in parts
    )
    path.write_bytes(b"!<arch>\n" + head)
    return path


def test_the_handbook_is_its_translated_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english = {
        "en-US/b.html": PAGE.format(words="All of this is still in English and"),
        "en-US/a.html": PAGE.format(words="First"),
    }
    german = {
        "de-DE/b.html": english["en-US/b.html"],
        "de-DE/a.html": PAGE.format(words="Zuerst kommt das Übersetzte mit"),
    }
    made = package(tmp_path / "book.deb", {**english, **german, "de-DE/index.html": "No", "xx-XX/a.html": "No"})
    monkeypatch.setattr(kinds, "retrieve", lambda *_: made)
    kinds._pages.cache_clear()
    both = load_text("handbook:en-US", 1).content.split("\n\n")
    assert [part.split("\n")[0].strip() for part in both] == [
        "First apt here.",
        "All of this is still in English and apt here.",
    ]
    assert both[0].endswith("  two  spaces")
    only = load_text("handbook:de-DE", 1).content
    assert "Zuerst kommt das Übersetzte mit apt here." in only
    assert "English" not in only
    assert "No" not in only.split()
    with pytest.raises(ValueError, match="the handbook has no language 'xx-XX': there are ar-MA, ca-ES"):
        kinds.kind("handbook:xx-XX")
    kinds._pages.cache_clear()


def test_what_is_made_is_right_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("mathematics", "tables", "logs"):
        text = kinds.made(name, 5000)
        assert text == kinds.made(name, 9000)[: len(text)]
    for line in kinds.made("mathematics", 5000).splitlines():
        if " * " in line:
            assert len({eval(side) for side in line.split(" = ")}) == 1
    rows = kinds.made("tables", 5000).split("\n\n")[0].splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert "def " in kinds.source()
    (path,) = kinds.write(tmp_path / "texts", ("made:logs",))
    assert path.name == "made-logs.txt"
    assert path.read_text() == load_text("made:logs", 1).content
    with pytest.raises(ValueError, match="no kind of text 'shakespeare'"):
        kinds.write(tmp_path, ("shakespeare",))
    with pytest.raises(ValueError, match="no text is made by the name 'poems': there are mathematics, tables, logs"):
        load_text("made:poems", 1)


# -- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_for_many_rows_is_wider_and_holds_for_all_of_them() -> None:
    draw = np.random.default_rng(0)
    gaps = draw.normal(0.0, 1.0, 200)
    one, many = difference(gaps), difference(gaps, tests=25)
    one_width, width = (np.subtract(found.high, found.low) for found in (one, many))
    assert width / one_width == pytest.approx(3.09 / 1.96, rel=0.01)
    assert one_width == pytest.approx(2 * 1.96 * gaps.std() / 200**0.5, rel=0.05)
    missed = 0
    for _ in range(60):  # tables of 13 true differences of zero: one in twenty may claim something
        table = [difference(draw.normal(0.0, 1.0, 60), tests=13) for _ in range(13)]
        missed += any(row.low is not None and row.high is not None and not row.low <= 0 <= row.high for row in table)
    assert missed <= 9
    assert difference(np.array([1.0])).low is None
    weighed = difference(np.array([2.0, 30.0]), np.array([1.0, 10.0]))
    assert weighed.mean == 32 / 11
    with pytest.raises(ValueError, match=r"expected differences in groups \[3\], got 2"):
        difference(np.zeros(2), groups=[3])


def test_groups_are_resampled_within_themselves() -> None:
    """Tasks that differ from each other but not within themselves leave nothing to chance."""
    apart = np.array([0.0] * 20 + [10.0] * 20)
    pooled, mixed = difference(apart, groups=[20, 20]), difference(apart)
    assert (pooled.low, pooled.high) == (5.0, 5.0)
    assert mixed.low is not None
    assert mixed.low < 4


def test_half_of_the_error() -> None:
    assert evidence.half_share([0.01, 0.1, 1.0], [0.2, 0.8, 1.0]) == pytest.approx(10**-1.5)
    assert evidence.half_share([0.01, 1.0], [0.6, 1.0]) == 0.01
    with pytest.raises(ValueError, match="a curve that reaches 1"):
        evidence.half_share([0.01, 1.0], [0.1, 0.2])


# -- commands ---------------------------------------------------------------------------------------------------------


def test_kinds_by_command(folder: Path, text: str, tmp_path: Path) -> None:
    options = ["--model", str(folder), "--texts", f"{text},made:logs", "--lengths", "200", "--concentration", "128"]
    options += ["--methods", "fp16,fp4,thrift:budget=0.3", "--device", "cpu"]
    done = CliRunner().invoke(app, ["eval", "kinds", "-o", str(tmp_path / "run"), *options])
    assert done.exit_code == 0, done.output
    assert "Intervals hold for all 2 texts at once (95%)." in done.output
    rows = [line for line in done.output.splitlines() if line.startswith(("| made:logs", f"| {text}"))]
    assert len(rows) == 2
    assert all(" | 200 | " in row and "%" in row for row in rows)
    records = Folder(tmp_path / "run").records()
    assert sum(r["kind"] == "concentration" for r in records) == 2
    picture = evidence.draw_kinds(records, "thrift:budget=0.3", tmp_path / "kinds.png")
    assert picture.stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw: no text has a loss of 'paper'"):
        evidence.draw_kinds(records, "paper", tmp_path / "none.png")
    again = CliRunner().invoke(app, ["eval", "kinds", "-o", str(tmp_path / "run"), *options])
    assert again.exit_code == 0
    assert Folder(tmp_path / "run").records() == records


def test_power_by_command(text: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    options = ["--model", str(folder), "--text", text, "--lengths", "600", "--samples", "2"]
    options += ["--tasks", "ruler_niah_single_1"]
    options += ["--methods", "fp16,thrift:budget=0.3,cache:budget=0.3", "--device", "cpu"]
    done = CliRunner().invoke(app, ["eval", "power", "-o", str(tmp_path / "run"), *options])
    assert done.exit_code == 0, done.output
    assert done.output.count("pooled ") == 2
    assert done.output.count("| ruler_niah_single_1 | 2 |") == 2
    none = CliRunner().invoke(
        app, ["eval", "power", "-o", str(tmp_path / "next"), "--only-telling", str(tmp_path / "run")]
    )
    assert none.exit_code != 0
    assert "is scored 20 to 95% by exact attention" in " ".join(none.output.split())


def test_the_table_of_tasks_says_whether_the_line_is_kept() -> None:
    def line(method: str, index: int, score: float) -> dict[str, Any]:
        task = {"kind": "task", "task": "vt", "length": 8192, "index": index, "method": method}
        return {**task, "score": score, "gold_nll": 1.0}

    exact = [line("fp16", i, 0.5) for i in range(40)]
    same = evidence.power_table([*exact, *(line("good", i, 0.5) for i in range(40))])
    assert "pooled +0.00 [+0.00, +0.00] points over 40 samples; lower end +0.00, above -1." in same
    worse = evidence.power_table([*exact, *(line("bad", i, 0.5 - 0.1 * (i % 2)) for i in range(40))])
    assert "**not above** -1" in worse
    assert evidence.between([*exact, *(line("fp16", 50 + i, 1.0) for i in range(2))]) == ["vt"]


def test_answers_through_the_cache(folder: Path) -> None:
    ready = loaded(folder)
    method = parse_method("cache:budget=0.5")
    assert from_description(method.name, described(method)) == method
    assert method.cached
    prompt = ready.tokenizer(TEXT)["input_ids"][:300]
    gold = ready.tokenizer(TEXT)["input_ids"][300:306]
    through, all_exact, plain = (
        answer(ready.model, parse_method(name), prompt, gold, 4, set())
        for name in ("cache:budget=0", "cache:budget=1", "fp16")
    )
    assert through.gold_nll != plain.gold_nll
    assert abs(through.gold_nll - plain.gold_nll) < 1.5
    assert len(through.tokens) == len(all_exact.tokens) == 4
    for rival in ("peer:budget=0.3", "kivi:group=16,residual=64", "turboquant:bits=3"):
        theirs = answer(ready.model, parse_method(rival), prompt, gold, 4, set())
        assert theirs.gold_nll != plain.gold_nll
        assert len(theirs.tokens) == 4
    with pytest.raises(NotImplementedError, match="reads its pages in answers: no NLL of a text"):
        check_reads_text(method)
    assert len(parse_methods("thrift:compute=16bit,promoted_storage=nested,cache")) == 2
