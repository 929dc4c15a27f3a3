"""The whole-model benchmark on a tiny model on the CPU: what it does, not how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.4")
from thrift_lab.bench import e2e, e2e_model
from thrift_lab.bench.e2e_plot import draw
from thrift_lab.cli import app

CASES = (e2e.ModelCase(256, 1, True), e2e.ModelCase(130, 2, False))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Any:
    plan = e2e.ModelPlan(
        "tiny", CASES, tmp_path_factory.mktemp("e2e") / "tiny.json", 4, fused=False, device="cpu", check_tokens=150,
        full=256, residual_share=0.0,
    )  # fmt: skip
    said: list[str] = []
    return plan, e2e.run(plan, said.append), said


def test_every_side_of_every_case_is_timed(record: Any) -> None:
    _, found, said = record
    sides = ("bf16", "thrift", "residuals")
    wanted = [(case, side) for case in CASES for side in sides] + [(CASES[0], "transformers")]
    assert [(row.case, row.side) for row in found.rows] == wanted
    assert all(row.status == "timed" for row in found.rows)
    for row in found.rows:
        assert len(row.decode_ms) == 4, row
        assert (row.prefill_s is not None) == (row.case.prompt and row.side != "transformers")
    assert found.check["bf16"] < 0.01  # in its first steps it also reads the slots of the last ones
    assert found.check["all"] < 0.01
    assert found.check["chunks"] < 0.01
    assert found.check["launched"] == found.check["residuals launched"] == 0
    assert 0 < found.check["thrift"] <= found.check["residuals"] < 1
    assert found.largest["thrift"]["tokens"] == 256
    assert any("largest context" in line for line in said)


def test_bytes_are_those_of_the_cache(record: Any) -> None:
    _, found, _ = record
    plain = found.row(CASES[1], "bf16")
    assert plain.kv_bytes == 2 * 2 * 2 * 130 * 2 * 64 * 4  # layers, K and V, batch, slots, heads, D, float32
    assert 0 < found.row(CASES[1], "residuals").kv_bytes < found.row(CASES[1], "thrift").kv_bytes


def test_a_full_batch_is_of_whole_sequences(record: Any) -> None:
    _, found, said = record
    assert list(found.full) == ["bf16", "thrift", "residuals"]
    for row in found.full.values():
        assert (row["sequences"], row["context"], row["tokens"]) == (2, 256, 512)
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["decode_ms"])
    assert found.full["residuals"]["bytes_per_token"] < found.full["thrift"]["bytes_per_token"]
    assert any("full batch, residuals: 2 x 256 tokens" in line for line in said)


def test_records_come_back_and_are_drawn(record: Any, tmp_path: Path) -> None:
    plan, found, _ = record
    again = e2e.ModelRecord.load(plan.out)
    assert again == found
    assert again.baseline(CASES[0]).side in ("bf16", "transformers")
    console = Console(width=140, record=True)
    console.print(again.table().drawn())
    assert "B1 x 256" in console.export_text()
    assert draw(again, tmp_path / "a" / "tiny.png").stat().st_size > 10_000
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not a record of kind e2e"):
        e2e.ModelRecord.load(tmp_path / "other.json")


def test_nothing_is_timed_when_the_logits_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = e2e_model.bf16_attention
    monkeypatch.setattr(e2e_model, "bf16_attention", lambda *a, **k: (right(*a, **k)[0] * -3, None))
    plan = e2e.ModelPlan(
        "tiny", CASES[:1], tmp_path / "x.json", 2, fused=False, device="cpu", check_tokens=150, largest=False
    )
    with pytest.raises(ValueError, match="bf16: logits"):
        e2e.run(plan, lambda line: None)
    assert not plan.out.exists()


def test_an_error_of_one_side_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = e2e.ModelPlan(
        "tiny",
        CASES[:1],
        tmp_path / "x.json",
        2,
        fused=False,
        device="cpu",
        check_tokens=150,
        largest=False,
        as_is=False,
    )
    monkeypatch.setattr(e2e.ModelBench, "kv_bytes", lambda self, cache: 1 / 0)
    monkeypatch.setattr(e2e.ModelBench, "decode", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
    found = e2e.run(plan, lambda line: None)
    assert [(row.status, row.reason) for row in found.rows] == [("failed", "RuntimeError: broken")] * 2


@pytest.mark.parametrize("case", ["131072", "axb", "64x0", "64x1:full"])
def test_cases_are_checked(case: str) -> None:
    result = CliRunner().invoke(app, ["bench", "e2e", "--model", "tiny", "--device", "cpu", "--cases", case])
    assert result.exit_code == 2


def test_a_large_gpu_stands_in_for_a_smaller_one(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (139 * 2**30, 140 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    bench = object.__new__(e2e.ModelBench)
    bench.plan = e2e.ModelPlan("tiny", CASES, Path("tiny.json"), gpu_memory=80)
    assert bench._deny_memory() == 60 * 2**30
    assert given == [79 / 140]  # the driver's GiB counts
    for wrong in (0.5, 141):
        bench.plan = e2e.ModelPlan("tiny", CASES, Path("tiny.json"), gpu_memory=wrong)
        with pytest.raises(
            ValueError, match=f"gpu_memory must be above what is in use and at most 140.0 GiB, got {wrong}"
        ):
            bench._deny_memory()
