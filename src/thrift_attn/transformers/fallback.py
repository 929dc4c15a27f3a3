"""Attention of the layers that thrift does not serve: by SDPA, or by a plain softmax where SDPA lacks something."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_EAGER_QUERIES = 512  # queries at a time where SDPA cannot compute a layer


def attend_exactly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Literal["sdpa", "eager"], str]:
    """Attention of one layer without thrift.

    Args:
        module: the attention layer.
        query: ``[B, Hq, Tq, D]``.
        key: ``[B, Hkv, Tk, D]``.
        value: ``[B, Hkv, Tk, Dv]``.
        mask: as `thrift_attn.transformers.masks.thrift_mask` gives it, or a 4D mask.
        causal: whether a query sees no later keys.
        scaling: factor of the logits; 1/sqrt(D) by default.
        dropout: probability.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: ``[Hq]``, logits of attention sinks.

    Returns:
        The output ``[B, Tq, Hq, Dv]``, by what it was computed, and what SDPA lacks ("" if nothing).
    """
    lacks = " and ".join(["softcap"] * (softcap is not None) + ["sinks"] * (sinks is not None))
    if mask is not None and mask.ndim == 2:
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    implied = mask is None and not lacks and query.shape[2] in (1, key.shape[2])  # SDPA's is_causal is enough
    if causal and not implied and (mask is None or mask.ndim == 2):
        mask = _causal_mask(query, key, mask)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    if not lacks:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal
        )
        return out, "sdpa", ""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _softmax_attention(query, key, value, mask, scale, softcap, sinks, dropout)
    return out.transpose(1, 2).contiguous(), "eager", lacks


def _causal_mask(query: Tensor, key: Tensor, tokens: Tensor | None) -> Tensor:
    """Bool ``[B or 1, 1, Tq, Tk]`` for queries that end with the keys; ``tokens`` ``[B, Tk]`` is False at padding."""
    slots = torch.arange(key.shape[2], device=key.device)
    mask = (slots <= slots[-query.shape[2] :, None])[None, None]
    return mask if tokens is None else mask & tokens.to(key.device)[:, None, None]


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention as it is defined, ``[B, Hq, Tq, Dv]``, for what SDPA lacks; some queries at a time to save memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outs: list[Tensor] = []
    for start in range(0, query.shape[2], _EAGER_QUERIES):
        rows = slice(start, start + _EAGER_QUERIES)
        logits = (query[:, :, rows] @ key.mT).float() * scale
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        if mask is not None:
            part = mask[..., rows, :]
            if part.dtype == torch.bool:
                part = torch.where(part, 0.0, torch.finfo(logits.dtype).min)
            logits = logits + part
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        p = torch.nn.functional.dropout(logits.softmax(-1)[..., : key.shape[2]], dropout)
        outs.append(p.to(value.dtype) @ value)
    return torch.cat(outs, 2)
