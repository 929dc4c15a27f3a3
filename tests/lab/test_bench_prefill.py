"""The prefill benchmark without a GPU: cases, sampled reference, records, picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thrift_attn import attention
from thrift_lab.bench.bench_records import BenchRecord, BenchRow, make_context
from thrift_lab.bench.cases import PREFILL_PRESETS, DecodeCase, PrefillCase, by_shape, memory_needed, prefill_grid
from thrift_lab.bench.check import Rounding, attention64
from thrift_lab.bench.inputs import Inputs, make_inputs
from thrift_lab.bench.plots import draw
from thrift_lab.bench.prefill_methods import BASELINES, PrefillReference, method, small_case, stage_bytes
from thrift_lab.bench.run_bench import BenchPlan, PreparedCase, describe, run_method
from thrift_lab.bench.variants import Method, Variant

CASE = PrefillCase(kv=200, q_heads=4, kv_heads=2, head_dim=64, dtype="float16", budget="0.4", base_format="nvfp4")


def inputs_of(case: PrefillCase) -> Inputs:
    return make_inputs(case, device="cpu", seed=1)


def heads_first(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv = inputs.case.kv
    return inputs.q[0], inputs.k[0][:, :kv].transpose(1, 2), inputs.v[0][:, :kv].transpose(1, 2)


def test_cases() -> None:
    case = PrefillCase(kv=65536, head_dim=64, base_format="nvfp4", compute="16bit")
    assert case.name == "B1 64k 32/8 D64"
    assert case.tq == 65536
    assert case.flops == 2 * 32 * 65536**2 * 64
    assert case.shape == PrefillCase(kv=65536, head_dim=64, budget="0")
    assert PrefillCase(**case.to_dict()) == case
    assert (case.config.base_format, case.config.compute) == ("nvfp4", "16bit")
    assert [len(group) for group in by_shape(PREFILL_PRESETS["target"]).values()] == [1, 2]
    assert {c.kv for c in PREFILL_PRESETS["full"]} == {2**n for n in range(12, 20)}
    assert memory_needed(case) > 2 * case.plain_elements
    grid = prefill_grid([100, 200], base_formats=["fp8", "mxfp4"], budgets=["0.1"])
    assert [(c.kv, c.base_format) for c in grid] == [(100, "fp8"), (100, "mxfp4"), (200, "fp8"), (200, "mxfp4")]
    assert small_case(case).head_dim == 64
    wrongs = (
        {"base_format": "int8"},
        {"compute": "8bit"},
        {"kv": 0},
        {"kv_heads": 5},
        {"dtype": "int8"},
        {"budget": "x"},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(case, **wrong)


def test_bytes_of_stages() -> None:
    """65,536 tokens of 32 and 8 heads of 128: 537 MB of Q, 268 MB of K and V, half of that as e4m3."""
    case = PrefillCase(kv=65536)
    moved = stage_bytes(case.config, case)
    assert moved["quantise"] == pytest.approx((537 + 268) * 1.5e6, rel=0.02)
    assert moved["attend"] == pytest.approx(537e6 + (537 + 268) * 0.5e6, rel=0.01)
    assert moved["select"] < moved["quantise"] / 50


@pytest.mark.parametrize("whole", [True, False])
def test_truth_of_rows_is_that_of_the_whole(whole: bool) -> None:
    inputs = inputs_of(CASE)
    reference = PrefillReference.of(inputs, whole=whole)
    assert reference.samples[-1] == (0, 1, 3)
    assert reference.where == f"{'all' if whole else '4 x 64'} queries of 2 of 2 KV heads of B1 200 4/2 D64 float16"
    q, k, v = heads_first(inputs)
    exact = torch.stack(
        [attention64(q[0, h : h + 1], k[0, h // 2], v[0, h // 2], scale=CASE.scale)[0] for h in range(4)]
    )
    check = reference.check(exact[None].half(), Rounding())
    assert check.error is not None
    assert check.error < 1e-3
    # Our reference on the whole prompt is what the budget is made of, row by row.
    ours = attention(q, k, v, config=CASE.config, backend="reference")
    check = reference.check(ours, CASE.config)
    assert check.ok
    assert check.error == pytest.approx(check.budget / 1.2, rel=1e-3)
    wrong = attention(
        q, k, v, config=CASE.config.with_(budget=replace(CASE.config.budget, value=0.0)), backend="reference"
    )
    assert reference.check(wrong, Rounding(p=torch.float16)).ok is False
    wrong[0, 0, 0, 0] = torch.nan
    assert reference.check(wrong, CASE.config).error is None


def fake(name: str, kind: str) -> Method:
    """Exact attention as a method."""

    def steps(inputs: Inputs):
        q, k, v = heads_first(inputs)
        return [lambda: attention(q, k, v, config=CASE.config.with_(budget=replace(CASE.config.budget, value=1.0)))]

    found = method(CASE)
    return replace(
        found, name=name, kind=kind, computes=Rounding(p=torch.float16), variants=lambda case: [Variant("one", steps)],
        launches=lambda inputs: [],
    )  # fmt: skip


def test_runs_records_and_pictures(tmp_path: Path) -> None:
    inputs = inputs_of(CASE.shape)
    references = (PrefillReference.of(inputs, whole=True), PrefillReference.of(inputs, whole=False))

    def timer(steps, **_):
        return [100.0, 120.0, 110.0], steps[0]()

    bench = PreparedCase(inputs, inputs, timer=timer, guard=lambda _: None, references=references)
    record = BenchRecord(kind="prefill", context=make_context({}), copy_bytes_per_s=1e12, matmul_flop_per_s=1e14)
    record.context["machine"]["gpu"] = record.context["machine"].get("gpu") or "none"
    record.rows.append(run_method(fake("cuDNN SDPA", "bf16"), bench, CASE.shape))
    record.rows.append(run_method(fake("thrift", "thrift"), bench, CASE))
    assert [row.status for row in record.rows] == ["timed", "timed"]
    assert "TFLOP/s" in describe(record.rows[0], record.copy)
    record.save(tmp_path / "prefill.json")
    again = BenchRecord.load(tmp_path / "prefill.json")
    assert again.kind == "prefill"
    assert again.rows == record.rows
    assert isinstance(again.rows[0].case, PrefillCase)
    assert not isinstance(again.rows[0].case, DecodeCase)
    speedup = again.speedups()[0]
    assert speedup.over("bf16") == 1.0
    assert [path.name for path in draw(again, tmp_path)] == ["prefill.png"]
    with pytest.raises(ValueError, match="no times"):
        BenchRow(CASE, "x", "bf16", "", "absent")


def test_a_method_can_be_left_out_at_one_length() -> None:
    plan = BenchPlan(cases=(CASE,), out=Path("x"), skip=("cuDNN@200", "Flash"))
    assert plan.kind == "prefill"
    assert not plan.wants("cuDNN SDPA", CASE)
    assert plan.wants("cuDNN SDPA", replace(CASE, kv=300))
    assert not plan.wants("FlashAttention-3", replace(CASE, kv=300))


def test_baselines_say_why_they_cannot_run() -> None:
    for baseline in BASELINES:
        if baseline.package == "torch":
            continue
        with pytest.raises(RuntimeError, match="import"):
            baseline.variants(CASE)
