"""Records: every one that is committed can be read, and a file is written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thrift_lab import provenance
from thrift_lab.bench.bench_records import BenchRecord
from thrift_lab.eval.methods import Method
from thrift_lab.eval.run_nll import NLLRecord, NLLRow
from thrift_lab.eval.runs import Run, load_runs
from thrift_lab.provenance import write_files, write_json
from thrift_lab.records import Record, read_json
from thrift_lab.show_cli import classes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CLASSES = tuple(classes())
TO_COME = {"served-nll"}
"""Kinds of which a GPU has yet to make the first record."""

BY_KIND = {kind: made for made in CLASSES for kind in made.KINDS}
OTHER_KINDS = ("exploration", "kvpress-snapkv", None)
"""Kinds of explorations, and files of runs that have none."""

OLD_FORMS = {"compile/prefill.json"}
"""Records of a schema of before, which nothing reads any more."""

COMMITTED = [path for path in sorted(RESULTS.rglob("*.json")) if str(path.relative_to(RESULTS)) not in OLD_FORMS]
RUNS = sorted(path.parent for path in RESULTS.rglob("predictions.jsonl"))


def kind_of(path: Path) -> Any:
    return read_json(path).get("kind")


def test_every_kind_of_record_is_committed_and_known() -> None:
    kinds = {kind_of(path) for path in COMMITTED}
    assert set(BY_KIND) - TO_COME <= kinds
    assert not TO_COME & kinds, "they have come"
    assert kinds - set(BY_KIND) <= set(OTHER_KINDS)


@pytest.mark.parametrize(
    "path", [p for p in COMMITTED if kind_of(p) in BY_KIND], ids=lambda p: str(p.relative_to(RESULTS))
)
def test_committed_records_are_read_shown_and_come_back(path: Path, tmp_path: Path) -> None:
    record = BY_KIND[kind_of(path)].load(path)
    assert record.context["commit"]
    assert record.table().drawn().row_count > 0
    assert len(record.markdown().splitlines()) == len(record.table().rows) + 2
    again = tmp_path / "again.json"
    record.save(again)
    other = type(record).load(again)
    assert other.to_json() == record.to_json()
    if isinstance(record, NLLRecord):
        assert isinstance(other, NLLRecord)
        assert all(np.array_equal(other.nll[name], values) for name, values in record.nll.items())
        assert set(record.nll) == {row.method.name for row in record.rows}


@pytest.mark.parametrize("folder", RUNS, ids=lambda p: str(p.relative_to(RESULTS)))
def test_committed_runs_are_read(folder: Path) -> None:
    run = Run.load(folder)
    assert run.environments
    assert run.metrics["methods"]
    assert load_runs([folder])[0].plan["model"] == run.plan["model"]


# -- written whole or not at all --------------------------------------------------------------------------------------


def a_record(value: float) -> NLLRecord:
    tokens = np.arange(8).reshape(1, 8)
    row = NLLRow(Method("fp16", None), value, None, None, None, None, None, 1.0, ())
    return NLLRecord(context={"created": "now"}, rows=[row], tokens=tokens, nll={"fp16": np.full((1, 7), value)})


def value_of(path: Path) -> float:
    record = NLLRecord.load(path)
    assert float(record.nll["fp16"].mean()) == record.rows[0].nll
    return record.rows[0].nll


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(8))
def test_a_write_that_is_cut_off_leaves_both_files_or_neither(
    at: int, error: BaseException, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the system that writes or moves fails once; what was there is there, whole, and nothing lies about."""
    path = tmp_path / "record.json"
    if earlier:
        a_record(1.0).save(path)
    calls = 0
    done = False

    def fragile(whole: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise error
            return whole(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "link", "fdopen"):
            patch.setattr(provenance.os, name, fragile(getattr(os, name)))
        patch.setattr(provenance.os, "replace", fragile(os.replace))
        patch.setattr(provenance.tempfile, "mkstemp", fragile(provenance.tempfile.mkstemp))
        try:
            a_record(2.0).save(path)
            done = True
        except type(error):
            pass
    if done:
        assert value_of(path) == 2.0
    elif earlier:
        assert value_of(path) == 1.0
    else:
        with pytest.raises(FileNotFoundError):
            NLLRecord.load(path)
    expected = {"record.json", "record.npz"} if done or earlier else set()
    assert {entry.name for entry in tmp_path.iterdir()} == expected


def test_a_pair_of_two_runs_is_refused(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        a_record(value).save(tmp_path / f"{name}.json")
    (tmp_path / "b.npz").replace(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz is not the file that its record was written with"):
        NLLRecord.load(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        NLLRecord.load(tmp_path / "b.json")


def test_files_keep_the_permissions_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_files({tmp_path / "deep" / "x": b"1"})
    assert (tmp_path / "deep" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_json_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, [float("nan")], allow_nan=False)
    assert read_json(path) == [1]


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", CLASSES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "is not a record of kind"),
        ('{"kind": "other", "schema": 1}', "is not a record of kind"),
        ('{"kind": KIND, "schema": 99}', "is not a record of kind .* and schema [12], got kind .*, schema 99$"),
        ('{"kind": KIND, "schema": SCHEMA, "context": 3, "rows": [{"x": 1}], "needles": [1]}', "is damaged"),
    ],
)
def test_damaged_records_are_one_clear_line(made: type[Record], content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content.replace("KIND", json.dumps(made.KINDS[0])).replace("SCHEMA", str(made.SCHEMA)))
    with pytest.raises(ValueError, match=message) as caught:
        made.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_array_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    a_record(1.0).save(path)
    record = json.loads(path.read_text())
    del record["per_token_sha256"]  # as in records of before it
    path.write_text(json.dumps(record))
    whole = path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        NLLRecord.load(path)


class Small(Record):
    kind: str = "small"
    share: float


def test_a_class_says_its_kind_once() -> None:
    assert (Record.KINDS, Small.KINDS, BenchRecord.KINDS) == ((), ("small",), ("decode", "prefill"))


def test_a_record_of_another_kind_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be one of small, got 'large'"):
        Small(kind="large", share=1.0).save(tmp_path / "x.json")
    Small(share=float("inf")).save(tmp_path / "x.json")
    assert Small.load(tmp_path / "x.json").share == float("inf")
    (tmp_path / "x.json").write_text('{"kind": "small", "schema": 1, "share": "much"}')
    with pytest.raises(ValueError, match=r"is damaged: share: .* valid number"):
        Small.load(tmp_path / "x.json")
