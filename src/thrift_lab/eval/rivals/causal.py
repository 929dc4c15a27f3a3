"""Causal attention that rivals share: over one set of keys, or over two where a rule says which a query reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = {"cpu": 2**24, "cuda": 2**30}
"""Bytes of one tensor of logits."""


class Sides(NamedTuple):
    """K and V twice, ``[Hkv, Tk, D]`` in the dtype that is computed in: as a cache holds them, and better."""

    low_k: Tensor
    low_v: Tensor
    high_k: Tensor
    high_v: Tensor


Better = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From positions ``[Q, 1]`` of queries and ``[1, C]`` of keys to where K and where V is read from the better side."""


def attend_dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend over one K and V, in the dtype of ``q`` by PyTorch's own kernels.

    Args:
        q: ``[H, Tq, D]``, right-aligned with the keys.
        k: ``[Hkv, Tk, D]``.
        v: likewise.
        scale: factor of the logits.

    Returns:
        ``[H, Tq, D]``.
    """
    queries, keys = q.shape[1], k.shape[1]
    seen = None
    if 1 < queries < keys:
        row = torch.arange(keys - queries, keys, device=q.device)[:, None]
        seen = torch.arange(keys, device=q.device) <= row
    operands = (x.to(q.dtype)[None] for x in (q, k, v))
    causal = queries == keys
    return F.scaled_dot_product_attention(
        *operands, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=len(q) != len(k)
    )[0]


def row_chunks(q: Tensor, keys: int, step: int = 64) -> Iterator[slice]:
    """Runs of queries of ``[H, Tq, D]`` whose logits against ``keys`` keys stay under `AT_ONCE`; cut at multiples of ``step``
    of the absolute position."""
    offset = keys - q.shape[1]
    most = AT_ONCE.get(q.device.type, AT_ONCE["cpu"]) // (4 * len(q) * keys)
    rows = max(step, most // step * step)
    start = 0
    while start < q.shape[1]:
        stop = min(q.shape[1], (start + offset) // step * step + rows - offset)
        yield slice(start, stop)
        start = stop


def against(q: Tensor, k: Tensor) -> Tensor:
    """``[H, Q, D]`` against ``[Hkv, C, D]`` without expanding the KV heads: ``[H, Q, C]``."""
    grouped = q.unflatten(0, (len(k), -1)).flatten(1, 2)
    return (grouped @ k.mT).view(len(q), q.shape[1], -1)


def weighted(p: Tensor, v: Tensor) -> Tensor:
    """``[H, Q, C]`` times ``[Hkv, C, D]``: ``[H, Q, D]``."""
    grouped = p.unflatten(0, (len(v), -1)).flatten(1, 2)
    return (grouped @ v).view(len(p), p.shape[1], -1)


def attend_sides(q: Tensor, sides: Sides, scale: float, better: Better, low_q: Tensor | None = None) -> Tensor:
    """Attend where each pair of a query and a key reads one of two sides; one softmax over both.

    Args:
        q: ``[H, Tq, D]`` float32 or float64, right-aligned with the keys.
        sides: what the two sides hold.
        scale: factor of the logits.
        better: the rule.
        low_q: ``[H, Tq, D]``, the queries as the low side multiplies them; None for ``q``.

    Returns:
        ``[H, Tq, D]``.
    """
    keys = sides.low_k.shape[1]
    offset = keys - q.shape[1]
    low_q = q if low_q is None else low_q
    out = torch.empty_like(q)
    for rows in row_chunks(q, keys):
        seen = rows.stop + offset
        position = torch.arange(rows.start + offset, seen, device=q.device)[:, None]
        column = torch.arange(seen, device=q.device)[None]
        high_k, high_v = better(position, column)
        low = against(low_q[:, rows], sides.low_k[:, :seen])
        logits = torch.where(high_k, against(q[:, rows], sides.high_k[:, :seen]), low) * scale
        p = logits.masked_fill_(column > position, -torch.inf).softmax(-1)
        out[:, rows] = weighted(p.masked_fill(high_v, 0), sides.low_v[:, :seen])
        out[:, rows] += weighted(p.masked_fill(~high_v, 0), sides.high_v[:, :seen])
    return out
