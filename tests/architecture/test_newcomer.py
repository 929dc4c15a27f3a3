"""A newcomer's first changes stay small: what CONTRIBUTING.md walks through, done here while the tests run.

A format touches three files (formats.py, config.py, numerics.py), a score one (scores.py). Whatever else a change of this kind
would have to touch would make these tests fail.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from thrift_attn import ThriftConfig, attention, attention_varlen, config, fraction, numerics, top_k
from thrift_attn.reference.formats import FORMATS, Format
from thrift_attn.reference.scores import SCORES, Score, ScoreInputs


@pytest.fixture
def qkv():
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, 200, 32, generator=draw) for heads in (4, 2, 2))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_a_format_is_a_row_a_choice_and_a_kind(monkeypatch, qkv):
    """e2m1 in groups of 8 with e4m3 scales: nvfp4 with twice the scales, so it must be nearer to the truth."""
    monkeypatch.setitem(FORMATS, "toy4", Format("toy4", "e2m1", 8, "e4m3", (6.0, 4.0), p_factor=448.0 * 6.0))
    monkeypatch.setitem(config._CHOICES, "base_format", Literal["nvfp4", "toy4"])
    monkeypatch.setattr(numerics, "FOUR_BITS", (*numerics.FOUR_BITS, "toy4"))
    exact = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    errors = {}
    for name in ("nvfp4", "toy4"):
        for share in (0.0, 0.3, 1.0):
            options = ThriftConfig(base_format=name, budget=fraction(share))
            errors[name, share] = error(attention(*qkv, config=options), exact)
    assert errors["toy4", 1.0] < 1e-6
    assert errors["toy4", 0.3] < errors["toy4", 0.0] < errors["nvfp4", 0.0]
    starts = torch.tensor([0, 200])
    packed = (x[0].transpose(0, 1) for x in qkv)
    out = attention_varlen(*packed, starts, starts, 200, 200, config=ThriftConfig(base_format="toy4", budget=0.3))
    assert error(out.transpose(0, 1)[None], exact) == pytest.approx(errors["toy4", 0.3], rel=1e-4)


@pytest.mark.parametrize("queries", [3, 200])
def test_a_score_is_a_row(monkeypatch, qkv, queries):
    """Blocks by their number, the first ones first: a sparse call then sees the beginning alone."""

    def earliest(x: ScoreInputs) -> torch.Tensor:
        return -torch.arange(x.k_block_mean.shape[1]).expand(len(x.queries), len(x.own), -1)

    monkeypatch.setitem(SCORES, "earliest", Score(earliest))
    q, k, v = qkv
    sparse = ThriftConfig.sparse("earliest", budget=top_k(1), force_first=0, force_last=0)
    out = attention(q[:, :, -queries:], k, v, config=sparse)
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, -3:], k[:, :, :64], v[:, :, :64], enable_gqa=True)
    assert error(out[:, :, -3:], want) < 1e-5
    with pytest.raises(
        ValueError, match="score must be one of 'mean', 'quest', 'local', 'oracle', 'fp4', 'earliest', got 'latest'"
    ):
        ThriftConfig(score="latest")
