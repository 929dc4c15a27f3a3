"""Inputs that break 4-bit attention: what the default configuration, its other storage and its other arithmetic lose on them.

One block of queries over 4,096 keys at a budget of 5%: 3 of 64 blocks. Every KV block has a topic; the queries look at three
blocks, which the budget cannot all hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from thrift_attn import ThriftConfig, attention
from thrift_attn.cache.paged import PagedThriftCache

KEYS, QUERIES, BLOCKS = 4096, 64, 64
FAMILY = {
    f"{compute}-{storage}": ThriftConfig(compute=compute, promoted_storage=storage, budget=0.05)
    for compute in ("fp4", "16bit")
    for storage in ("16bit", "nested")
}
LIMIT = 0.05

Inputs = tuple[Tensor, Tensor, Tensor]


def plain(dim: int) -> Inputs:
    """Queries [1, 2, 64, D] and keys and values [1, 1, 4096, D] of unit variance."""
    draw = torch.Generator().manual_seed(dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    topics = normal(1, 1, BLOCKS, dim)
    k = 0.7 * topics.repeat_interleave(64, 2) + 0.7 * normal(1, 1, KEYS, dim)
    v = 0.7 * normal(1, 1, BLOCKS, dim).repeat_interleave(64, 2) + 0.7 * normal(1, 1, KEYS, dim)
    looked_at = topics[0, 0, torch.tensor([5, 11, 20])[torch.arange(QUERIES) % 3]]
    q = 1.2 * math.sqrt(dim) * looked_at / looked_at.norm(dim=-1, keepdim=True) + 0.7 * normal(1, 2, QUERIES, dim)
    return q, k, v


def channel_bias(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Every seventh channel of K is shifted by 60, which no softmax sees."""
    bias = torch.zeros(k.shape[-1])
    bias[::7] = 60
    return q, k + bias, v


def outlier_channels_of_q(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    size = torch.ones(q.shape[-1])
    size[[3, q.shape[-1] // 2 + 1]] = 4.5
    return q * size, k / size, v


def mean_of_q(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Queries far from zero in all channels, as biases of the projection make them."""
    return q + torch.sign(torch.arange(q.shape[-1]) % 2 - 0.5), k, v


def sink_of_large_norm(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    direction = q.mean((1, 2))[0]
    k[:, :, 0] = 20 * direction / direction.norm()
    return q, k, v


def sink_of_small_norm(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """All keys but the first lie against the queries: the sink is the one near zero."""
    direction = q.mean((1, 2))[0]
    k[:, :, 1:] -= 6 * direction / direction.norm()
    k[:, :, 0] *= 1e-3
    return q, k, v


def near_uniform(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    return 0.02 * q, k, v


def near_uniform_with_a_mean(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Where weights that do not sum to one shift the whole output."""
    return 0.02 * q, k, v + 1


def one_hot(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """All queries look at one key, in a block whose topic they share."""
    q = q * 0 + 3 * math.sqrt(q.shape[-1]) * (k[:, :, 700] / k[:, :, 700].norm(dim=-1, keepdim=True))[:, :, None]
    return q, k, v


def large_values(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    return q, k, 300 * v


def outlier_channels_of_k(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    size = torch.ones(q.shape[-1])
    size[[3, q.shape[-1] // 2 + 1]] = 20
    return q / size.sqrt(), k * size, v


def rotating_bias(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """A bias that the rotary embedding turns around faster than a block, so that no mean holds it."""
    half = k.shape[-1] // 2
    for pair in (0, 1, 4):
        angle = torch.arange(KEYS) * 10000 ** (-pair / half)
        k[..., pair] += 30 * angle.cos()
        k[..., pair + half] += 30 * angle.sin()
        q[..., [pair, pair + half]] *= 0.2
    return q, k, v


def tiny_keys(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Scales of groups below what e4m3 holds, made up for by large queries."""
    return 1e3 * q, 1e-3 * k, v


def losses(inputs: Inputs, *configs: ThriftConfig) -> list[float]:
    """Relative error of the output of each configuration against exact attention in float64."""
    q, k, v = inputs
    logits = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).masked_fill(
        torch.arange(KEYS) > KEYS - QUERIES + torch.arange(QUERIES)[:, None], -torch.inf
    )
    exact = logits.softmax(-1) @ v.double()
    return [float((attention(q, k, v, config=config) - exact).norm() / exact.norm()) for config in configs]


def tiny_values(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Groups of V whose scale e4m3 would round to zero."""
    return q, k, 1e-4 * v


def tiny_everything(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    return 1e4 * q, 1e-4 * k, 1e-4 * v


CHANGES = [
    channel_bias, outlier_channels_of_q, mean_of_q, sink_of_large_norm, sink_of_small_norm, near_uniform,
    near_uniform_with_a_mean, one_hot, large_values, outlier_channels_of_k, rotating_bias, tiny_keys, tiny_values,
    tiny_everything,
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "dim"), [(change, 64) for change in CHANGES] + [
        (channel_bias, 128), (mean_of_q, 128), (mean_of_q, 256), (rotating_bias, 128), (sink_of_large_norm, 256),
    ],
)  # fmt: skip
def test_the_default_family_loses_little(change: Callable[..., Inputs], dim: int):
    found = losses(change(*plain(dim)), *FAMILY.values())
    assert max(found) < LIMIT, dict(zip(FAMILY, found, strict=True))


@pytest.mark.parametrize("change", [outlier_channels_of_k, rotating_bias, tiny_keys, tiny_values])
@pytest.mark.parametrize("math_", ["fp4", "16bit"])
def test_what_balance_is_for(change: Callable[..., Inputs], math_: Literal["fp4", "16bit"]):
    default = ThriftConfig(compute=math_, budget=0.05)
    without, balanced = losses(change(*plain(64)), default.with_(smooth="none"), default)
    assert balanced < 0.67 * without


@pytest.mark.parametrize("change", [rotating_bias, tiny_values])
def test_a_cache_loses_little(change: Callable[..., Inputs]):
    """The same through pages: scales are those of the first block."""
    q, k, v = change(*plain(64))
    logits = (q[:, :, -1:].double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(-1)
    exact = logits @ v.double()
    lost = []
    for balance in ("channel", "none"):
        config = ThriftConfig.for_cache(budget=0.05, smooth=balance)
        cache = PagedThriftCache(
            batch=1, kv_heads=1, head_dim=64, num_pages=BLOCKS, config=config, dtype=torch.float32, device="cpu"
        )
        for part in (slice(0, 512), slice(512, KEYS)):
            cache.append(k[:, :, part], v[:, :, part])
        lost.append(float((cache.attend(q[:, :, -1:]) - exact).norm() / exact.norm()))
    assert lost[0] < LIMIT
    assert lost[0] < 0.67 * lost[1]


@pytest.mark.parametrize("change", [channel_bias, near_uniform_with_a_mean])
def test_what_the_paper_form_loses(change: Callable[..., Inputs]):
    """The reason for centring, and for the sum of rounded weights."""
    paper, default = losses(change(*plain(64)), ThriftConfig.paper(), ThriftConfig(budget=0.05))
    assert paper > 2 * default
