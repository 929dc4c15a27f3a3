"""Mean queries and powers of two of a call, on the device, equal the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.device import DEVICE
from thrift_attn.config import DECODE_ROWS, ThriftConfig
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill.bundles import KernelNumerics, PrefillTensors
from thrift_attn.prefill.statistics import NO_STATISTICS, measure
from thrift_attn.reference import channel_scales as fitting
from thrift_attn.reference.channel_scales import CallStatistics, measure_call
from thrift_attn.seq_layout import SeqLayout, dense, packed, padded

DTYPE = torch.float16
DEV = torch.device(DEVICE)


def draw(batch: int, heads: int, tokens: int, dim: int) -> Tensor:
    """Channels of different size, a bias."""
    x = torch.randn(batch, heads, tokens, dim, device=DEVICE) * torch.logspace(-2, 1.5, dim, device=DEVICE)
    return (x + torch.randn(heads, 1, dim, device=DEVICE)).to(DTYPE)


def found_by(q: Tensor, k: Tensor, v: Tensor, layout: SeqLayout, config: ThriftConfig) -> CallStatistics:
    numerics = KernelNumerics.of(PrefillNumerics.resolve(config), "decoded")
    return measure(PrefillTensors(q, k, v), layout=layout, numerics=numerics)


def check(found: CallStatistics, row: int, q: Tensor, k: Tensor, v: Tensor, config: ThriftConfig) -> None:
    """One sequence of what was found, against the reference on the queries that see something."""
    want = measure_call(q.float(), k.float(), v.float(), PrefillNumerics.resolve(config))
    for name in ("k_channel_scale", "v_head_scale"):
        one, other = getattr(found, name), getattr(want, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one[row], other)
    if found.query_mean is None:
        assert want.query_mean is None
    elif want.query_mean is None:
        assert not found.query_mean[row].any()
    else:
        torch.testing.assert_close(found.query_mean[row], want.query_mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "dim", "options"),
    [
        (1, 64, {}),
        (63, 80, {}),
        (64, 64, {"center": "block"}),
        (65, 128, {"center": "none", "sink_token": "none"}),
        (1000, 64, {"base_format": "mxfp4"}),
        (130, 96, {"compute": "16bit"}),
    ],
)
def test_levels_equal_the_reference(tokens: int, dim: int, options: dict) -> None:
    torch.manual_seed(tokens)
    config = ThriftConfig(**{"base_format": "nvfp4", "smooth": "channel", **options})
    q, k, v = draw(2, 4, tokens, dim), draw(2, 2, tokens, dim), 1e-3 * draw(2, 2, tokens, dim)
    found = found_by(q, k, v, dense(2, tokens, tokens, True, DEV), config)
    for row in range(2):
        check(found, row, q[row], k[row], v[row], config)


def test_long_calls_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAMPLE", 128)
    torch.manual_seed(1)
    q, k, v = draw(1, 2, 330, 64), draw(1, 1, 330, 64), draw(1, 1, 330, 64)
    config = ThriftConfig(base_format="nvfp4", smooth="channel")
    check(found_by(q, k, v, dense(1, 330, 330, True, DEV), config), 0, q[0], k[0], v[0], config)


def test_every_sequence_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end and padded, strided, among them sequences of few queries, of queries that see nothing, and empty ones."""
    monkeypatch.setattr(fitting, "SAMPLE", 64)
    torch.manual_seed(2)
    config = ThriftConfig(base_format="nvfp4", smooth="channel")
    lengths = [(65, 130), (10, 64), (0, 5), (40, 30)]
    q, k, v = (draw(1, 115 if heads == 4 else 229, heads, 64).transpose(1, 2) for heads in (4, 2, 2))
    cu = [torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in zip(*lengths, strict=True)]
    every = packed(*cu, queries=115, keys=229, max_queries=65, max_keys=130, causal=True)
    found = found_by(q, k, v, every, config)
    for b, (queries, keys) in enumerate(lengths):
        end, k_end = int(cu[0][b + 1]), int(cu[1][b + 1])
        seen = slice(end - min(queries, keys), end)
        of_keys = slice(k_end - keys, k_end)
        if queries:
            check(found, b, q[0, :, seen], k[0, :, of_keys], v[0, :, of_keys], config)
        assert all(bool(x[b].isfinite().all()) for x in found if x is not None)
    q, k, v = (torch.cat([x[:, :, :n], torch.full_like(x[:, :, :n], 7)]) for x, n in ((q, 65), (k, 130), (v, 130)))
    k[1, :, 30:], v[1, :, 30:] = torch.nan, torch.nan
    found = found_by(q, k, v, padded(65, 130, True, torch.tensor([130, 30], device=DEVICE)), config)
    check(found, 0, q[0], k[0], v[0], config)
    check(found, 1, q[1, :, 35:], k[1, :, :30], v[1, :, :30], config)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_powers_are_finite_and_positive_whatever_comes(value: float) -> None:
    torch.manual_seed(3)
    q, k, v = draw(1, 2, 80, 64), draw(1, 2, 80, 64), draw(1, 2, 80, 64)
    q[:, 0], k[:, 0], v[:, 0] = value, value, value
    found = found_by(q, k, v, dense(1, 80, 80, True, DEV), ThriftConfig(base_format="nvfp4", smooth="channel"))
    for power in found[1:]:
        assert power is not None
        assert bool((power > 0).all() & power.isfinite().all())
        assert torch.equal(power.log2(), power.log2().round())


def test_only_what_is_wanted() -> None:
    q = draw(1, 2, 20, 64)
    sequences = dense(1, 20, 20, True, DEV)
    assert found_by(q, q, q, sequences, ThriftConfig(base_format="fp8", smooth="channel")) == NO_STATISTICS
    mean_alone = found_by(q, q, q, sequences, ThriftConfig(base_format="nvfp4", smooth="none"))
    assert mean_alone[1:] == (None, None)
    check(mean_alone, 0, q[0], q[0], q[0], ThriftConfig(base_format="nvfp4", smooth="none"))
    few = q[:, :, :DECODE_ROWS].contiguous()
    mean = found_by(few, few, few, dense(1, DECODE_ROWS, DECODE_ROWS, True, DEV), ThriftConfig(base_format="nvfp4"))[0]
    assert mean is not None
    assert not mean.any()
