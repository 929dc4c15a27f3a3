"""Kernels compile for GPUs that are not there, to the instructions they were written for; hashes see code and nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from thrift_attn.dispatch import HEAD_DIMS
from thrift_lab.bench import launches as listing
from thrift_lab.bench.compile import (
    CompiledKernel,
    CompileRecord,
    compare,
    compile_launch,
    expected,
    explained,
)
from thrift_lab.bench.launches import Case, Launch, cases, launches

SHORT = {case.name: case for case in cases((64, 128))}


def one(case: str, capability: int, kernel: str) -> Launch:
    return next(launch for launch in launches(SHORT[case], capability) if launch.kernel == kernel)


@pytest.mark.parametrize(
    ("case", "capability", "kernel"),
    [
        ("prefill nvfp4 16bit D 64", 80, "attend_prefill_kernel"),
        ("prefill fp8 D 64", 89, "attend_prefill_kernel"),
        ("prefill nvfp4 D 128", 100, "attend_prefill_kernel"),
        ("prefill mxfp4 D 64", 120, "attend_prefill_kernel"),
        ("prefill fp8 D 128", 90, "quantise_kv_kernel"),
        ("prefill nvfp4 D 128", 90, "select_rows_kernel"),
        ("decode nested D 128", 90, "combine_splits_kernel"),
        ("decode nested D 128", 90, "block_scores_kernel"),
    ],
)
def test_green(case: str, capability: int, kernel: str) -> None:
    row = compile_launch(one(case, capability, kernel))
    assert row.problems == []
    assert 0 < row.registers <= 255
    assert len(row.code) == 24


def test_a_case_launches_all_kernels_of_its_flow() -> None:
    prefill = {launch.kernel for launch in launches(SHORT["prefill nvfp4 D 64"], 90)}
    assert {"quantise_kv_kernel", "quantise_q_kernel", "select_rows_kernel", "attend_prefill_kernel"} <= prefill
    decode = {launch.kernel for launch in launches(SHORT["decode nested D 64"], 90)}
    assert {"write_tail_kernel", "pack_blocks_kernel", "block_scores_kernel", "select_blocks_kernel"} <= decode
    assert {"attend_split_kernel", "combine_splits_kernel"} <= decode


def test_what_is_expected_where() -> None:
    def attend(case: str, capability: int) -> str | None:
        return expected(one(case, capability, "attend_prefill_kernel"))

    assert attend("prefill nvfp4 D 128", 90) == "16 bits"
    assert attend("prefill nvfp4 D 128", 100) == "e2m1, nvfp4 scales"
    assert attend("prefill mxfp4 D 128", 120) == "e2m1, mxfp4 scales"
    assert attend("prefill fp8 D 128", 89) == "e4m3"
    assert attend("prefill nvfp4 16bit D 128", 120) == "16 bits"
    assert expected(one("prefill nvfp4 D 128", 90, "select_rows_kernel")) is None


def test_every_head_dim_and_format_is_a_case() -> None:
    assert listing.HEAD_DIMS == HEAD_DIMS
    names = [case.name for case in cases(HEAD_DIMS)]
    assert len(names) == len(set(names))
    for dim in HEAD_DIMS:
        formats = {"nvfp4", "fp8", "nvfp4 16bit"} | ({"mxfp4"} if dim != 80 else set())
        assert {f"prefill {name} D {dim}" for name in formats} <= set(names)
        assert {f"decode {name} D {dim}" for name in ("nested", "nested8", "16bit")} <= set(names)


KERNEL = """
import triton
import triton.language as tl
{blank}
@triton.jit
def {name}({first}_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load({first}_ptr + at, mask=at < n)
    tl.store({first}_ptr + at, x * {factor}, mask=at < n)
"""


def compiled(folder: Path, module: str, name: str, first: str, blank: str, factor: float) -> CompiledKernel:
    path = folder / f"{module}.py"
    path.write_text(KERNEL.format(name=name, first=first, blank=blank, factor=factor))
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[module] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    signature = {f"{first}_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    return compile_launch(Launch("case", 90, name, module, 0, signature, {(2,): 128}, {}, {}))


def test_a_hash_sees_code_and_not_names_or_places(tmp_path: Path) -> None:
    before = compiled(tmp_path, "there", "scale_kernel", "x", "", 2.0)
    moved = compiled(tmp_path, "elsewhere", "multiply_by_two_kernel", "values", "\n\n\n# moved\n", 2.0)
    changed = compiled(tmp_path, "changed", "scale_kernel", "x", "", 3.0)
    assert before.code == moved.code
    assert before.code != changed.code


def test_records_are_compared_row_by_row(tmp_path: Path) -> None:
    row = CompiledKernel(case="a", kernel="k", index=0, capability=90, code="1", registers=9, stack=0, shared=0)
    rows = [row.model_copy(update={"index": n}) for n in range(3)]
    before = CompileRecord(rows=[*rows, row.model_copy(update={"case": "gone"})])
    after = CompileRecord(rows=[rows[0], rows[1].model_copy(update={"code": "2", "registers": 12}), rows[2]])
    before.save(tmp_path / "before.json")
    differences = compare(CompileRecord.load(tmp_path / "before.json"), after)
    assert [str(one) for one in differences] == [
        "sm_90, a, k 1: registers 9 to 12, stack 0 to 0 bytes",
        "sm_90, gone, k 0: only before",
    ]
    unexplained, counts = explained(differences, {"*, a, k *": "a reason", "*no such*": "none"})
    assert [one.key for one in unexplained] == ["sm_90, gone, k 0"]
    assert counts == {"*, a, k *": 1, "*no such*": 0}


def test_the_reasons_of_the_record_are_sentences() -> None:
    reasons = json.loads((Path(__file__).parents[2] / "benchmarks/results/compile/differences.json").read_text())
    assert all(reason.endswith(".") and " " in reason for reason in reasons.values())


def test_launches_that_compile_to_the_same_are_told_apart_by_what_matters() -> None:
    launch = one("decode nested D 64", 90, "combine_splits_kernel")
    assert launch.named["D"] == 64
    assert replace(launch, case="x") != launch
    assert Case("a", "prefill", 64) in [Case("a", "prefill", 64)]
