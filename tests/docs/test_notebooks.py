"""The notebooks run, at small sizes, and say what they are to show; the calculator agrees with a record."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from support.small_model import small_model
from thrift_lab.handbook.capacity import Gpu, Shape, fits
from thrift_lab.handbook.measured import read

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def run(name: str, parameters: str = "") -> tuple[str, dict[str, Any]]:
    """Run the cells of a notebook with other parameters; what was printed, and the names at the end."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    said = io.StringIO()
    matplotlib.use("agg")
    with contextlib.redirect_stdout(said), torch.random.fork_rng():
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                exec(parameters, names)
    return said.getvalue(), names


def test_where_the_error_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRIFT_MIRROR", "pypi")
    said, names = run("where_the_error_is", f"MODEL, TOKENS, LAYER = {str(small_model())!r}, 512, 6")
    assert names["mean"] > 0.2  # far more than an even spread
    assert names["chosen"].shape == (9, 8, 8)
    assert 0 < int(names["chosen"][0].sum()) < 36
    errors = list(names["errors"].values())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4  # 8 blocks are within the floor
    assert "pairs promoted" in said


def test_a_million_tokens() -> None:
    said, names = run("a_million_tokens")
    assert [one.kind for one in names["found"]] == ["16 bits", "FP8", "thrift, 5%"]
    assert "a million fits" in said
    assert "bf16    fits 500,160 tokens" in said


def test_the_calculator_agrees_with_the_record() -> None:
    record = read("h100/e2e/llama-3.1-8b.json")
    shape = Shape("8b", 32, 8, 128, record["rows"][0]["weights"])
    gpu = Gpu("h100", record["context"]["machine"]["memory_bytes"], 3.0e12)
    found = {one.kind: one for one in fits(shape, gpu)}
    for kind, side in (("16 bits", "bf16"), ("thrift, 5%", "thrift")):
        there = record["largest"][side]
        assert found[kind].bytes_per_token == pytest.approx(there["bytes_per_token"], rel=1e-3)
        assert found[kind].tokens == pytest.approx(there["tokens"], rel=0.03)
        assert found[kind].step_ms < there["decode_ms"]
    with pytest.raises(ValueError, match=r"needs 15\.0 GiB for its weights, small has 12\.0 GiB"):
        fits(shape, Gpu("small", 16 * 2**30, 1e12))


def test_the_shape_of_a_model() -> None:
    from transformers import LlamaConfig

    shape = Shape.of(
        LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=512), 0.1
    )
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.bytes_per_token) == (4, 2, 64, 2048)
    assert shape.weights == pytest.approx(2e8)
