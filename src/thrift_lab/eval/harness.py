"""lm-evaluation-harness with a method inside the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thrift_lab.eval.apply import applied, served
from thrift_lab.eval.methods import Method
from thrift_lab.extras import need
from thrift_lab.models import Loaded


def evaluate(loaded: Loaded, method: Method, tasks: Sequence[str], *, limit: int | None = None, **options: Any) -> Any:
    """Run tasks of the harness.

    The model is the harness' own ``HFLM`` around the loaded model, so that its requests, batching and scores are untouched;
    batches of one, since padding does not belong to the measurement.

    Args:
        loaded: model and tokenizer.
        method: what attention computes.
        tasks: names that the harness knows.
        limit: samples of each task.
        **options: passed on to ``lm_eval.simple_evaluate``.

    Returns:
        The harness' ``results``, and under ``share`` the share of blocks that was promoted.

    Raises:
        MissingExtra: lm_eval is not installed.
        NotImplementedError: a method that changes the cache between prompt and answer, which the harness does not separate.
    """
    harness = need("lm_eval", "harness")
    wrapper = need("lm_eval.models.huggingface", "harness")
    if method.evict is not None or method.cached:
        raise NotImplementedError(
            f"method {method.name!r} needs prompt and answer apart; the harness does not tell them"
        )
    with applied(loaded.model, method):
        wrapped = wrapper.HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
        found = harness.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, **options)
        stats, unserved = served(loaded.model, method)
    return {"results": found["results"], "share": None if stats is None else stats.share, "unserved": list(unserved)}
