"""``thrift bench serve`` and ``thrift eval serve`` on the CPU engine: what they do, not how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from thrift_lab.cli import app
from thrift_lab.serving import run_serve
from thrift_lab.serving.serve_plan import plan_of
from thrift_lab.serving.serve_records import ServeRecord
from thrift_lab.serving.served_nll import ServedRecord


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small run in two calls, the second of which finds the gate and the baseline in the record."""
    plan = plan_of(
        "small", out=tmp_path_factory.mktemp("serve") / "serve.json", methods=("bf16", "thrift"), lengths=(512,)
    )
    said: list[str] = []
    run_serve.run(plan, only=["thrift"], log=said.append)
    run_serve.run(plan, log=said.append)
    return plan, ServeRecord.load(plan.out), said


def test_every_cell_is_timed_behind_a_green_gate(served: Any) -> None:
    plan, record, said = served
    assert record.gate is not None
    assert record.gate.is_green, record.gate.problem
    assert record.gate.compared > 100
    assert {row.cell for row in record.rows} == set(plan.cells())
    assert [row.reason for row in record.rows if row.status != "timed"] == []
    assert sum(line.startswith("gate: thrift answers") for line in said) == 1
    assert sum("starting an engine" in line for line in said) == 2


def test_as_many_as_fit_are_admitted_and_decode(served: Any) -> None:
    """In 4 MiB each: 7 sequences of 512 tokens in 16 bits; of thrift's 54 blocks of 128 tokens each takes 5."""
    plan, record, _ = served
    bf16, thrift = (record.of(method, 512, "capacity")[0] for method in ("bf16", "thrift"))
    for row in (bf16, thrift):
        assert row.sequences == min(row.fits, plan.sequences)
        assert not row.preemptions
        assert 0.9 * 512 * row.sequences < row.held_tokens <= 512 * row.sequences
        assert len(row.step_ms) == plan.full_steps
        assert len(record.of(row.cell.method, 512, "single")[0].step_ms) == plan.steps
    assert thrift.kv_tokens > 1.3 * bf16.kv_tokens
    assert thrift.held_tokens > 1.2 * bf16.held_tokens


def test_texts_lose_nothing_where_every_block_is_promoted(model: str, tmp_path: Path) -> None:
    """Three texts in several parts each; pages in FP8 and without promotion are beside, so that a loss can be seen."""
    g = torch.Generator().manual_seed(3)
    texts = []
    for name in "abc":
        ids = torch.randint(4, 256, (520,), generator=g).tolist()
        (tmp_path / name).write_text(" ".join(f"w{token}" for token in ids))
        texts += ["--text", str(tmp_path / name)]
    common = ["eval", "serve", "--model", model, *texts, "--length", "512", "--chunk", "192", "--dtype", "float16"]
    records = {}
    for budget in (1, 0):
        out, only = tmp_path / f"{budget}.json", [] if budget else ["--only", "bf16,thrift"]
        thrift = ["--thrift", json.dumps({"budget": budget})]
        found = CliRunner().invoke(app, [*common, *only, *thrift, "-o", str(out)])
        assert found.exit_code == 0, found.output
        records[budget] = ServedRecord.load(out)
    whole, none = ({row.method: row.losses[0] for row in records[budget].rows} for budget in (1, 0))
    assert records[1].nll["thrift"].shape == (3, 511)
    spread = {name: np.abs(records[1].nll[name] - records[1].nll["bf16"]).mean() for name in ("thrift", "fp8")}
    lossy = np.abs(records[0].nll["thrift"] - records[0].nll["bf16"]).mean()
    assert abs(whole["thrift"].loss) < 0.003
    assert spread["thrift"] < 0.01
    assert lossy > 1.5 * spread["thrift"]
    assert none["thrift"].nll != whole["thrift"].nll
    assert [one.text for one in records[1].rows[2].losses] == ["all", "a", "b", "c"]
