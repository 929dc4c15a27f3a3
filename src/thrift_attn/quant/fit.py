"""What the low path takes from the statistics of a call: a mean query, and powers of two that level Q, K and V.

The low logit of query i and key j in block b, with m the mean query of a head, s the stretch of K and t that of Q, is::

    scale * (q_i . c_b + m . dK_j + (t (q_i - m))^ / t . (s dK_j)^ / s)     dK_j = k_j - c_b, x^ what x decodes to

and equals ``scale * q_i . k_j`` but for the two roundings, whatever m, s and t are. So they may come from a sample, and a
kernel that samples otherwise computes the same thing up to 4-bit noise. Powers of two make stretching exact. Of s only K is
asked, so that a cache, which does not know the queries to come, can do the same; s t is one number per KV head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig
from thrift_attn.sequences import Sequences

SAMPLE = 4096
"""Most tokens that the statistics are taken from, evenly spaced; of K and V whole blocks."""

SHARE = 0.75
"""How much of the difference between channels is evened out; 1 would make K equal in every channel."""

LEVEL = 3.0
"""log2 of the root mean square that is aimed at: scales of groups then lie in the middle of what e4m3 holds."""

_SPREAD = 16.0  # a channel further below the largest than this many powers of two counts as this far below
_DEPTH = 7.0  # and one further below the size of K itself, so that blocks which are not in the sample still fit
_LARGEST = 60.0  # exponents stay within this


class Fit(NamedTuple):
    """What is taken from a call, or None: float32 (float64 for float64 input).

    Args:
        mean: m ``[..., H, D]``.
        keys: s ``[..., Hkv, D]``, powers of two: K less its block means is quantised times this.
        queries: t ``[..., Hkv, D]``, powers of two: Q less its mean is quantised times this.
        values: ``[..., Hkv]``, powers of two: V is quantised times this.
    """

    mean: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    values: Tensor | None = None


def _sample(x: Tensor) -> Tensor:
    """At most `SAMPLE` rows of ``[..., T, D]``, evenly spaced, at least in float32."""
    rows = x[..., :: -(-x.shape[-2] // SAMPLE), :]
    return rows if x.dtype == torch.float64 else rows.float()


def _sample_blocks(x: Tensor) -> Tensor:
    """Whole blocks of ``[..., T, D]``, evenly spaced, at most `SAMPLE` tokens: ``[..., blocks, 64, D]``.

    Of fewer than 64 tokens all.
    """
    whole = x.shape[-2] // BLOCK
    if whole == 0:
        blocks = x.unsqueeze(-3)
    else:
        step = -(-whole // max(1, SAMPLE // BLOCK))
        blocks = x[..., : whole * BLOCK, :].unflatten(-2, (whole, BLOCK))[..., ::step, :, :]
    return blocks if x.dtype == torch.float64 else blocks.float()


def _power(exponent: Tensor) -> Tensor:
    """Whole powers of two; 1 where zeros, a NaN or an infinity leave nothing to go by."""
    return exponent.nan_to_num(0.0, 0.0, 0.0).round().clamp(-_LARGEST, _LARGEST).exp2()


def level_keys(mean_square: Tensor, of_k: Tensor) -> Tensor:
    """s ``[..., D]``: `SHARE` of the way to one size of all channels, `LEVEL`.

    Args:
        mean_square: of every channel of what is quantised of K ``[..., D]``.
        of_k: of K itself, all channels together ``[..., 1]``.
    """
    size = mean_square.log2() / 2
    size = size.maximum(size.amax(-1, keepdim=True) - _SPREAD).maximum(of_k.log2() / 2 - _DEPTH)
    middle = size.mean(-1, keepdim=True)
    return _power(LEVEL - middle - SHARE * (size - middle))


def level_queries(mean_square: Tensor, keys: Tensor) -> Tensor:
    """t from the mean square of every channel of Q less its mean ``[..., Hkv, D]`` and s: 1 / s times what leads to `LEVEL`."""
    size = (mean_square / keys.square()).mean(-1, keepdim=True).log2() / 2
    return _power(LEVEL - size) / keys


def level_values(mean_square: Tensor) -> Tensor:
    """The power of two that brings V of this mean square ``[...]`` to `LEVEL`."""
    return _power(LEVEL - mean_square.log2() / 2)


def fit(q: Tensor | None, k: Tensor, v: Tensor, config: ThriftConfig) -> Fit:
    """What ``config`` takes from one sequence, or from a batch of equal lengths.

    Args:
        q: ``[..., H, Tq, D]``, only queries that see something; None for a cache.
        k: ``[..., Hkv, Tk, D]``.
        v: likewise.
        config: what is wanted. The mean is taken of more than `DECODE_ROWS` queries that are quantised to 4 bits: the mean of
            few is nearly the queries themselves, and its product with the keys would be 16-bit attention.

    Source: docs/method.md. Removing the mean of Q: SageAttention2, arXiv 2411.10958, there per block of queries; a factor
    per channel between two operands: SmoothQuant, arXiv 2211.10438.
    """
    mean = queries = None
    if q is not None and q.shape[-2] and config.four_bit_queries:
        queries = _sample(q)
        if config.center == "all" and q.shape[-2] > DECODE_ROWS:
            mean = queries.mean(-2)
            queries = queries - mean.unsqueeze(-2)
    if not config.balanced:
        return Fit(mean)
    blocks = _sample_blocks(k)
    of_k = blocks.square().mean((-3, -2, -1)).unsqueeze(-1)
    if config.centred:
        blocks = blocks - blocks.mean(-2, keepdim=True)
    keys = level_keys(blocks.square().mean((-3, -2)), of_k)
    values = level_values(_sample_blocks(v).square().mean((-3, -2, -1)))
    if queries is None:
        return Fit(mean, keys, None, values)
    squares = queries.unflatten(-3, (k.shape[-3], -1)).square().mean((-3, -2))  # [..., Hkv, D]
    return Fit(mean, keys, level_queries(squares, keys), values)


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
