"""Laws on random shapes and options against float64: 500 draws on a GPU, a few small ones interpreted.

What is drawn depends on the seed alone, so a failing seed can be drawn again.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from support.device import DEVICE
from thrift_attn import ThriftConfig, attention, attention_varlen, fraction
from thrift_attn.cache import PagedThriftCache
from thrift_attn.dispatch import interpreted

DRAWS = int(os.environ.get("THRIFT_LAW_DRAWS", "6" if interpreted() else "500"))
LONGEST = 200 if interpreted() else 3000
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = (
    (torch.float16, 64, 2, 2),
    (torch.bfloat16, 128, 2, 4),
    (torch.float16, 128, 1, 1),
    (torch.bfloat16, 80, 1, 2),
    (torch.float16, 96, 2, 1),
    (torch.bfloat16, 256, 1, 2),
)
"""dtype, head dim, KV heads and query heads per KV head: what kernels are compiled for, so few of each."""

EXACT = ThriftConfig(base_format="nvfp4", compute="16bit", budget=fraction(1.0))
"""Every block promoted from a 16-bit copy: only P and the output are rounded."""


@dataclass
class Draw:
    """One random problem: tensors ``[B, H, T, D]``, lengths and what shapes the logits."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    rng: random.Random

    @property
    def tolerance(self) -> float:
        """Twice the rounding of P and of the output."""
        return 4 * EPS[self.q.dtype]


def draw(seed: int, most_queries: int | None = None) -> Draw:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, dim, kv_heads, group = rng.choice(SHAPES[:1] if interpreted() else SHAPES)
    keys = rng.randint(1, LONGEST)
    queries = rng.choice([keys, rng.randint(1, keys), rng.randint(1, min(16, keys))])
    if most_queries is not None:
        queries = rng.randint(1, min(most_queries, keys))
    options: dict[str, Any] = {"causal": rng.random() < 0.8}
    if options["causal"] and rng.random() < 0.4:
        options["window"] = rng.randint(1, keys + 5)
    if rng.random() < 0.3:
        options["softcap"] = 20.0
    if rng.random() < 0.3:
        options["scale"] = rng.choice([0.01, 0.2])
    shape = (rng.choice([1, 2]), kv_heads, keys, dim)
    k = torch.randn(shape) + 2 * torch.randn(1, kv_heads, 1, dim)
    k += torch.randn(1, kv_heads, -(-keys // 64), dim).repeat_interleave(64, 2)[:, :, :keys]
    q, v = 1.5 * torch.randn(shape[0], kv_heads * group, queries, dim), torch.randn(shape)
    return Draw(*(x.to(DEVICE, dtype) for x in (q, k, v)), options, rng)


def exact(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window=None, softcap=None, scale=None) -> Tensor:
    """float64 attention of tensors ``[H, T, D]``; rows that see nothing are 0."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    s = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    at = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1], device=q.device)
    hidden = (key > at) if causal else torch.zeros_like(key > at)
    if window is not None:
        hidden = hidden | (key <= at - window)
    p = s.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return p @ v


def error(got: Tensor, want: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("seed", range(DRAWS))
def test_a_budget_of_one_is_exact(seed: int) -> None:
    d = draw(seed)
    got = attention(d.q, d.k, d.v, config=EXACT, backend="triton", **d.options)
    want = torch.stack([exact(*row, **d.options) for row in zip(d.q, d.k, d.v, strict=True)])
    assert error(got, want) < d.tolerance, (seed, d.options, list(d.q.shape), list(d.k.shape))


@pytest.mark.parametrize("seed", range(DRAWS // 4 + 1))
def test_promotion_never_loses(seed: int) -> None:
    d = draw(seed + 10_000)
    base = d.rng.choice(["nvfp4", "mxfp4", "fp8"]) if d.q.shape[-1] % 32 == 0 else d.rng.choice(["nvfp4", "fp8"])
    want = torch.stack([exact(*row, **d.options) for row in zip(d.q, d.k, d.v, strict=True)])
    errors = []
    for share in (0.0, 0.3, 1.0):
        config = ThriftConfig(base_format=base, budget=fraction(share))
        errors.append(error(attention(d.q, d.k, d.v, config=config, backend="triton", **d.options), want))
    assert errors[1] < 1.05 * errors[0] + d.tolerance, (seed, base, errors)
    assert errors[2] < d.tolerance, (seed, base, errors)


@pytest.mark.parametrize("seed", range(DRAWS // 4 + 1))
def test_packed_sequences_equal_each_alone(seed: int) -> None:
    d = draw(seed + 20_000)
    options = {"causal": d.options["causal"], "config": EXACT}
    cuts = sorted(d.rng.sample(range(1, d.k.shape[2]), min(2, d.k.shape[2] - 1)))
    cu = torch.tensor([0, *cuts, d.k.shape[2]], dtype=torch.int32, device=DEVICE)
    k, v = (x[0].transpose(0, 1).contiguous() for x in (d.k, d.v))
    q = torch.randn(len(k), d.q.shape[1], d.q.shape[3]).to(k)
    longest = int((cu[1:] - cu[:-1]).max())
    got = attention_varlen(q, k, v, cu, cu, longest, longest, backend="triton", **options)
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        want = exact(*(x[a:b].transpose(0, 1) for x in (q, k, v)), causal=options["causal"])
        assert error(got[a:b].transpose(0, 1), want) < d.tolerance, (seed, a, b)


@pytest.mark.parametrize("seed", range(DRAWS // 4 + 1))
def test_paged_equals_contiguous(seed: int) -> None:
    d = draw(seed + 30_000, most_queries=16)
    options = {name: value for name, value in d.options.items() if name != "causal"}
    tokens, batch = d.k.shape[2], len(d.q)
    cache = PagedThriftCache(
        batch=batch, kv_heads=d.k.shape[1], head_dim=d.k.shape[3], num_pages=batch * (tokens // 64 + 1),
        config=ThriftConfig.for_cache(promoted_storage="16bit", budget=fraction(1.0)), dtype=d.k.dtype, device=DEVICE,
    )  # fmt: skip
    done = 0
    while done < tokens:
        step = min(tokens - done, d.rng.choice([1, 17, 64, 300, tokens]))
        cache.append(d.k[:, :, done : done + step], d.v[:, :, done : done + step])
        done += step
    got = cache.attend(d.q, **options)
    want = torch.stack([exact(*row, causal=True, **options) for row in zip(d.q, d.k, d.v, strict=True)])
    assert error(got, want) < d.tolerance, (seed, options, list(d.q.shape), tokens)
