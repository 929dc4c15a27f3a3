"""A method inside a model, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from thrift_attn.stats import Stats
from thrift_lab.eval.eviction import watching
from thrift_lab.eval.methods import Method
from thrift_lab.eval.rivals.inside_model import attending

_TALLY = "_thrift_eval_tally"
"""Attribute of a model that has a rival inside."""


@contextmanager
def applied(model: Any, method: Method) -> Iterator[None]:
    """The model with a method's attention inside the block, its own outside."""
    if method.evict is not None:
        with watching(model):
            yield
        return
    if method.rival is not None:
        with attending(model, method.rival) as tally:
            vars(model)[_TALLY] = tally
            try:
                yield
            finally:
                del vars(model)[_TALLY]
        return
    if method.config is None:
        yield
        return
    from thrift_attn import transformers as integration

    if method.cached:
        integration.enable(model, stats=True)  # the cache says what is computed
    else:
        integration.enable(model, method.config, stats=True)
    try:
        yield
    finally:
        integration.disable(model)


def served(model: Any, method: Method) -> tuple[Stats | None, tuple[str, ...]]:
    """What was promoted since the block began, and one line for every layer that was left to the model's own attention.

    Raises:
        NotImplementedError: the method served no layer at all.
    """
    if method.rival is not None:
        tally = vars(model)[_TALLY]
        if not tally.calls:
            raise NotImplementedError(
                f"method {method.name!r} serves no layer of {type(model).__name__}: none was called"
            )
        return tally.stats, ()
    if method.config is None:
        return None, ()
    from thrift_attn.transformers import report

    rows = report(model)
    if not any(row.served_by == "thrift" for row in rows):
        reasons = ", ".join(sorted({row.reason for row in rows})) or "no attention layer found"
        raise NotImplementedError(f"method {method.name!r} serves no layer of {type(model).__name__}: {reasons}")
    left = [row for row in rows if row.served_by not in ("thrift", None)]
    return rows.stats, tuple(f"layer {row.layer}: {row.served_by}, {row.reason}" for row in left)
