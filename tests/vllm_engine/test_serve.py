"""``thrift bench serve`` on the CPU engine: what it does, not how fast."""

from __future__ import annotations

from typing import Any

import pytest

from thrift_lab.serving import run_serve
from thrift_lab.serving.serve_plan import plan_of
from thrift_lab.serving.serve_records import ServeRecord


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
