"""What the low path takes from a call: mean query, its product with the keys, powers of two per channel."""

from __future__ import annotations

import pytest
import torch

from thrift_attn import ThriftConfig
from thrift_attn.quant import fit as fitting
from thrift_attn.quant.fit import Fit, fit, key_bias, mean_queries
from thrift_attn.quant.reference import block_means
from thrift_attn.sequences import dense, packed, padded


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("tokens", [17, 64, 65, 1000])
def test_the_parts_add_up_to_the_logit(tokens: int):
    q, k = draw(4, tokens, 32) + 1, draw(2, tokens, 32)
    centres = block_means(k)
    mean, stretch = fit(q, k, centres, ThriftConfig(balance="channel"))
    assert mean is not None
    assert stretch is not None
    of_block = centres.repeat_interleave(64, 1)[:, :tokens]
    rest, delta = q - mean[:, None], k - of_block
    logits = q @ of_block.repeat_interleave(2, 0).mT + key_bias(mean, k, centres)[:, None]
    logits += (rest / stretch.repeat_interleave(2, 0)[:, None]) @ (delta * stretch[:, None]).repeat_interleave(2, 0).mT
    torch.testing.assert_close(logits, q @ k.repeat_interleave(2, 0).mT, rtol=0, atol=1e-11)
    assert torch.equal(stretch.log2(), stretch.log2().round())


def test_only_many_queries_in_four_bits_have_a_mean():
    q, k = draw(2, 40, 16), draw(1, 40, 16)
    centres = block_means(k)
    nothing = Fit(None, None)
    assert fit(q[:, :16], k, centres, ThriftConfig(balance="channel")) == nothing
    assert fit(q, k, centres, ThriftConfig(math="16bit", balance="channel")) == nothing
    assert fit(q, k, centres, ThriftConfig(low="fp8", balance="channel")) == nothing
    assert fit(q, k, centres, ThriftConfig(center="block")) == nothing
    mean = fit(q, k, centres, ThriftConfig()).mean
    assert mean is not None
    torch.testing.assert_close(mean, q.mean(1))


def test_balanced_channels_bring_q_and_k_together():
    size = torch.ones(16, dtype=torch.float64)
    size[3] = 64
    q, k = draw(2, 100, 16) / size, draw(1, 100, 16) * size
    stretch = fit(q, k, block_means(k), ThriftConfig(balance="channel")).stretch
    assert stretch is not None
    spread = (k * stretch).std((0, 1)) / (q / stretch).std((0, 1))
    assert float(spread.max() / spread.min()) < 64  # from 64 * 64


def test_every_sequence_has_its_own_mean(monkeypatch):
    monkeypatch.setattr(fitting, "SAMPLE", 24)
    config = ThriftConfig()
    lengths = [(65, 130), (10, 64), (40, 30)]  # the last has ten queries that see nothing
    q, k = draw(2, 115, 16).float(), draw(1, 224, 16).float()
    cu = [torch.tensor([0, *x]).cumsum(0).int() for x in zip(*lengths, strict=True)]
    found = mean_queries(q[None], packed(*cu, queries=115, keys=224, most_queries=65, most_keys=130, causal=True))
    for b, (queries, keys) in enumerate(lengths):
        end = int(cu[0][b + 1])
        own = q[:, end - min(queries, keys) : end]
        want = fit(own, k[:, :keys], block_means(k[:, :keys]), config).mean
        torch.testing.assert_close(found[b], torch.zeros(2, 16) if want is None else want)
    two = torch.stack([q[:, :65], q[:, 50:]])
    for b, row in enumerate(mean_queries(two, padded(65, 130, True, torch.tensor([130, 30])))):
        seen = two[b][:, 35:] if b else two[b]
        torch.testing.assert_close(row, seen[:, :: -(-seen.shape[1] // 24)].mean(1))
    whole = mean_queries(two, dense(2, 65, 65, True, q.device))
    torch.testing.assert_close(whole, two[:, :, ::3].mean(2))
