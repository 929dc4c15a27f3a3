"""Whether an engine over pages of thrift answers as vLLM's own attention does: a speed counts only where it does.

With every block promoted both compute the same but for rounding to 16 bits and residuals; a budget of 0 is far outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NOISE = {"float16": 0.13, "bfloat16": 0.16}
"""Largest difference of logprobs of the tiny model by dtype: twice what vLLM's CPU engine showed; at budget 0 it is 0.5."""

PROMPTS = (5, 97, 260, 700, 300)
"""Tokens of prompts: within a block, behind a complete one, in several parts, and several sequences that decode at once."""

TOKENS = 40
"""New tokens of each."""

LEAST = 0.25
"""Share of all tokens that must lie before two texts part, which they may where logits are tied."""


class Answer(NamedTuple):
    """What one request got: its tokens, and the largest logprobs of each step by token."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Difference(NamedTuple):
    """How far answers are apart.

    Args:
        worst: largest difference of a logprob that both tell, in nats.
        compared: tokens before texts part.
        total: tokens.
        problem: what is wrong, or nothing.
    """

    worst: float
    compared: int
    total: int
    problem: str


def gate_prompts(vocabulary: int, seed: int = 1) -> list[list[int]]:
    """Random token ids of `PROMPTS`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocabulary, tokens).tolist() for tokens in PROMPTS]


def difference(found: Sequence[Answer], wanted: Sequence[Answer], noise: float, least: float = LEAST) -> Difference:
    """Compare tokens as long as logits are not tied within ``noise``, and logprobs up to it.

    Behind a tie both go on with texts of their own, and nothing more is to be compared.

    Args:
        found: answers.
        wanted: what others answered to the same prompts.
        noise: in nats.
        least: share of all tokens that must come before.
    """
    compared, worst, problem = 0, 0.0, ""
    total = sum(len(one.tokens) for one in wanted)
    for number, (got, want) in enumerate(zip(found, wanted, strict=True)):
        for step, (seen, there) in enumerate(zip(got.logprobs, want.logprobs, strict=True)):
            apart = max((abs(seen[token] - there[token]) for token in seen.keys() & there.keys()), default=float("inf"))
            worst, compared = max(worst, apart), compared + 1
            if not apart <= noise and not problem:
                problem = f"request {number}, token {step}: logprobs differ by {apart:.3g} nats, {noise} are allowed"
            if got.tokens[step] != want.tokens[step]:
                best, second, *_ = sorted(there.values(), reverse=True)
                if not best - second <= 2 * noise and not problem:
                    problem = (
                        f"request {number}, token {step}: another token, and not tied: {best - second:.3g} nats apart"
                    )
                break
    if compared < least * total and not problem:
        problem = f"only {compared} of {total} tokens could be compared"
    return Difference(worst, compared, total, problem)
