"""The grid, the presets, and the bytes that a case must move."""

from __future__ import annotations

import pytest

from thrift_attn.config import ThriftConfig, fraction
from thrift_lab.bench.cases import (
    PRESETS,
    TARGET,
    DecodeCase,
    PrefillCase,
    by_shape,
    grid,
    memory_needed,
    plain_bytes,
    thrift_bytes,
)


def test_full_covers_the_grid_and_the_targets_once():
    full = PRESETS["full"]
    assert len(set(full)) == len(full)
    assert full[: len(TARGET)] == TARGET
    shapes = {(c.batch, c.kv, c.q_heads, c.kv_heads) for c in full}
    heads = ((32, 8), (28, 4), (16, 16))
    assert shapes == {
        (b, t, hq, hkv) for b in (1, 4, 8, 32) for t in (8192, 32768, 131072, 524288) for hq, hkv in heads
    }


def test_baselines_run_once_per_shape():
    groups = by_shape(TARGET)
    assert len(groups) == 3
    assert [c.promoted_storage for c in next(iter(groups.values()))] == ["nested", "16bit"]
    assert all(case.shape == shape for shape, cases in groups.items() for case in cases)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0, "kv": 64},
        {"batch": 1, "kv": 64, "q_heads": 30},
        {"batch": 1, "kv": 64, "tq": 17},
        {"batch": 1, "kv": 64, "dtype": "float32"},
        {"batch": 1, "kv": 64, "budget": "lots"},
        {"batch": 1, "kv": 64, "promoted_storage": "double"},
    ],
)
def test_bad_cases_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must|budget"):
        DecodeCase(**wrong)


def test_names():
    assert DecodeCase(batch=8, kv=131072).name == "B8 128k 32/8"
    assert DecodeCase(batch=1, kv=1000, head_dim=64, tq=4).name == "B1 1000 32/8 D64 Tq4"


def test_bytes_of_a_plain_cache():
    case = DecodeCase(batch=8, kv=131072)
    cache = 2 * 8 * 8 * 131072 * 128
    assert plain_bytes(case, 2) == 2 * cache + 2 * 8 * 32 * 128 * 2
    assert plain_bytes(case, 1) < plain_bytes(case, 2) / 1.99


def test_bytes_of_our_step():
    """nvfp4 + centres is 4.5 + 0.125 bits of 16; 5% nested adds 5% of 4.5: the design's ceiling of about 3.3x."""
    case = DecodeCase(batch=8, kv=131072)
    ours = thrift_bytes(case)
    bits = 4.5 * (1 + case.promoted / case.blocks) + 0.125
    assert ours["step"] == pytest.approx(case.plain_elements * bits / 8, rel=1e-3)
    assert 3.2 < plain_bytes(case, 2) / ours["step"] < 3.4
    copy = thrift_bytes(DecodeCase(batch=8, kv=131072, promoted_storage="16bit"))
    assert ours["step"] < copy["step"] < 1.2 * ours["step"]
    assert sum(ours[part] for part in ("scores", "select", "attend", "merge")) > ours["step"]


def test_bytes_count_the_incomplete_block_in_16_bits():
    whole, more = (thrift_bytes(DecodeCase(batch=1, kv=kv))["step"] for kv in (6400, 6463))
    assert more - whole == 8 * 63 * 2 * 128 * 2


def test_memory():
    assert memory_needed(DecodeCase(batch=8, kv=131072)) < 20 << 30
    assert memory_needed(DecodeCase(batch=32, kv=524288)) > 80 << 30


def test_own_grid():
    cases = grid(batches=iter((1, 2)), lengths=iter((64, 128)), heads=[(4, 2)], head_dim=64, promoted_storage="nested8")
    assert [(c.batch, c.kv) for c in cases] == [(1, 64), (2, 64), (1, 128), (2, 128)]
    assert {c.promoted_storage for c in cases} == {"nested8"}


def test_recipe_of_the_paper() -> None:
    """Another configuration of ours, the same case for baselines."""
    decode = DecodeCase(batch=1, kv=4096, config_name="paper", promoted_storage="16bit")
    prefill = PrefillCase(kv=4096, base_format="mxfp4", config_name="paper")
    assert decode.config == ThriftConfig.paper(compute="16bit", promoted_storage="16bit", budget=fraction(0.05))
    assert prefill.config == ThriftConfig.paper(base_format="mxfp4")
    assert decode.shape == DecodeCase(batch=1, kv=4096).shape
    assert prefill.shape == PrefillCase(kv=4096).shape
    with pytest.raises(ValueError, match="config_name must be one of"):
        PrefillCase(kv=4096, config_name="mine")
