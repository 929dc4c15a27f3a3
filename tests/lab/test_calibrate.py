"""``thrift calibrate`` writes what an engine reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from support.tiny_eval import TEXT, loaded, save_model
from thrift_attn.reference.channel_scales import is_power_of_two
from thrift_attn.vllm.scale_files import read_scales
from thrift_lab import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(tmp_path_factory.mktemp("model"))
    (made / "houses.txt").write_text(TEXT, encoding="utf-8")
    (made / "short.txt").write_text(TEXT[:60], encoding="utf-8")
    return made


def thrift(folder: Path, *arguments: str) -> Result:
    common = ("calibrate", str(folder), "--device", "cpu", "--tokens", "300")
    return CliRunner().invoke(cli.app, [*common, *arguments], env={"COLUMNS": "120"})


def test_the_file_has_the_scales_of_every_layer(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "scales.safetensors"
    result = thrift(folder, "--text", str(folder / "houses.txt"), "-o", str(path))
    assert result.exit_code == 0, result.output
    assert "2 layers, channels of K times 2^" in result.output
    found = read_scales(str(path), {0: (1, 16), 1: (1, 16)}, rank=0, ranks=1)
    assert all(is_power_of_two(x).all() for layer in found.values() for x in layer)
    model = loaded(folder).model
    model.model.layers[1].self_attn.k_proj.weight.data[3] *= 64
    changed = tmp_path / "changed"
    model.save_pretrained(changed)
    loaded(folder).tokenizer.save_pretrained(changed)
    assert thrift(changed, "--text", str(folder / "houses.txt"), "-o", str(path)).exit_code == 0
    other = read_scales(str(path), {0: (1, 16), 1: (1, 16)}, rank=0, ranks=1)
    assert torch.equal(other[0].k_channel_scale, found[0].k_channel_scale)
    assert other[1].k_channel_scale.min() < found[1].k_channel_scale.min()


def test_a_short_text_is_refused(folder: Path, tmp_path: Path) -> None:
    result = thrift(folder, "--text", str(folder / "short.txt"), "-o", str(tmp_path / "x"))
    assert result.exit_code == 2
    assert "calibration takes at least 128 tokens" in result.output
