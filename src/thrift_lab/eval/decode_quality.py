"""``thrift eval decode``: a model that decodes through the cache against itself in 16 bits, on real text.

Two measurements. Teacher-forced: after a prompt, the next tokens of the text are fed one by one, and the distribution of every
step is compared with that of the plain model. Needles: a number hidden at some depth of a long text is asked for, and greedy
answers of both are compared.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from thrift_attn.config import ThriftConfig
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.transformers import ThriftCache, disable, enable
from thrift_attn.transformers.decode_graph import DecodeGraph
from thrift_attn.transformers.generate import prefill, stream
from thrift_lab.console import Log, silent
from thrift_lab.eval.nll import logits_of
from thrift_lab.models import Loaded
from thrift_lab.records import Record, make_context
from thrift_lab.sheet import Sheet

NEEDLE = " The secret number of the harbour is {number}. "
QUESTION = "\n\nThe secret number of the harbour is"
ANSWER = 12
"""Tokens of an answer."""


@dataclass(frozen=True)
class Continuation:
    """One text.

    Args:
        start: index of its first token in the tokens of the text.
        prompt: tokens of the prompt.
        kl: Kullback-Leibler divergence of the cached distribution from the plain one at every step, in nats.
        same_top: whether the likeliest token is the same at every step.
    """

    start: int
    prompt: int
    kl: list[float]
    same_top: list[bool]


@dataclass(frozen=True)
class Needle:
    """One hidden number.

    Args:
        depth: share of the text before it.
        prompt: tokens.
        number: what was hidden.
        plain: answer of the plain model.
        cached: answer through the cache.
    """

    depth: float
    prompt: int
    number: str
    plain: str
    cached: str

    @property
    def lost(self) -> bool:
        """Whether the plain model finds it and the cache does not."""
        return self.number in self.plain and self.number not in self.cached


class DecodeRecord(Record):
    """A run: divergences after prompts of a text, and hidden numbers."""

    kind: str = "decode-quality"
    continuations: list[Continuation] = Field(default_factory=list)
    needles: list[Needle] = Field(default_factory=list)

    @property
    def kl(self) -> float:
        """Mean divergence over all steps of all texts, in nats."""
        return _mean([x for text in self.continuations for x in text.kl])

    @property
    def same_top(self) -> float:
        """Share of steps with the same likeliest token."""
        return _mean([float(x) for text in self.continuations for x in text.same_top])

    @property
    def lost(self) -> int:
        """Needles that only the plain model finds."""
        return sum(needle.lost for needle in self.needles)

    @property
    def found_by_plain(self) -> int:
        """Needles that the plain model finds."""
        return sum(needle.number in needle.plain for needle in self.needles)

    def sentence(self) -> str:
        """The result in words."""
        return (
            f"{len(self.continuations)} texts: KL {self.kl:.4f} nats, same likeliest token {self.same_top:.1%}; "
            f"{len(self.needles)} needles: the plain model finds {self.found_by_plain}, of which the cache loses {self.lost}"
        )

    def table(self) -> Sheet:
        """See `Record.table`: texts, then needles."""
        rows: list[tuple[str, ...]] = []
        for one in self.continuations:
            same = f"{_mean([float(x) for x in one.same_top]):.1%}"
            rows.append((f"text from token {one.start:,}", f"{one.prompt:,}", f"{_mean(one.kl):.4f}", same, "", ""))
        for one in self.needles:
            found = ("yes" if one.number in said else "no" for said in (one.plain, one.cached))
            rows.append((f"needle at {one.depth:.0%}", f"{one.prompt:,}", "", "", *found))
        head = ("", "tokens", "KL", "same likeliest", "plain finds", "cache finds")
        return Sheet(head, rows, str(self.context.get("model", "")), self.sentence())

    def summary(self) -> dict[str, Any]:
        """Means and counts."""
        return {"kl": self.kl, "same_top": self.same_top, "found": self.found_by_plain, "lost": self.lost}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def lengths(prompts: int, shortest: int, longest: int) -> list[int]:
    """Lengths of prompts, evenly from the shortest to the longest.

    Raises:
        ValueError: no prompts, or lengths out of order.
    """
    if prompts < 1 or not 1 <= shortest <= longest:
        raise ValueError(f"expected prompts >= 1 and 1 <= shortest <= longest, got {prompts}, {shortest}, {longest}")
    step = (longest - shortest) / max(1, prompts - 1)
    return [round(shortest + i * step) for i in range(prompts)]


def depths(needles: int) -> list[float]:
    """Where needles are hidden, evenly from 0 to 1 and in an order that has nothing to do with the lengths of their prompts."""
    stride = next((n for n in range(round(0.618 * needles), 0, -1) if math.gcd(n, needles) == 1), 1)
    return [i * stride % needles / max(1, needles - 1) for i in range(needles)]


def _cache(model: Any, tokens: int, config: ThriftConfig) -> ThriftCache:
    """A cache whose prompts are attended as long ones are: none exactly, because it is short."""
    prefill = ThriftConfig(budget=config.budget, exact_below=0)
    return ThriftCache(model.config, tokens, decode=config, prefill=prefill)


@torch.no_grad()
def continuation(loaded: Loaded, ids: Tensor, start: int, new: int, config: ThriftConfig) -> Continuation:
    """Compare ``new`` teacher-forced steps after the prompt ``ids[:, :-new]``.

    Args:
        loaded: a model that does not use thrift.
        ids: int64 ``[1, S]``.
        start: where ``ids`` begin in their text.
        new: steps.
        config: of the cache.
    """
    model, prompt = loaded.model, ids.shape[1] - new
    hidden = model.base_model(ids).last_hidden_state[:, prompt - 1 : -1]
    want = logits_of(model, hidden)[0].log_softmax(-1)  # [new, V]
    enable(model, config)
    try:
        cache = _cache(model, ids.shape[1], config)
        got = [prefill(model, ids[:, :prompt], cache)]
        step = DecodeGraph(model, cache)
        got += [step(ids[:, at : at + 1]).clone() for at in range(prompt, ids.shape[1] - 1)]
    finally:
        disable(model)
    cached = torch.cat(got).float().log_softmax(-1)
    kl = (want.exp() * (want - cached)).sum(-1)
    return Continuation(start, prompt, kl.tolist(), (want.argmax(-1) == cached.argmax(-1)).tolist())


def hide(loaded: Loaded, text: str, tokens: int, depth: float, number: str) -> Tensor:
    """A prompt ``[1, about tokens]``: the text with a number hidden at a depth, and the question for it."""
    tokenizer = loaded.tokenizer
    needle, question = (
        tokenizer(x, add_special_tokens=False).input_ids for x in (NEEDLE.format(number=number), QUESTION)
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids[: tokens - len(needle) - len(question)]
    at = round(depth * len(ids))
    return torch.tensor([[*ids[:at], *needle, *ids[at:], *question]])


@torch.no_grad()
def needle(loaded: Loaded, ids: Tensor, depth: float, number: str, config: ThriftConfig) -> Needle:
    """Greedy answers to `hide`, of the plain model and through the cache."""
    model = loaded.model
    ids = ids.to(model.device)
    options = {"max_new_tokens": ANSWER, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    pad = model.generation_config.eos_token_id
    plain = model.generate(ids, pad_token_id=pad[0] if isinstance(pad, list) else pad, **options)[0, ids.shape[1] :]
    enable(model, config)
    try:
        cache = _cache(model, ids.shape[1] + ANSWER, config)
        cached = torch.cat(list(stream(model, ids, cache, max_new_tokens=ANSWER)))
    finally:
        disable(model)
    answers = (loaded.tokenizer.decode(x, skip_special_tokens=True) for x in (plain, cached))
    return Needle(depth, ids.shape[1], number, *answers)


def evaluate(
    loaded: Loaded,
    text: str,
    *,
    config: ThriftConfig,
    prompts: int = 10,
    shortest: int = 4096,
    longest: int = 8000,
    new: int = 64,
    needles: int = 10,
    seed: int = 0,
    text_name: str = "",
    log: Log = silent,
) -> DecodeRecord:
    """Both measurements.

    Args:
        loaded: model and tokenizer.
        text: long enough for all prompts one after the other.
        config: of the cache.
        prompts: texts.
        shortest: tokens of the shortest prompt.
        longest: of the longest.
        new: teacher-forced steps after each.
        needles: how many, at `depths`.
        seed: of the hidden numbers.
        text_name: for the record.
        log: called with a line of text about each text and needle.

    Raises:
        ValueError: a text that is too short, or sizes out of range.
    """
    sizes = lengths(prompts, shortest, longest)
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(loaded.model.device)
    if new < 1 or ids.shape[1] < sum(sizes) + prompts * new:
        raise ValueError(f"the text has {ids.shape[1]} tokens, {sum(sizes) + prompts * new} are needed")
    device = loaded.model.device
    record = DecodeRecord(
        context=make_context(
            ("torch", "triton", "transformers"),
            **loaded.described(),
            text=text_name,
            config=config.to_dict(),
            ignored=list(DecodeNumerics.resolve(config).ignored),
            prefill=_cache(loaded.model, longest, config).prefill_on(device).to_dict(),
            seed=seed,
        )
    )
    start = 0
    for size in sizes:
        record.continuations.append(continuation(loaded, ids[:, start : start + size + new], start, new, config))
        log(f"{size} tokens: KL {_mean(record.continuations[-1].kl):.4f}")
        start += size + new
    draw = random.Random(seed)
    places = zip(lengths(needles, shortest, longest), depths(needles), strict=True) if needles else ()
    for size, depth in places:
        number = str(draw.randrange(1000, 10000))
        answers = needle(loaded, hide(loaded, text, size, depth, number), depth, number, config)
        log(f"{number} at {depth:.0%} of {size} tokens: {answers.plain!r}, cached {answers.cached!r}")
        record.needles.append(answers)
    return record
