"""A whole run, with the device replaced by a stand-in: every method gets a row, and a lost device can be survived."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from thrift_lab.bench import run_bench as runner
from thrift_lab.bench.baselines import BASELINES
from thrift_lab.bench.bench_records import BenchRecord
from thrift_lab.bench.cases import DecodeCase
from thrift_lab.bench.inputs import make_inputs
from thrift_lab.bench.run_bench import BenchPlan, PreparedCase, run
from thrift_lab.bench.timing import DeviceLost

CASE = DecodeCase(batch=1, kv=200, q_heads=4, kv_heads=2, head_dim=32)
CASES = (CASE, replace(CASE, promoted_storage="16bit"), replace(CASE, batch=2))


def timer(steps, *, replays, warmup):
    out, *_ = [step() for step in steps]
    return [10.0] * replays, out


@pytest.fixture
def said(monkeypatch):
    """A device made of the CPU; returns what the run says."""
    monkeypatch.setattr(runner, "require_cuda", lambda: torch.device("cpu"))
    monkeypatch.setattr(runner, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(runner, "matmul_rate", lambda: 1e9)
    monkeypatch.setattr(runner, "_release", lambda: None)
    monkeypatch.setattr(runner.flashinfer_build, "start", lambda cases, seconds: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 << 30))

    def prepared(plan, shape):
        small, big = (make_inputs(replace(shape, kv=kv), device="cpu") for kv in (100, shape.kv))
        return PreparedCase(small, big, plan.settings, timer=timer, guard=lambda what: None)

    monkeypatch.setattr(runner, "_prepared", prepared)
    return []


def test_every_method_gets_a_row(said, tmp_path, monkeypatch):
    plan = BenchPlan(CASES, tmp_path / "decode.json", profile=False)
    monkeypatch.setenv("THRIFT_COMMIT", "abc")
    record = run(plan, log=said.append)
    assert BenchRecord.load(plan.out) == record
    assert len(record.rows) == 2 * len(BASELINES) + 3
    assert all(bool(row.runs_us) != bool(row.reason) for row in record.rows)
    flash = record.find(CASE.shape, "FlashAttention-3")
    assert flash is not None
    assert flash.status in ("absent", "failed")
    assert len(said) == 1 + len(record.rows)
    assert record.context["commit"] == "abc"
    for row in record.rows:
        assert row.ignored == (["center", "normalize"] if row.ours else None), row.method


def test_only_and_skip(said, tmp_path):
    plan = BenchPlan(
        CASES[:1], tmp_path / "decode.json", only=("flash", "thrift"), skip=("flashattention",), profile=False
    )
    names = [row.method for row in run(plan, log=said.append).rows]
    assert names[0].startswith("thrift")
    assert names[1:] == [row.name for row in BASELINES if row.name.startswith("FlashInfer")]


def test_what_does_not_fit_is_noted(said, tmp_path):
    plan = BenchPlan((DecodeCase(batch=32, kv=524288),), tmp_path / "decode.json", only=("cudnn", "thrift"))
    rows = run(plan, log=said.append).rows
    assert [row.status for row in rows] == ["skipped", "skipped"]
    assert "GiB" in rows[0].reason


def test_what_was_not_begun_is_noted(said, tmp_path):
    record = run(BenchPlan(CASES, tmp_path / "decode.json", minutes=-1.0), log=said.append)
    assert not record.rows
    assert record.context["not_begun"] == [case.to_dict() for case in CASES]


def test_a_lost_device_leaves_a_record_that_can_be_resumed(said, tmp_path, monkeypatch):
    plan = BenchPlan(CASES[:1], tmp_path / "decode.json", profile=False)
    whole = runner.run_method

    def fragile(method, *rest, **more):
        if method.name == "FlashAttention-3":
            raise DeviceLost("illegal memory access")
        return whole(method, *rest, **more)

    monkeypatch.setattr(runner, "run_method", fragile)
    with pytest.raises(DeviceLost):
        run(plan, log=said.append)
    rows = BenchRecord.load(plan.out).rows
    assert (rows[-1].method, rows[-1].status) == ("FlashAttention-3", "failed")
    record = run(plan, resume=True, log=said.append)
    names = [row.method for row in record.rows]
    assert len(names) == len(set(names)) == len(BASELINES) + 1
