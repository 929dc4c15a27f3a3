"""Calls of a cache that must be refused and must change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thrift_attn.cache import PagedThriftCache, state
from thrift_lab.fuzz.settings import Setting

Refusal = Callable[[PagedThriftCache, Setting, int], Any]
"""Called with a cache, its setting and a sequence."""


def _append(change: Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]], lengths: Any = None) -> Refusal:
    """Append 3 tokens to every sequence after a change of K and V."""

    def call(cache: PagedThriftCache, setting: Setting, seq: int) -> None:
        k, v = change(*setting.tokens(cache.batch, 3, 1, "plain"))
        cache.append(k, v, lengths=None if lengths is None else [lengths] * cache.batch)

    return call


def _attend(change: Callable[[torch.Tensor], Any], **options: Any) -> Refusal:
    """Attend with one query after a change of it."""
    return lambda cache, setting, seq: cache.attend(change(setting.queries(cache.batch, 1, 1)), **options)


def _damaged(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Refusal:
    """Fill a cache with a state of which one tensor was changed."""

    def call(cache: PagedThriftCache, setting: Setting, seq: int) -> None:
        saved = state.state_dict(cache)
        other = setting.make(cache.batch, 1 + int(saved["tokens"].sum()))
        try:
            state.load_state_dict(other, saved | {name: change(saved[name].clone())})
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
    "append with too many lengths": lambda cache, setting, seq: cache.append(
        *setting.tokens(cache.batch, 3, 1, "plain"), lengths=[1] * (cache.batch + 1)
    ),
    "append with queries of other tokens": lambda cache, setting, seq: cache.append(
        *setting.tokens(cache.batch, 3, 1, "plain"), queries=setting.queries(cache.batch, 2, 1)
    ),
    "append with queries of another dtype": lambda cache, setting, seq: cache.append(
        *setting.tokens(cache.batch, 3, 1, "plain"), queries=setting.queries(cache.batch, 3, 1).double()
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
    "free of a sequence that is not there": lambda cache, setting, seq: cache.free(cache.batch),
    "free of a sequence below 0": lambda cache, setting, seq: cache.free(-1),
    "free of half a sequence": lambda cache, setting, seq: cache.free(0.5),  # pyright: ignore[reportArgumentType]
    "fork onto itself": lambda cache, setting, seq: cache.fork(seq, seq),
    "fork to a sequence that is not there": lambda cache, setting, seq: cache.fork(seq, cache.batch),
    "truncate to more": lambda cache, setting, seq: cache.truncate(seq, cache.tokens(seq) + 1),
    "truncate to fewer than none": lambda cache, setting, seq: cache.truncate(seq, -1),
    "truncate to half a token": lambda cache, setting, seq: cache.truncate(seq, cache.tokens(seq) / 2 - 0.25),  # pyright: ignore[reportArgumentType]
    "select of no sequence": lambda cache, setting, seq: cache.select([]),
    "select of a sequence that is not there": lambda cache, setting, seq: cache.select([seq, cache.batch]),
    "select of half a sequence": lambda cache, setting, seq: cache.select([0.5]),  # pyright: ignore[reportArgumentType]
    "read of a sequence that is not there": lambda cache, setting, seq: cache.read(cache.batch),
    "reserve of fewer than none": lambda cache, setting, seq: cache.reserve(-1),
    "reserve of half a token": lambda cache, setting, seq: cache.reserve(0.5),  # pyright: ignore[reportArgumentType]
    "reserve for other sequences": lambda cache, setting, seq: cache.reserve([1] * (cache.batch + 1)),
    "advance by fewer than none": lambda cache, setting, seq: cache.advance(-1),
    "advance by half a token": lambda cache, setting, seq: cache.advance(0.5),  # pyright: ignore[reportArgumentType]
    "advance by more than a block": lambda cache, setting, seq: cache.advance(65),
    "a file of more tokens": _damaged("tokens", lambda x: x + 64),
    "a file of fewer than no tokens": _damaged("tokens", lambda x: x - 10**6),
    "a file of other tail blocks": _damaged("tail_blocks", lambda x: x + 1),
    "a file of other heads": _damaged("tail", lambda x: x[:, :, :, :0]),
    "a file without pages": _damaged("base", lambda x: x[:, :0]),
    "a file of whole numbers": _damaged("sink_value", lambda x: x.int()),
}
"""By name: calls that raise ValueError, TypeError or NotImplementedError."""
