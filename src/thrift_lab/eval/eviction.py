"""SnapKV: after the prompt, each KV head keeps the tokens that the last queries looked at, and forgets the rest.

Source: SnapKV, arXiv 2404.14469, section 4 and listing 1: the last 32 tokens vote with their attention, votes are summed,
smoothed by a maximum over 7 neighbours, and the best tokens are kept with the last 32. Query heads of one KV head vote
together, since they share its cache. kvpress' SnapKVPress requires transformers < 5.3 and runs in an environment of its own
(benchmarks/kvpress_snapkv.py); what it keeps is a record, and a test compares this twin with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from thrift_lab.eval.watch import watched

WINDOW = 32
KERNEL = 7

_LAST = "_thrift_eval_last_queries"


@dataclass(frozen=True)
class Eviction:
    """Keep this share of the prompt's KV cache.

    Raises:
        ValueError: a share outside (0, 1].
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep must be in (0, 1], got {self.keep!r}")


def votes(
    queries: Tensor, keys: Tensor, scale: float, kernel: int = KERNEL, pool: Literal["max", "mean"] = "max"
) -> Tensor:
    """Return the attention of the last queries to the tokens before them, smoothed over neighbours.

    Args:
        queries: the last W queries ``[Hq, W, D]``.
        keys: ``[Hkv, T, D]``, T > W.
        scale: factor of the logits.
        kernel: neighbours that are smoothed over, the token itself included.
        pool: how; SnapKV's published runs take the maximum, kvpress the mean.

    Returns:
        float32 ``[Hkv, T - W]``.
    """
    window, tokens = queries.shape[1], keys.shape[1]
    grouped = queries.unflatten(0, (len(keys), -1)).float()  # [Hkv, G, W, D]
    logits = torch.einsum("hgwd,htd->hgwt", grouped, keys.float()) * scale
    row = torch.arange(tokens - window, tokens, device=keys.device)
    logits = logits.masked_fill(torch.arange(tokens, device=keys.device) > row[:, None], -torch.inf)
    mass = logits.softmax(-1)[..., : tokens - window].sum((1, 2))
    pooled = torch.nn.functional.max_pool1d if pool == "max" else torch.nn.functional.avg_pool1d
    return pooled(mass, kernel, stride=1, padding=kernel // 2)


def kept_tokens(queries: Tensor, keys: Tensor, scale: float, keep: float, **options: Any) -> Tensor:
    """Return indices of the tokens that stay, ascending: int64 ``[Hkv, K]``; arguments and options as in `votes`."""
    tokens = keys.shape[1]
    capacity = max(WINDOW + 1, round(keep * tokens))
    every = torch.arange(tokens, device=keys.device).expand(len(keys), -1)
    if capacity >= tokens:
        return every
    best = votes(queries, keys, scale, **options).topk(capacity - queries.shape[1], dim=-1).indices.sort(-1).values
    return torch.cat([best, every[:, tokens - queries.shape[1] :]], -1)


@contextmanager
def watching(model: Any) -> Iterator[None]:
    """The model with its own attention (SDPA), which remembers the last queries of every call for `evict`."""

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
        setattr(module, _LAST, (query[:, :, -WINDOW:], scale))

    try:
        with watched(model, look):
            yield
    finally:
        for module in model.modules():
            vars(module).pop(_LAST, None)


def evict(model: Any, cache: Any, keep: float) -> None:
    """Shorten every layer of a cache that has just taken in a prompt under `watching`.

    Args:
        model: the watched model.
        cache: a ``DynamicCache`` of one sequence.
        keep: share of the tokens that stays.

    Raises:
        NotImplementedError: a layer that did not call the attention under watch.
    """
    watched = {module.layer_idx: vars(module)[_LAST] for module in model.modules() if _LAST in vars(module)}
    for index, layer in enumerate(cache.layers):
        if index not in watched:
            raise NotImplementedError(f"layer {index} of {type(model).__name__} has no attention that can be watched")
        queries, scale = watched[index]
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        stay = kept_tokens(queries[0], layer.keys[0], scale, keep)
        for name in ("keys", "values"):
            plane = getattr(layer, name)
            setattr(layer, name, plane.gather(2, stay[None, :, :, None].expand(-1, -1, -1, plane.shape[-1])))
