"""What the low path takes from the statistics of a call: a mean query, and powers of two that level K and V.

The low logit of query i and key j in block b, with m the mean query of a head and s the stretch of its KV head, is::

    scale * (q_i . c_b + m . dK_j + ((q_i - m) / s)^ . (s dK_j)^)           dK_j = k_j - c_b, x^ what x decodes to

and equals ``scale * q_i . k_j`` but for the two roundings, whatever m and s are. So both may come from a sample, and a
kernel that samples otherwise computes the same thing up to 4-bit noise. Powers of two make the stretch exact. It is taken
from K alone: a cache does not know the queries to come, and a channel of Q that is nearly constant says nothing about K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.numerics import PrefillNumerics

SAMPLE = 4096
"""Most tokens that the statistics are taken from, evenly spaced; of K and V whole blocks."""

SLACK = 1.25
"""Channels of K within this many powers of two of the middle stay as they are, the others are brought as near as that."""

LEVEL = 2.0
"""log2 of the root mean square that is aimed at, so that the scales of groups are about 2. e4m3 holds 0.016 to 448 precisely.

Q / s is then a quarter of the size of the logits; where it falls below what the scales hold, logits are near 0 as it is.
"""

SPREAD = 16.0
"""A channel further below the largest than this many powers of two counts as this far below."""

DEPTH = 7.0
"""A channel further below the size of K itself counts as this far below, so that blocks outside the sample still fit."""

LARGEST = 60.0
"""Exponents stay within this."""

REACH = 10
"""log2 of what the block that scales are taken from is kept within: pages end at 448 * 6 in nvfp4, at 2^8 * 6 in mxfp4."""


class CallStatistics(NamedTuple):
    """What is taken from a call, or None: float32 (float64 for float64 input).

    Args:
        query_mean: m ``[..., H, D]``.
        k_channel_scale: s ``[..., Hkv, D]``, powers of two: K less its block means is quantised times this, Q less its mean
            divided by it.
        v_head_scale: ``[..., Hkv]``, powers of two: V is quantised times this.
    """

    query_mean: Tensor | None = None
    k_channel_scale: Tensor | None = None
    v_head_scale: Tensor | None = None


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


class Squares(NamedTuple):
    """Mean squares of a sample of K and V.

    Args:
        channels: of every channel of what is quantised of K ``[..., Hkv, D]``; of fewer than 64 tokens, which tell little
            about channels, those of K in all of them.
        keys: of K ``[..., Hkv, 1]``.
        values: of V ``[..., Hkv]``.
    """

    channels: Tensor
    keys: Tensor
    values: Tensor


def mean_squares(k: Tensor, v: Tensor, centred: bool) -> Squares:
    """`Squares` of K and V ``[..., Hkv, T, D]``; whole blocks of at most `SAMPLE` tokens are looked at."""
    blocks = _sample_blocks(k)
    keys = blocks.square().mean((-3, -2, -1)).unsqueeze(-1)
    if k.shape[-2] < BLOCK:
        channels = keys.expand(*keys.shape[:-1], k.shape[-1])
    else:
        channels = (blocks - blocks.mean(-2, keepdim=True) if centred else blocks).square().mean((-3, -2))
    return Squares(channels, keys, _sample_blocks(v).square().mean((-3, -2, -1)))


def is_power_of_two(x: Tensor) -> Tensor:
    """Return where ``x`` is a power of two that `level_keys` and `level_values` may give: a bool tensor of its shape."""
    mantissa, exponent = torch.frexp(x)
    return (mantissa == 0.5) & ((exponent - 1).abs() <= LARGEST)


def scales_of_block(k: Tensor, v: Tensor, packed_k: Tensor, packed_v: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the powers of two of a sequence of a cache, from its first block without its first token.

    The first token, where attention with nothing to say goes, is unlike all others: its K and V are far smaller or larger. They
    bound the scales only: whatever this block holds stays within `REACH`.

    Args:
        k: ``[..., 64, D]``.
        v: likewise.
        packed_k: what pages hold of ``k`` but for its scale: less c_b.
        packed_v: likewise, 0 for a first token that is exact.
        centred: whether pages hold K less its block means.

    Returns:
        s ``[..., D]`` for K and g ``[...]`` for V, float32.
    """
    k, v = (x[..., 1:, :].float() for x in (k, v))
    channels = (k - k.mean(-2, keepdim=True) if centred else k).square().mean(-2)
    squares = Squares(channels, k.square().mean((-2, -1)).unsqueeze(-1), v.square().mean((-2, -1)))
    of_k = within_reach(level_keys(squares), packed_k.abs().amax(-2))
    return of_k, within_reach(level_values(squares), packed_v.abs().amax((-2, -1)))


def within_reach(power: Tensor, largest: Tensor) -> Tensor:
    """Powers of two, or smaller ones where times them ``largest`` would exceed 2^`REACH`."""
    limit = (REACH - largest.frexp().exponent).float().clamp(-LARGEST, LARGEST).exp2()
    return torch.where(largest.isfinite() & (largest > 0), power.minimum(limit), power)


def _power(exponent: Tensor) -> Tensor:
    """Whole powers of two; 1 where zeros, a NaN or an infinity leave nothing to go by."""
    return exponent.nan_to_num(0.0, 0.0, 0.0).round().clamp(-LARGEST, LARGEST).exp2()


def level_keys(squares: Squares) -> Tensor:
    """s ``[..., Hkv, D]``: outlier channels to within `SLACK` of the middle, the middle to `LEVEL`."""
    size = squares.channels.log2() / 2
    size = size.maximum(size.amax(-1, keepdim=True) - SPREAD).maximum(squares.keys.log2() / 2 - DEPTH)
    middle = size.mean(-1, keepdim=True)
    outside = (size - middle) - (size - middle).clamp(-SLACK, SLACK)
    return _power(LEVEL - middle.round() - outside.round())


def level_values(squares: Squares) -> Tensor:
    """The power of two ``[..., Hkv]`` that brings V to `LEVEL`."""
    return _power(LEVEL - squares.values.log2() / 2)


def measure_call(q: Tensor | None, k: Tensor, v: Tensor, numerics: PrefillNumerics) -> CallStatistics:
    """Take what ``numerics`` asks for from one sequence, or from a batch of equal lengths.

    Args:
        q: ``[..., H, Tq, D]``, only queries that see something; None for a cache.
        k: ``[..., Hkv, Tk, D]``.
        v: likewise.
        numerics: what is wanted. The mean is taken of more than `DECODE_ROWS` queries: the mean of few is nearly the queries
            themselves, and its product with the keys would be 16-bit attention.

    Source: docs/method.md. Removing the mean of Q: SageAttention2, arXiv 2411.10958, there per block of queries; a factor
    per channel between two operands: SmoothQuant, arXiv 2211.10438.
    """
    mean = None
    if q is not None and q.shape[-2] > DECODE_ROWS and numerics.subtract_query_mean:
        mean = _sample(q).mean(-2)
    if not numerics.channel_scales:
        return CallStatistics(mean)
    squares = mean_squares(k, v, numerics.centred)
    return CallStatistics(mean, level_keys(squares), level_values(squares) if numerics.v_head_scales else None)


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
