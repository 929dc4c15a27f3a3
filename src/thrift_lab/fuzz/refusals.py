"""Calls of a cache that must be refused and must change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thrift_attn.cache import PagedThriftCache, state
from thrift_lab.fuzz.settings import Setting

Refusal = Callable[[PagedThriftCache, Setting, int], Any]
"""Called with a cache, its setting and a row."""


def _append(change: Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]], lengths: Any = None) -> Refusal:
    """Append 3 tokens to every sequence after a change of K and V."""

    def call(cache: PagedThriftCache, setting: Setting, row: int) -> None:
        k, v = change(*setting.tokens(cache.batch, 3, 1, "plain"))
        cache.append(k, v, lengths=None if lengths is None else [lengths] * cache.batch)

    return call


def _attend(change: Callable[[torch.Tensor], Any], **options: Any) -> Refusal:
    """Attend with one query after a change of it."""
    return lambda cache, setting, row: cache.attend(change(setting.queries(cache.batch, 1, 1)), **options)


def _damaged(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Refusal:
    """Restore a dump of which one tensor was changed."""

    def call(cache: PagedThriftCache, setting: Setting, row: int) -> None:
        saved = state.dump(cache)
        other = setting.make(cache.batch, 1 + int(saved["tokens"].sum()))
        try:
            state.restore(other, saved | {name: change(saved[name].clone())})
        finally:
            assert not any(other.tokens(at) for at in range(other.batch)), "a refused file has changed the cache"

    return call


def _as_given(first: Any, *rest: Any) -> Any:
    return (first, *rest) if rest else first


REFUSALS: dict[str, Refusal] = {
    "append of K without heads": _append(lambda k, v: (k[:, 0], v[:, 0])),
    "append of other heads": _append(lambda k, v: (k[:, :0], v[:, :0])),
    "append of another head dim": _append(lambda k, v: (k[..., :-1], v[..., :-1])),
    "append of another batch": _append(lambda k, v: (torch.cat([k, k]), torch.cat([v, v]))),
    "append of K and V that differ": _append(lambda k, v: (k, v[:, :, :2])),
    "append of another dtype": _append(lambda k, v: (k.double(), v.double())),
    "append of V of another dtype": _append(lambda k, v: (k, v.double())),
    "append of whole numbers": _append(lambda k, v: (k.int(), v.int())),
    "append with gradients": _append(lambda k, v: (k.clone().requires_grad_(), v)),
    "append of no tensor": _append(lambda k, v: (k.tolist(), v)),
    "append of tokens that are not there": _append(_as_given, 4),
    "append of fewer than none": _append(_as_given, -1),
    "append of one and a half tokens": _append(_as_given, 1.5),
    "append of a NaN of tokens": _append(_as_given, float("nan")),
    "append with too many lengths": lambda cache, setting, row: cache.append(
        *setting.tokens(cache.batch, 3, 1, "plain"), lengths=[1] * (cache.batch + 1)
    ),
    "attention of 17 tokens": _attend(lambda q: q.expand(-1, -1, 17, -1)),
    "attention of no token": _attend(lambda q: q[:, :, :0]),
    "attention of another batch": _attend(lambda q: torch.cat([q, q])),
    "attention of another dtype": _attend(lambda q: q.double()),
    "attention of another head dim": _attend(lambda q: q[..., :-1]),
    "attention with a window of 0": _attend(_as_given, window=0),
    "attention with a window of 1.5": _attend(_as_given, window=1.5),
    "attention with an infinite scale": _attend(_as_given, scale=float("inf")),
    "attention with a softcap below 0": _attend(_as_given, softcap=-1.0),
    "free of a row that is not there": lambda cache, setting, row: cache.free(cache.batch),
    "free of a row below 0": lambda cache, setting, row: cache.free(-1),
    "free of half a row": lambda cache, setting, row: cache.free(0.5),  # pyright: ignore[reportArgumentType]
    "fork onto itself": lambda cache, setting, row: cache.fork(row, row),
    "fork to a row that is not there": lambda cache, setting, row: cache.fork(row, cache.batch),
    "truncate to more": lambda cache, setting, row: cache.truncate(row, cache.tokens(row) + 1),
    "truncate to fewer than none": lambda cache, setting, row: cache.truncate(row, -1),
    "truncate to half a token": lambda cache, setting, row: cache.truncate(row, cache.tokens(row) / 2 - 0.25),  # pyright: ignore[reportArgumentType]
    "select of no row": lambda cache, setting, row: cache.select([]),
    "select of a row that is not there": lambda cache, setting, row: cache.select([row, cache.batch]),
    "select of half a row": lambda cache, setting, row: cache.select([0.5]),  # pyright: ignore[reportArgumentType]
    "read of a row that is not there": lambda cache, setting, row: cache.read(cache.batch),
    "reserve of fewer than none": lambda cache, setting, row: cache.reserve(-1),
    "reserve of half a token": lambda cache, setting, row: cache.reserve(0.5),  # pyright: ignore[reportArgumentType]
    "reserve for other rows": lambda cache, setting, row: cache.reserve([1] * (cache.batch + 1)),
    "advance by fewer than none": lambda cache, setting, row: cache.advance(-1),
    "advance by half a token": lambda cache, setting, row: cache.advance(0.5),  # pyright: ignore[reportArgumentType]
    "advance by more than a block": lambda cache, setting, row: cache.advance(65),
    "a file of more tokens": _damaged("tokens", lambda x: x + 64),
    "a file of fewer than no tokens": _damaged("tokens", lambda x: x - 10**6),
    "a file of other slots": _damaged("slots", lambda x: x + 1),
    "a file of other heads": _damaged("tail", lambda x: x[:, :, :, :0]),
    "a file without pages": _damaged("base", lambda x: x[:, :0]),
    "a file of whole numbers": _damaged("sink_value", lambda x: x.int()),
}
"""By name: calls that raise ValueError, TypeError or NotImplementedError."""
