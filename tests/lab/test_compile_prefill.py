"""The prefill kernels compile for GPUs that are not there, to the instructions they were written for, without spilling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from thrift_attn.dispatch import HEAD_DIMS
from thrift_lab.bench.compile import CAPABILITIES, Target, compile_target, expected, save, targets


@pytest.mark.parametrize(
    "target",
    [
        Target("attend", 80, 64, "nvfp4", "16bit"),
        Target("attend", 89, 64, "fp8"),
        Target("attend", 90, 128, "nvfp4", "16bit"),
        Target("attend", 100, 128, "nvfp4"),
        Target("attend", 120, 64, "mxfp4"),
        Target("quantise_kv", 90, 128, "fp8"),
        Target("quantise_kv", 90, 128, "nvfp4"),
        Target("sum_keys", 90, 128),
        Target("sum_queries", 80, 256),
        Target("levels", 120, 128),
    ],
    ids=lambda t: f"{t.kernel}-sm{t.capability}-D{t.dim}-{t.low}",
)
def test_green(target: Target, tmp_path: Path) -> None:
    row = compile_target(target)
    assert row.problems == []
    assert 0 < row.registers <= 255
    save([row], tmp_path / "prefill.json")
    found = json.loads((tmp_path / "prefill.json").read_text())
    assert found["rows"][0]["capability"] == target.capability
    assert found["rows"][0]["products"] == row.products


def test_what_is_expected_where() -> None:
    attend = Target("attend", 90, 128, "nvfp4")
    assert expected(attend) == "16 bits"
    assert expected(replace(attend, capability=100)) == "e2m1, nvfp4 scales"
    assert expected(replace(attend, capability=120, low="mxfp4")) == "e2m1, mxfp4 scales"
    assert expected(replace(attend, low="fp8")) == "e4m3"
    assert expected(replace(attend, capability=120, math="16bit")) == "16 bits"
    assert expected(Target("select", 90, 128)) is None


def test_every_shape_is_a_target() -> None:
    found = list(targets())
    assert len(found) == len(set(found))
    for capability in CAPABILITIES:
        for dim in HEAD_DIMS:
            kinds = {t.low for t in found if t.kernel == "attend" and (t.capability, t.dim) == (capability, dim)}
            assert kinds == {"nvfp4"} | ({"mxfp4"} if dim != 80 else set()) | ({"fp8"} if capability > 80 else set())
