"""The correctness gate and the runner: what is wrong, broken or absent gets no speed, and the record says why."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch

from thrift_attn.interface import attention
from thrift_lab.bench import decode_methods as ours
from thrift_lab.bench.baselines import BASELINES
from thrift_lab.bench.bench_records import BenchRow, percentile
from thrift_lab.bench.cases import DecodeCase, plain_bytes
from thrift_lab.bench.check import Check, Reference, Rounding, attention64, pick_samples
from thrift_lab.bench.inputs import make_inputs, sets_for
from thrift_lab.bench.run_bench import PreparedCase, describe, run_method
from thrift_lab.bench.timing import DeviceLost
from thrift_lab.bench.variants import Absent, Launch, Method, Variant

CASE = DecodeCase(batch=2, kv=200, q_heads=4, kv_heads=2, head_dim=32)
P16 = Rounding(p=torch.bfloat16)


def sdpa(inputs, spoil=lambda out: out):
    """Steps of torch's own attention, optionally spoiled."""
    kv = inputs.case.kv

    def step(q, k, v):
        k, v = (x[:, :kv].transpose(1, 2) for x in (k, v))
        return spoil(torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    return [partial(step, *one) for one in zip(inputs.q, inputs.k, inputs.v, strict=True)]


def method(*variants, **changes):
    return Method(
        **{
            "name": "tried",
            "kind": "bf16",
            "package": "torch",
            "precision": "16-bit",
            "computes": P16,
            "bytes": lambda case: plain_bytes(case, 2),
            "bytes_per_token": lambda case: 1.0,
            "variants": lambda case: [Variant(label, build) for label, build in variants],
            **changes,
        }
    )


class Timer:
    """Stands in for the graph: runs the steps once, and says how long each setting is to have taken."""

    def __init__(self, *medians):
        self.medians = list(medians) or [10.0]
        self.calls = 0

    def __call__(self, steps, *, replays, warmup):
        out, *_ = [step() for step in steps]
        us = self.medians[min(self.calls, len(self.medians) - 1)]
        self.calls += 1
        return [us] * replays, out


def bench(timer=None, guard=lambda what: None):
    small = make_inputs(replace(CASE, batch=1, kv=100), device="cpu")
    return PreparedCase(small, make_inputs(CASE, sets=2, device="cpu", seed=9), timer=timer or Timer(), guard=guard)


def test_right_method_is_timed():
    row = run_method(method(("plain", sdpa)), bench(), CASE)
    assert row.status == "timed"
    assert len(row.runs_us) == 50
    assert len(row.checks) == 3
    assert all(check.ok for check in row.checks)
    assert "us" in describe(row, 3e12)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out * 1.05,
        lambda out: out.roll(1, 1),
        lambda out: out.index_fill(0, torch.tensor(out.shape[0] - 1), 0.0),
        lambda out: out.index_fill(1, torch.tensor(3), float("nan")),
    ],
    ids=["scaled", "heads swapped", "last sequence missing", "nan"],
)
def test_wrong_method_gets_no_speed(spoil):
    timer = Timer()
    row = run_method(method(("bad", partial(sdpa, spoil=spoil))), bench(timer), CASE)
    assert row.status == "wrong"
    assert not row.runs_us
    assert "budget" in row.reason
    assert timer.calls == 0


def test_gate_looks_again_after_the_timing():
    """Right when called once, wrong under the timer: no speed."""
    calls = {"n": 0}

    def fickle(inputs):
        def spoil(out):
            calls["n"] += 1
            return out if calls["n"] <= 2 else out * 2

        return sdpa(inputs, spoil)

    row = run_method(method(("fickle", fickle)), bench(), CASE)
    assert row.status == "wrong"
    assert "after the timing" in row.reason
    assert not row.runs_us


def test_fastest_right_setting_wins_and_all_are_noted():
    def missing(inputs):
        raise Absent("no such library")

    def broken(inputs):
        raise RuntimeError("boom")

    variants = (
        ("slow", sdpa),
        ("fast", sdpa),
        ("wrong", partial(sdpa, spoil=lambda out: out + 1)),
        ("missing", missing),
        ("broken", broken),
    )
    row = run_method(method(*variants), bench(Timer(20.0, 10.0, 11.0)), CASE)
    assert row.setting == "fast"
    assert row.tried["slow"] == 20.0
    assert row.tried["fast"] == 11.0
    assert str(row.tried["wrong"]).startswith("wrong: ")
    assert row.tried["missing"] == "absent: no such library"
    assert row.tried["broken"] == "failed: RuntimeError: boom"


def test_absent_method_is_recorded_with_its_reason():
    def variants(case):
        raise Absent("import nothing: ModuleNotFoundError")

    row = run_method(method(variants=variants), bench(), CASE)
    assert (row.status, row.reason) == ("absent", "import nothing: ModuleNotFoundError")
    assert "absent" in describe(row, 3e12)


def test_failed_method_is_recorded_with_its_reason():
    def broken(inputs):
        raise AssertionError("expects pages of 16")

    row = run_method(method(("only", broken)), bench(), CASE)
    assert row.status == "failed"
    assert "expects pages of 16" in row.reason


def test_lost_device_ends_the_run():
    def guard(what):
        raise DeviceLost(what)

    def broken(inputs):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(DeviceLost, match="tried"):
        run_method(method(("only", broken)), bench(guard=guard), CASE)


def test_kernels_are_timed_alone():
    def launches(inputs):
        return [Launch("scores", [lambda: None], 64)]

    row = run_method(method(("plain", sdpa), launches=launches), bench(), CASE)
    assert [(kernel.name, kernel.bytes, kernel.p50_us) for kernel in row.kernels] == [("scores", 64, 10.0)]


def test_trouble_with_a_kernel_alone_keeps_the_step():
    def launches(inputs):
        raise RuntimeError("no such launcher")

    row = run_method(method(("plain", sdpa), launches=launches), bench(), CASE)
    assert row.status == "timed"
    assert row.notes == ["kernels alone: RuntimeError: no such launcher"]


def test_our_side_uses_the_storage_and_budget_of_the_case(monkeypatch):
    """The inputs belong to the shape, which knows neither."""
    import thrift_attn.cache

    class Cache:
        """The reference behind the cache's interface."""

        made: ClassVar[list] = []

        def __init__(self, *, batch, kv_heads, head_dim, max_pages, num_pages, config, dtype, device):
            self.config, self.k, self.v = config, [], []
            assert num_pages == batch * max_pages
            self.made.append(config)

        def append(self, k, v):
            assert k.is_contiguous()
            self.k.append(k)
            self.v.append(v)

        def attend(self, q, *, scale):
            return attention(q, torch.cat(self.k, 2), torch.cat(self.v, 2), config=self.config, scale=scale)

    monkeypatch.setattr(thrift_attn.cache, "PagedThriftCache", Cache, raising=False)
    monkeypatch.setattr(ours, "APPEND", 96)
    case = replace(CASE, budget="0.5", promoted_storage="nested8")
    row = run_method(ours.method(case), bench(), case)
    assert row.status == "timed", row.reason
    assert set(Cache.made) == {case.config}
    assert row.method == "thrift nested8 0.5"


def test_record_refuses_a_speed_without_a_passed_check():
    red = Check("here", 0.5, 0.1)
    with pytest.raises(ValueError, match="passed correctness check"):
        BenchRow(CASE, "m", "bf16", "16-bit", "timed", runs_us=[1.0], checks=[red])
    with pytest.raises(ValueError, match="passed correctness check"):
        BenchRow(CASE, "m", "bf16", "16-bit", "timed", runs_us=[1.0])
    with pytest.raises(ValueError, match="reason"):
        BenchRow(CASE, "m", "bf16", "16-bit", "absent")
    with pytest.raises(ValueError, match="timed"):
        BenchRow(CASE, "m", "bf16", "16-bit", "failed", reason="x", runs_us=[1.0])


def test_our_gate_is_the_reference_of_the_same_precision():
    """The reference itself passes with a margin of 1.2; a colder budget than configured does not."""
    inputs = make_inputs(CASE, device="cpu")
    reference = Reference(inputs, "all", pick_samples(2, 2, 4))
    k, v = (x[0][:, : CASE.kv].transpose(1, 2) for x in (inputs.k, inputs.v))
    check = reference.check(attention(inputs.q[0], k, v, config=CASE.config), CASE.config)
    assert check.ok
    assert check.error == pytest.approx(check.budget / 1.2, rel=1e-3)
    generous = DecodeCase(**{**CASE.to_dict(), "budget": "1"}).config
    assert not reference.check(attention(inputs.q[0], k, v, config=CASE.config), generous).ok


def test_output_of_another_shape_or_dtype_is_refused():
    reference = Reference(make_inputs(CASE, device="cpu"), "all", [(0, 0)])
    with pytest.raises(ValueError, match="expected an output"):
        reference.check(torch.zeros(2, 1, 4, 32, dtype=torch.bfloat16), P16)
    with pytest.raises(ValueError, match="expected an output"):
        reference.check(torch.zeros(2, 4, 1, 32), P16)


def test_float64_attention_is_causal_among_new_tokens():
    q, k, v = torch.randn(2, 3, 16), torch.randn(70, 16), torch.randn(70, 16)
    out = attention64(q, k, v, scale=0.25)
    for i in range(3):
        seen = 70 - 3 + i + 1
        p = (q[:, i].double() @ k[:seen].double().T * 0.25).softmax(-1)
        assert torch.allclose(out[:, i], p @ v[:seen].double())


def test_rounding_costs_what_the_format_costs():
    torch.manual_seed(0)  # of other inputs now and then one comparison fails
    q, k, v = torch.randn(2, 1, 64), torch.randn(500, 64), torch.randn(500, 64)
    exact = attention64(q, k, v, scale=0.125)

    def error(rounding):
        return float((attention64(q, k, v, scale=0.125, rounding=rounding) - exact).norm() / exact.norm())

    fp8 = torch.float8_e4m3fn
    assert 1e-4 < error(P16) < 5e-3 < error(Rounding(kv=fp8)) < error(Rounding(kv=fp8, q=fp8, p=fp8)) < 0.1


def test_samples_are_spread():
    assert pick_samples(2, 2, 99) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert pick_samples(8, 8, 4) == [(0, 0), (2, 5), (5, 2), (7, 7)]
    assert pick_samples(1, 1, 4) == [(0, 0)]


def test_inputs_are_the_same_for_the_same_seed_and_concentrated():
    first, again = (make_inputs(CASE, sets=2, device="cpu", seed=3) for _ in range(2))
    assert torch.equal(first.k[1], again.k[1])
    assert not torch.equal(first.k[0], first.k[1])
    case = DecodeCase(batch=1, kv=64 * 200, q_heads=4, kv_heads=1)
    inputs = make_inputs(case, device="cpu")
    p = (inputs.q[0][0, :, 0].float() @ inputs.k[0][0, :, 0].float().T * case.scale).softmax(-1)
    mass = p.view(4, 200, 64).sum(-1).sort(descending=True).values[:, :10].sum(-1).mean()
    assert 0.3 < float(mass) < 0.98  # 5% of the blocks


def test_enough_sets_to_leave_l2():
    l2 = 50 << 20
    assert sets_for(DecodeCase(batch=8, kv=131072), l2) == 1
    small = DecodeCase(batch=1, kv=8192)
    assert sets_for(small, l2) * 0.28 * 2 * small.plain_elements > 3 * l2


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 20) == 2.0
    assert percentile([7.0], 80) == 7.0


def test_every_baseline_has_a_row_of_its_own():
    assert len({row.name for row in BASELINES}) == len(BASELINES)
    assert {row.kind for row in BASELINES} == {"bf16", "fp8"}
    for row in BASELINES:
        assert row.bytes(CASE) > 0
        assert row.bytes_per_token(CASE) == 2 * 2 * 32 * (2 if row.kind == "bf16" else 1)


@pytest.mark.parametrize("name", ["FlashAttention-2", "FlashInfer", "FlashInfer XQA FP8"])
def test_baselines_that_are_not_installed_say_so(name):
    row = next(row for row in BASELINES if row.name == name)
    with pytest.raises(Absent, match="No module named"):
        row.variants(CASE)


def test_torch_baselines_agree_with_float64_on_the_cpu():
    """The steps of the torch rows, with the backend that a CPU has: layouts and packing are right."""
    from torch.nn.attention import SDPBackend

    from thrift_lab.bench.baselines import _sdpa

    inputs = make_inputs(CASE, device="cpu")
    reference = Reference(inputs, "all", pick_samples(2, 2, 4))
    for packed in (True, False):
        for copied in (True, False):
            (step,) = _sdpa(SDPBackend.MATH, packed, copied, inputs)
            assert reference.check(step(), P16).ok


def test_more_than_one_new_token_is_absent_for_baselines():
    with pytest.raises(Absent, match="one new token"):
        BASELINES[0].variants(replace(CASE, tq=2))
