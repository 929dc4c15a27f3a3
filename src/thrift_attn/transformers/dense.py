"""Thrift attention on K and V that lie in tensors, not in pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from thrift_attn.dispatch import Served
from thrift_attn.interface import attend
from thrift_attn.stats import Stats


@contextmanager
def as_given(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes of the tensors: autocast has had its say about K, V and Q before."""
    with torch.autocast(device.type, enabled=False):
        yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on a device; None where it is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def check_no_gradients(*tensors: Tensor) -> None:
    """Refuse tensors that gradients are asked of, reverse or forward: a cache would keep them without a word.

    Raises:
        NotImplementedError: a tensor that requires gradients, or has a tangent.
    """
    reverse = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if reverse or any(fwAD.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "ThriftCache is for inference only: call the model under torch.no_grad() or torch.inference_mode()"
        )


def attend_counted(
    q: Tensor, k: Tensor, v: Tensor, counted: bool, *, sinks: Tensor | None = None, **options: Any
) -> tuple[Tensor, Stats, Served]:
    """`thrift_attn.attention` with its statistics, or with empty ones if they are not to be counted, and what ran.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hkv, Tk, D]``.
        v: likewise.
        counted: whether to count what is promoted.
        sinks: learned logits ``[Hq]``, see `with_sinks`.
        **options: of `thrift_attn.attention`.
    """
    with as_given(q.device):
        found = attend(q, k, v, return_lse=sinks is not None, return_stats=counted, **options)
        out = found.out
        if sinks is not None:
            assert found.lse is not None
            out = with_sinks(out, found.lse, sinks)
        return out, found.stats if counted else Stats(), found.served


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention with one more key for each head that has a logit and no value: a term more in the sum of the softmax.

    Args:
        out: attention without it, ``[B, Hq, Tq, D]``.
        lse: its log-sum-exp ``[B, Hq, Tq]``, -inf where it saw no key.
        sinks: the logits ``[Hq]``.
    """
    share = torch.sigmoid(lse - sinks.to(lse)[:, None])
    return (out * share[..., None]).to(out.dtype)


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, counted: bool, **options: Any
) -> tuple[Tensor, Stats, Served]:
    """Thrift attention under a mask of padding at the ends.

    Args:
        query: ``[B, Hq, Tq, D]``.
        key: ``[B, Hkv, Tk, D]``.
        value: likewise.
        mask: None, or bool ``[B, S]`` as `thrift_mask` gives it: the last query is in slot S - 1, True at tokens, which
            are one run in each row.
        counted: whether to count what is promoted.
        **options: of `thrift_attn.attention`.

    Returns:
        The output ``[B, Hq, Tq, D]``, 0 at padding, the statistics, and what ran.

    Raises:
        ValueError: a mask that does not fit.
    """
    if mask is None:
        return attend_counted(query, key, value, counted, **options)
    if mask.shape[0] != key.shape[0] or not query.shape[2] <= mask.shape[1] <= key.shape[2]:
        raise ValueError(f"mask {list(mask.shape)} does not fit q {list(query.shape)} and k {list(key.shape)}")
    mask = mask.to(key.device)
    key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    if bool(mask.all()):
        return attend_counted(query, key, value, counted, **options)
    # Tokens of a row are one run. KV blocks count from its first token, queries are aligned with its last.
    lengths, before = mask.sum(-1), mask.int().argmax(-1)
    after = mask.shape[1] - before - lengths
    options["kv_lengths"] = lengths.clamp(min=1)
    out, stats, served = attend_counted(
        _roll(query, -after), _roll(key, before), _roll(value, before), counted, **options
    )
    is_token = mask[:, -query.shape[2] :]
    return _roll(out, after).masked_fill(~is_token[:, None, :, None], 0), stats, served


def _roll(x: Tensor, shifts: Tensor) -> Tensor:
    """Roll the tokens of each row of ``[B, H, T, D]`` to the left by ``shifts`` ``[B]``."""
    index = (torch.arange(x.shape[2], device=x.device) + shifts[:, None]) % x.shape[2]  # [B, T]
    return x.gather(2, index[:, None, :, None].expand_as(x))
