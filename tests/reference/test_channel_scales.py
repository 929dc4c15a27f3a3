"""What the low path takes from a call: mean query, its product with the keys, powers of two that level K and V."""

from __future__ import annotations

import pytest
import torch

from thrift_attn import ThriftConfig
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference import channel_scales as fitting
from thrift_attn.reference.channel_scales import LEVEL, SLACK, CallStatistics, key_bias, measure_call
from thrift_attn.reference.quantize import block_means


def statistics_of(q, k, v, config: ThriftConfig) -> CallStatistics:
    return measure_call(q, k, v, PrefillNumerics.resolve(config))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("tokens", [17, 64, 65, 1000])
def test_the_parts_add_up_to_the_logit(tokens: int):
    q, k = draw(4, tokens, 32) + 1, draw(2, tokens, 32)
    centres = block_means(k)
    mean, keys, values = statistics_of(q, k, k, ThriftConfig(base_format="nvfp4", smooth="channel"))
    assert mean is not None
    assert keys is not None
    assert values is not None
    of_block = centres.repeat_interleave(64, 1)[:, :tokens]
    rest, delta = q - mean[:, None], k - of_block
    logits = q @ of_block.repeat_interleave(2, 0).mT + key_bias(mean, k, centres)[:, None]
    stretched = keys.repeat_interleave(2, 0)[:, None]
    logits += (rest / stretched) @ (delta.repeat_interleave(2, 0) * stretched).mT
    torch.testing.assert_close(logits, q @ k.repeat_interleave(2, 0).mT, rtol=0, atol=1e-11)
    for power in (keys, values):
        assert torch.equal(power.log2(), power.log2().round())


def test_only_many_queries_in_four_bits_have_a_mean():
    q, k = draw(2, 40, 16), draw(1, 40, 16)
    mean = statistics_of(q, k, k, ThriftConfig(base_format="nvfp4")).query_mean
    assert mean is not None
    torch.testing.assert_close(mean, q.mean(1))
    for few, config in (
        (q[:, :16], ThriftConfig(base_format="nvfp4")),
        (q, ThriftConfig(base_format="nvfp4", compute="16bit")),
        (q, ThriftConfig(base_format="fp8")),
        (q, ThriftConfig(base_format="nvfp4", center="block")),
        (None, ThriftConfig(base_format="nvfp4")),
    ):
        assert statistics_of(few, k, k, config).query_mean is None


def test_only_four_bit_formats_are_balanced():
    q, k = draw(2, 40, 16), draw(1, 40, 16)
    assert statistics_of(q, k, k, ThriftConfig(base_format="fp8", smooth="channel")) == CallStatistics()
    assert statistics_of(q, k, k, ThriftConfig(base_format="nvfp4", smooth="none"))[1:] == (None, None)
    by_k = statistics_of(None, k, k, ThriftConfig(base_format="nvfp4", smooth="channel"))
    for config in (
        ThriftConfig(base_format="nvfp4", smooth="channel"),
        ThriftConfig(base_format="nvfp4", smooth="channel", compute="16bit"),
    ):
        for one, other in zip(statistics_of(q, k, k, config)[1:], by_k[1:], strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)  # K and V alone say how they are stretched


def test_outlier_channels_come_near_the_middle_and_others_stay():
    size = torch.ones(16, dtype=torch.float64)
    size[3], size[5], size[8] = 64, 2, 1 / 8
    k, v = draw(1, 200, 16) * size * 1e-4, 1e-5 * draw(1, 200, 16)
    _, keys, values = statistics_of(None, k, v, ThriftConfig(base_format="nvfp4", smooth="channel"))
    assert keys is not None
    assert values is not None
    plain = keys[0, 0]
    assert (keys[0] != plain).nonzero().flatten().tolist() == [3, 8]
    spread = (k * keys[:, None]).std((0, 1))
    slack = 2 ** (2 * SLACK + 1) * 1.2  # both sides, half a power of two for rounding each, 20% for the sample
    assert float(spread.max() / spread.min()) < slack
    level = 2.0**LEVEL
    for x in (k * keys[:, None], v * values[:, None, None]):
        assert level / 2 < float(x.square().mean().sqrt()) < 2 * level


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_powers_are_finite_and_positive_whatever_comes(value: float):
    """A constant K has no spread; a NaN or infinity takes the balance of its head away and no more."""
    q, k = draw(4, 80, 16), draw(2, 80, 16)
    q[:2], k[0] = value, value
    found = statistics_of(q, k, k, ThriftConfig(base_format="nvfp4", smooth="channel"))
    for power in (found.k_channel_scale, found.v_head_scale):
        assert power is not None
        assert bool((power > 0).all() & power.isfinite().all())


def test_the_statistics_come_from_whole_blocks(monkeypatch):
    monkeypatch.setattr(fitting, "SAMPLE", 128)
    k, v = draw(1, 330, 16), draw(1, 330, 16)
    taken = torch.cat([k[:, :64], k[:, 192:256]], 1), torch.cat([v[:, :64], v[:, 192:256]], 1)  # 5 blocks, every third
    k[:, 320:] = 1e6  # the incomplete block is not asked
    config = ThriftConfig(base_format="nvfp4", smooth="channel")
    for one, other in zip(statistics_of(None, k, v, config)[1:], statistics_of(None, *taken, config)[1:], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
