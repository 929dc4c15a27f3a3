"""Run methods on cases: check, time, check again, record."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from thrift_lab.bench import decode_methods as ours
from thrift_lab.bench import flashinfer_build
from thrift_lab.bench import prefill_methods as prefill
from thrift_lab.bench.baselines import BASELINES
from thrift_lab.bench.bench_records import BenchRecord, BenchRow, KernelTime, Status, make_context, percentile
from thrift_lab.bench.cases import Case, DecodeCase, PrefillCase, by_shape, memory_needed
from thrift_lab.bench.check import Check, Reference, pick_samples
from thrift_lab.bench.inputs import WORDS, Inputs, make_inputs, sets_for
from thrift_lab.bench.timing import (
    DeviceLost,
    Settings,
    check_alive,
    copy_bandwidth,
    kernel_profile,
    matmul_rate,
    require_cuda,
    time_steps,
)
from thrift_lab.bench.variants import Absent, Launch, Method, Variant
from thrift_lab.console import Log
from thrift_lab.provenance import gpu_state

SMALL_KV = 1000
"""Tokens of the small case of the check: odd, so that the newest block is incomplete."""

SAMPLES = 4
"""(sequence, KV head) pairs that are compared with float64 on the timed case; the small case is compared whole."""

Timer = Callable[..., tuple[list[float], Any]]


@dataclass
class PreparedCase:
    """One shape, prepared: its inputs and their float64 results.

    Args:
        small: inputs of the small case.
        big: inputs of the timed case.
        settings: how long to measure.
        timer: replays steps and returns microseconds of each replay and the first output.
        guard: raises DeviceLost when the device is no longer usable.
        references: of both inputs; by default of sampled (sequence, KV head) pairs.
    """

    small: Inputs
    big: Inputs
    settings: Settings = Settings()
    timer: Timer = time_steps
    guard: Callable[[str], None] = check_alive
    references: tuple[Reference, Reference] | None = None
    small_reference: Reference = field(init=False)
    big_reference: Reference = field(init=False)

    def __post_init__(self) -> None:
        if self.references is not None:
            self.small_reference, self.big_reference = self.references
            return
        small, big = self.small.case, self.big.case
        every = pick_samples(small.batch, small.kv_heads, small.batch * small.kv_heads)
        some = pick_samples(big.batch, big.kv_heads, SAMPLES)
        self.small_reference = Reference(self.small, f"all heads of {small.name}", every)
        self.big_reference = Reference(
            self.big, f"{len(some)} of {big.batch * big.kv_heads} KV heads of {big.name}", some
        )


@dataclass
class _Trial:
    """A setting on its way through the checks."""

    variant: Variant
    checks: list[Check]
    p50: float | None = None


def _untimed(method: Method, case: Case, status: Status, reason: str) -> BenchRow:
    """Return a row without a speed, and why it has none."""
    ignored = case.ignored if method.kind == "thrift" else None
    return BenchRow(case, method.name, method.kind, method.precision, status, reason, ignored=ignored)


def run_method(method: Method, bench: PreparedCase, case: Case, *, profile: bool = False) -> BenchRow:
    """Check and time one method on one case.

    Args:
        method: ours or a baseline.
        bench: the prepared shape.
        case: as it goes into the record.
        profile: whether the profiler also looks at one step.

    Returns:
        A row: timed when an output passed the check before the timing and the timed graph's output passed it after; else the
        row says why there is no speed.

    Raises:
        DeviceLost: the method broke the device.
    """
    row = replace(
        _untimed(method, case, "absent", "not run"),
        bytes=method.bytes(case),
        bytes_per_token=method.bytes_per_token(case),
    )
    try:
        variants = method.variants(case)
    except Absent as error:
        return replace(row, reason=str(error))
    except Exception as error:  # whatever a package raises, the run goes on and says so
        return replace(row, status="failed", reason=_brief(error), notes=_where(error, method))
    tried: dict[str, float | str] = {}
    notes: list[str] = []
    passed = [trial for variant in variants if (trial := _checked(method, bench, variant, tried, notes))]
    best = _fastest(bench, passed, tried)
    if best is None:
        return _without_speed(replace(row, notes=notes), tried)
    row = replace(row, tried=tried, setting=best.variant.label, checks=best.checks)
    try:
        return _timed(method, bench, best, row, profile)
    except Exception as error:
        bench.guard(f"{method.name} on {case.name}")
        return replace(row, status="failed", reason=_brief(error), notes=_where(error, method))
    finally:
        _release()


def _checked(
    method: Method, bench: PreparedCase, variant: Variant, tried: dict[str, float | str], notes: list[str]
) -> _Trial | None:
    """Check a setting on the small and on the timed case; None, with the reason noted, when it does not pass."""
    checks: list[Check] = []
    computes = method.computes
    try:
        for inputs, reference in ((bench.small, bench.small_reference), (bench.big, bench.big_reference)):
            steps = variant.build(inputs if inputs is bench.small else _first_set(inputs))
            check = reference.check(steps[0](), computes)
            checks.append(check)
            if not check.ok:
                tried[variant.label] = f"wrong: {check}"
                return None
            del steps
    except Absent as error:
        tried[variant.label] = f"absent: {error}"
    except torch.OutOfMemoryError:
        tried[variant.label] = "skipped: no memory for it"
    except Exception as error:
        bench.guard(f"{method.name} ({variant.label})")
        tried[variant.label] = f"failed: {_brief(error)}"
        notes += _where(error, method)
    else:
        return _Trial(variant, checks)
    finally:
        _release()
    return None


def _first_set(inputs: Inputs) -> Inputs:
    return Inputs(inputs.case, inputs.q[:1], inputs.k[:1], inputs.v[:1])


def _fastest(bench: PreparedCase, passed: list[_Trial], tried: dict[str, float | str]) -> _Trial | None:
    """A few replays of every setting that passed; a single one needs none."""
    if len(passed) == 1:
        return passed[0]
    replays = bench.settings.trial_replays
    for trial in passed:
        try:
            runs, _ = bench.timer(trial.variant.build(bench.big), replays=replays, warmup=3)
            trial.p50 = statistics.median(runs)
            tried[trial.variant.label] = trial.p50
        except torch.OutOfMemoryError:
            tried[trial.variant.label] = "skipped: no memory for it"
        except Exception as error:
            bench.guard(trial.variant.label)
            tried[trial.variant.label] = f"failed: {_brief(error)}"
        _release()
    timed = [trial for trial in passed if trial.p50 is not None]
    return min(timed, key=lambda trial: trial.p50 or 0.0, default=None)


def _timed(method: Method, bench: PreparedCase, best: _Trial, row: BenchRow, profile: bool) -> BenchRow:
    """The long timing of the chosen setting, and the check of what the timed graph computed."""
    steps = best.variant.build(bench.big)
    runs, out = bench.timer(steps, replays=bench.settings.replays, warmup=bench.settings.warmup)
    after = bench.big_reference.check(out, method.computes)
    after = Check(f"{after.where}, after the timing", after.error, after.budget)
    checks = [*best.checks, after]
    if not after.ok:
        return replace(row, status="wrong", reason=str(after), checks=checks)
    row = replace(
        row,
        status="timed",
        reason="",
        checks=checks,
        runs_us=runs,
        tried={**row.tried, best.variant.label: statistics.median(runs)},
    )
    seen: dict[str, float] = {}
    kernels: list[KernelTime] = []
    notes: list[str] = []
    try:  # what goes wrong from here on does not undo the timing, but it is noted
        if profile:
            seen = kernel_profile(steps[0])
        del steps
        _release()
        kernels = [_kernel(one, bench) for one in method.launches(bench.big)]
    except Exception as error:
        bench.guard(f"{method.name} on {row.case.name}, kernels alone")
        notes.append(f"kernels alone: {_brief(error)}")
    return replace(row, kernels=kernels, profile=seen, notes=notes)


def _kernel(one: Launch, bench: PreparedCase) -> KernelTime:
    runs, _ = bench.timer(one.steps, replays=bench.settings.replays, warmup=bench.settings.warmup)
    return KernelTime(one.name, one.bytes, runs)


def _without_speed(row: BenchRow, tried: dict[str, float | str]) -> BenchRow:
    """The row of a method none of whose settings was timed: wrong outweighs failed, failed outweighs absent."""
    reasons = [str(reason) for reason in tried.values()]
    for status in ("wrong", "failed", "skipped", "absent"):
        for reason in reasons:
            if reason.startswith(f"{status}: "):
                return replace(row, status=status, reason=reason.removeprefix(f"{status}: "), tried=tried)
    return replace(row, status="failed", reason="no setting could be run", tried=tried)


def _where(error: Exception, method: Method) -> list[str]:
    """Return where an error of ours was raised, as a note: it is a defect to be mended, not a package that is absent."""
    if method.kind != "thrift":
        return []
    return ["".join(traceback.format_exception(error))[-4000:]]


def _brief(error: Exception) -> str:
    """Type and message of an error, the beginning and the end of a long one."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"


def _release() -> None:
    """Give memory back before the next setting allocates its own; look for cycles only when much of it is held."""
    if torch.cuda.is_available():
        if torch.cuda.memory_allocated() > 0.4 * torch.cuda.mem_get_info()[1]:
            gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class BenchPlan:
    """What to run.

    Args:
        cases: in order.
        out: the record's file; rows are written as they come.
        only: names of methods (or the beginnings of names), ``NAME@TOKENS`` for one length; empty for all.
        skip: likewise, not to be run.
        settings: how long to measure.
        minutes: no new case is begun after this.
        compile_seconds: what FlashInfer's compiler may take.
        profile: whether the profiler looks at our steps.
        seed: of the inputs.
    """

    cases: tuple[DecodeCase, ...] | tuple[PrefillCase, ...]
    out: Path
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    settings: Settings = Settings()
    minutes: float = 60.0
    compile_seconds: float = 400.0
    profile: bool = True
    seed: int = 0

    @property
    def kind(self) -> str:
        """Of the record."""
        return "prefill" if isinstance(self.cases[0], PrefillCase) else "decode"

    def wants(self, name: str, case: Case | None = None) -> bool:
        """Whether a method is to be run (on this case)."""

        def meant(word: str) -> bool:
            begins, _, length = word.lower().partition("@")
            return name.lower().startswith(begins) and (not length or (case is not None and length == str(case.kv)))

        return (not self.only or any(map(meant, self.only))) and not any(map(meant, self.skip))


def run(plan: BenchPlan, *, resume: bool = False, log: Log = print) -> BenchRecord:
    """Measure everything in the plan and write the record.

    Args:
        plan: what to run.
        resume: keep the rows that the record's file already has and run the others.
        log: called with a line of text about what happens.

    Raises:
        NotImplementedError: no CUDA device.
        DeviceLost: a method broke the device; its row is in the record, a resumed run goes on after it.
    """
    require_cuda()
    began = time.monotonic()
    builder = None
    flashinfer = plan.kind == "decode"
    if flashinfer and any(
        plan.wants(name) for name in ("FlashInfer", "FlashInfer FP8 KV", "FlashInfer XQA", "FlashInfer XQA FP8")
    ):
        builder = flashinfer_build.start(_decode(plan.cases), plan.compile_seconds)
    try:
        record = _opened(plan, resume)
        log(
            f"copy {record.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 matrix product {record.matmul_flop_per_s / 1e12:.0f} TFLOP/s"
        )
        for shape, cases in by_shape(plan.cases).items():
            if time.monotonic() - began > 60 * plan.minutes:
                log(f"{shape.name}: not begun, {plan.minutes:g} minutes are over")
                record.context.setdefault("not_begun", []).extend(case.to_dict() for case in cases)
                continue
            _run_shape(plan, record, shape, cases, log)
        record.context["copy_bytes_per_s_at_end"] = copy_bandwidth()
        record.context["gpu_state_at_end"] = gpu_state()
        record.context["seconds"] = round(time.monotonic() - began, 1)
        record.save(plan.out)
        return record
    finally:
        if builder is not None:
            builder.stop()


def _decode(cases: Iterable[Case]) -> list[DecodeCase]:
    return [case for case in cases if isinstance(case, DecodeCase)]


def _opened(plan: BenchPlan, resume: bool) -> BenchRecord:
    """A new record, or the one that is to be resumed."""
    if resume and plan.out.exists():
        return BenchRecord.load(plan.out)
    settings: dict[str, Any] = {
        **asdict(plan.settings),
        "seed": plan.seed,
        "data": WORDS,
        "timing": "CUDA graph replays",
    }
    record = BenchRecord(
        kind=plan.kind,
        context=make_context(settings),
        copy_bytes_per_s=copy_bandwidth(),
        matmul_flop_per_s=matmul_rate(),
    )
    record.save(plan.out)
    return record


def _run_shape(plan: BenchPlan, record: BenchRecord, shape: Case, cases: Iterable[Case], log: Log) -> None:
    """All methods on one shape: baselines once, ours for each storage and budget."""
    baselines = prefill.BASELINES if isinstance(shape, PrefillCase) else BASELINES
    work = [(method, shape) for method in baselines] + [(_ours(case), case) for case in cases]
    work = [(method, case) for method, case in work if plan.wants(method.name, case)]
    work = [(method, case) for method, case in work if record.find(case, method.name) is None]
    work.sort(key=lambda one: one[0].package == "flashinfer-python")  # last, since its compiler may still be at work
    if not work:
        return
    bench: PreparedCase | None = None
    needed, free = max(memory_needed(case) for _, case in work), torch.cuda.mem_get_info()[1]
    problem = "" if needed <= free else f"needs {needed / 2**30:.0f} GiB of device memory, there are {free / 2**30:.0f}"
    if not problem:
        try:
            bench = _prepared(plan, shape)
        except torch.OutOfMemoryError:
            problem = "no memory for the inputs and the float64 check"
    for method, case in work:
        if bench is None:
            row = _untimed(method, case, "skipped", problem)
        else:
            try:
                row = run_method(method, bench, case, profile=plan.profile and method.kind == "thrift")
            except DeviceLost as error:
                row = _untimed(method, case, "failed", f"broke the device: {error}"[:600])
                record.rows.append(row)
                record.save(plan.out)
                raise
        record.rows.append(row)
        record.save(plan.out)
        log(describe(row, record.copy_bytes_per_s))
        if row.ours and row.status == "failed":
            log("\n".join(row.notes))
    del bench
    _release()


def _ours(case: Case) -> Method:
    if isinstance(case, PrefillCase):
        return prefill.method(case)
    assert isinstance(case, DecodeCase)
    return ours.method(case)


def _prepared(plan: BenchPlan, shape: Case) -> PreparedCase:
    """Inputs and float64 results of a shape."""
    if isinstance(shape, PrefillCase):  # one input set: a call reads more than any cache holds, or all of it many times
        inputs = (make_inputs(prefill.small_case(shape), seed=plan.seed), make_inputs(shape, seed=plan.seed + 1000))
        references = (
            prefill.PrefillReference.of(x, whole=whole) for x, whole in zip(inputs, (True, False), strict=True)
        )
        return PreparedCase(*inputs, plan.settings, references=(next(references), next(references)))
    assert isinstance(shape, DecodeCase)
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    small = replace(shape, batch=min(shape.batch, 2), kv=max(SMALL_KV, shape.tq))
    return PreparedCase(
        make_inputs(small, seed=plan.seed),
        make_inputs(shape, sets=sets_for(shape, l2), seed=plan.seed + 1000),
        plan.settings,
    )


def describe(row: BenchRow, copy: float) -> str:
    """A row as one line of text."""
    head = f"{row.case.name:<16} {row.method:<26}"
    if row.status != "timed":
        return f"{head} {row.status}: {row.reason.splitlines()[0][:150]}"
    p20, p50, p80 = (percentile(row.runs_us, share) for share in (20, 50, 80))
    if isinstance(row.case, PrefillCase):
        speed = f"{row.case.flops / p50 / 1e6:.0f} TFLOP/s"
    else:
        moved = row.bytes / p50 * 1e6
        speed = f"{moved / 1e12:.2f} TB/s, {moved / copy:4.0%} of copy"
    error = max(check.error or 0.0 for check in row.checks)
    return f"{head} {p50:9.1f} us ({p20:.1f} to {p80:.1f})  {speed}  error {error:.1e}  {row.setting}"
