"""What the low path takes from the statistics of a call: a mean query, and a power of two per channel.

The low logit of query i and key j in block b, with m the mean query of a head and s the stretch of a KV head, is::

    scale * (q_i . c_b + m . dK_j + ((q_i - m) / s)^ . (s dK_j)^)           dK_j = k_j - c_b, x^ what x decodes to

and equals ``scale * q_i . k_j`` but for the two roundings, whatever m and s are. So both may come from a sample, and a
kernel that samples otherwise computes the same thing up to 4-bit noise. Powers of two make the stretch exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig
from thrift_attn.sequences import Sequences

SAMPLE = 4096
"""Most tokens that the statistics are taken from, evenly spaced."""

SHARE = 0.75
"""How much of the difference between channels is evened out; 1 would make Q and K equal in every channel."""

_LARGEST = 24.0  # exponents stay within this


class Fit(NamedTuple):
    """Float32 (float64 for float64 input).

    Args:
        mean: m ``[..., H, D]``, or None.
        stretch: s ``[..., Hkv, D]``, or None.
    """

    mean: Tensor | None
    stretch: Tensor | None


def _sample(x: Tensor) -> Tensor:
    """At most `SAMPLE` rows of ``[..., T, D]``, evenly spaced, at least in float32."""
    rows = x[..., :: -(-x.shape[-2] // SAMPLE), :]
    return rows if x.dtype == torch.float64 else rows.float()


def fit(q: Tensor, k: Tensor, centres: Tensor, config: ThriftConfig) -> Fit:
    """Mean query and stretch of one sequence, or of a batch of equal lengths.

    Args:
        q: ``[..., H, Tq, D]``, only queries that see something.
        k: ``[..., Hkv, Tk, D]``.
        centres: c_b ``[..., Hkv, N, D]``.
        config: which of the two are wanted; both None unless more than `DECODE_ROWS` queries are quantised to 4 bits:
            the mean of few queries is nearly the queries themselves, and its product with the keys would be 16-bit attention.

    Source: docs/method.md. Removing the mean of Q: SageAttention2, arXiv 2411.10958, there per block of queries; a factor
    per channel between two operands: SmoothQuant, arXiv 2211.10438.
    """
    if not config.four_bit_queries or q.shape[-2] <= DECODE_ROWS:
        return Fit(None, None)
    queries = _sample(q)
    mean = queries.mean(-2) if config.center == "all" else None
    if config.balance == "none":
        return Fit(mean, None)
    if mean is not None:
        queries = queries - mean.unsqueeze(-2)
    keys = _sample(k)
    if config.centred:
        at = torch.arange(0, k.shape[-2], -(-k.shape[-2] // SAMPLE), device=k.device)
        keys = keys - centres[..., at // BLOCK, :].to(keys.dtype)
    groups = queries.unflatten(-3, (k.shape[-3], -1)).square().mean((-3, -2))  # [..., Hkv, D]
    least = torch.finfo(torch.float32).tiny
    exponents = (groups.clamp(min=least) / keys.square().mean(-2).clamp(min=least)).log2() / 4
    middle = exponents.mean(-1, keepdim=True)
    return Fit(mean, (middle + SHARE * (exponents - middle)).round().clamp(-_LARGEST, _LARGEST).exp2())


def key_bias(mean: Tensor, k: Tensor, centres: Tensor) -> Tensor:
    """m . dK of every key, unscaled: ``[..., H, Tk]`` in the dtype of ``mean``.

    Args:
        mean: m ``[..., H, D]``.
        k: ``[..., Hkv, Tk, D]``.
        centres: c_b ``[..., Hkv, N, D]``; zeros where K is not centred.
    """
    grouped = mean.unflatten(-2, (k.shape[-3], -1))  # [..., Hkv, G, D]
    of_blocks = (grouped @ centres.to(mean.dtype).mT).repeat_interleave(BLOCK, -1)[..., : k.shape[-2]]
    return (grouped @ k.to(mean.dtype).mT - of_blocks).flatten(-3, -2)


def mean_queries(q: Tensor, sequences: Sequences) -> Tensor:
    """m of every sequence, as `fit` takes it (0 for none), without copying lengths to the host: float32 ``[B, H, D]``.

    Args:
        q: ``[B, H, Tq, D]``, or ``[1, H, tokens, D]`` for sequences end to end.
        sequences: how they lie.
    """
    start, queries, keys = (sequences.spans[:, i].long() for i in (0, 1, 3))
    hidden = (queries - keys).clamp(min=0) if sequences.causal else torch.zeros_like(queries)
    visible = (queries - hidden)[:, None]  # [B, 1]
    step = -(-visible // SAMPLE)
    taken = torch.arange(min(SAMPLE, q.shape[2]), device=q.device) * step  # [B, S]
    there = taken < visible
    rows = ((start + hidden)[:, None] + taken).clamp(max=q.shape[2] - 1)
    part = torch.arange(sequences.batch, device=q.device) * (sequences.parts > 1)
    sample = q.transpose(1, 2)[part[:, None], rows].float()  # [B, S, H, D]
    sums = torch.where(there[..., None, None], sample, 0).sum(1)
    return torch.where(visible[..., None] > DECODE_ROWS, sums / there.sum(1).clamp(min=1)[:, None, None], 0)
