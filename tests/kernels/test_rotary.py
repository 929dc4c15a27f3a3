"""Rotary embeddings in place against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from thrift_attn.bench.rotary import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("batch", "tokens", "shared"), [(1, 5, True), (3, 1, False), (2, 3, True)])
def test_rotation(batch, tokens, shared):
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, tokens, h, 64, generator=gen).to(DEVICE).transpose(1, 2) for h in (8, 2))
    angle = torch.randn(1 if shared else batch, tokens, 32, generator=gen).to(DEVICE).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    want = []
    for x in (q, k):
        x, c, s = x.double(), cos.double()[:, None], sin.double()[:, None]
        half = torch.cat([-x[..., 32:], x[..., :32]], -1)
        want.append(x * c + half * s)
    got = rotate(q, k, cos, sin)
    assert got[0].data_ptr() == q.data_ptr()
    for x, y in zip(got, want, strict=True):  # two products and a sum in float32
        assert (x - y).abs().max() <= 3 * 2**-24 * y.abs().max() * 2
