"""Files of powers of two: what is written is read, by heads of a rank, and another model's is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thrift_attn.reference.channel_scales import is_power_of_two
from thrift_attn.vllm.scale_files import LayerScales, measure, read_scales, write_scales

HEADS, DIM = 4, 32


@pytest.fixture
def file(tmp_path: Path) -> str:
    scales = {
        n: LayerScales(torch.arange(HEADS * DIM).view(HEADS, DIM) + 1000.0 * n, torch.arange(HEADS) + 10.0 * n)
        for n in (0, 3)
    }
    write_scales(tmp_path / "scales.safetensors", scales, model="a model")
    return str(tmp_path / "scales.safetensors")


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_a_rank_reads_its_heads(file: str, ranks: int, heads: int) -> None:
    found = [read_scales(file, {0: (heads, DIM), 3: (heads, DIM)}, rank=rank, ranks=ranks) for rank in range(ranks)]
    every = torch.cat([one[3].v_head_scale for one in found])
    assert every.tolist() == sorted([30.0, 31.0, 32.0, 33.0] * max(1, ranks // HEADS))
    assert all(one[3].k_channel_scale[0, 0] == 3000 + DIM * (one[3].v_head_scale[0] - 30) for one in found)
    assert found[0][0].k_channel_scale.shape == (heads, DIM)


def test_the_file_of_another_model_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match="no scales of layer 1: is it of this model"):
        read_scales(file, {1: (HEADS, DIM)}, rank=0, ranks=1)
    for heads, dim in ((2, DIM), (HEADS, 64)):
        with pytest.raises(ValueError, match=r"scales of \[4, 32\] for layer 0"):
            read_scales(file, {0: (heads, dim)}, rank=0, ranks=1)
    with pytest.raises(FileNotFoundError):
        read_scales(file + ".not", {0: (HEADS, DIM)}, rank=0, ranks=1)


def test_scales_level_channels_and_leave_the_first_block_aside() -> None:
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(HEADS, 640, DIM, generator=g) for _ in range(2))
    k[:, :, 5] *= 64
    plain = measure(k, v, centred=True)
    k[:, :64], v[:, 0] = 100, 1e-4
    found = measure(k, v, centred=True)
    assert torch.equal(found.k_channel_scale, plain.k_channel_scale)
    assert torch.equal(found.v_head_scale, plain.v_head_scale)
    assert is_power_of_two(found.k_channel_scale).all()
    assert (found.k_channel_scale[:, 5] <= found.k_channel_scale[:, 6] / 16).all()


def test_an_outlier_of_the_first_block_fits_the_pages() -> None:
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(HEADS, 640, DIM, generator=g) for _ in range(2))
    k[1, 0, 7], v[2, 3, 1] = 1e5, -1e5
    found = measure(k, v, centred=True)
    assert 500 < found.k_channel_scale[1, 7] * 1e5 <= 1024
    assert 500 < found.v_head_scale[2] * 1e5 <= 1024
