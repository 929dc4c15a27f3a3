"""The fused small operations of whole-model timings against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from support.device import DEVICE
from thrift_lab.bench.fused import gated, rms_norm, rotate


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


@pytest.mark.parametrize("dim", [1, 96, 1000])
def test_norm(dim):
    gen = torch.Generator().manual_seed(1)
    x, weight = torch.randn(3, 5, dim, generator=gen), torch.randn(dim, generator=gen)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5).cpu()
    assert (got - want).abs().max() <= 2**-24 * (
        dim**0.5 + 8
    ) * want.abs().max()  # a sum of dim squares, then a few roundings


def test_gate():
    gen = torch.Generator().manual_seed(2)
    gate, up = 8 * torch.randn(3, 700, generator=gen), torch.randn(3, 700, generator=gen)
    want = torch.nn.functional.silu(gate.double()) * up.double()
    got = gated(gate.to(DEVICE), up.to(DEVICE)).cpu()
    assert (got - want).abs().max() <= 2**-20 * want.abs().max()
