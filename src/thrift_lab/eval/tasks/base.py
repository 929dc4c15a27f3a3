"""What a task is: samples that a model completes, and a score of the completion."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One question.

    Args:
        prompt: what the model reads.
        prefix: how its answer begins; given to it.
        references: right answers: all of them wanted, or any, as the task's score says.
        max_new: most tokens of an answer.
        extra: what the score needs besides.
    """

    prompt: str
    prefix: str
    references: tuple[str, ...]
    max_new: int
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def gold(self) -> str:
        """The continuation whose likelihood is measured: the references one after the other, or the first if any will do."""
        separator = self.extra.get("join")
        answer = separator.join(self.references) if separator else self.references[0]
        glue = "" if self.prefix.endswith((" ", "\n")) or (not self.prefix and self.prompt.endswith("\n")) else " "
        return glue + answer


@dataclass(frozen=True)
class Encoder:
    """From a sample to token ids.

    Args:
        tokenizer: of the model.
        chat: wrap the prompt in the tokenizer's chat template; the prefix then begins the assistant's turn.
    """

    tokenizer: Any
    chat: bool = False

    def ids(self, sample: Sample) -> list[int]:
        """Token ids of prompt and prefix, special tokens included."""
        if not self.chat:
            return self.tokenizer(sample.prompt + sample.prefix, verbose=False)["input_ids"]
        turns = [{"role": "user", "content": sample.prompt}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text + sample.prefix.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]

    def gold_ids(self, sample: Sample) -> list[int]:
        """Token ids of the continuation whose likelihood is measured."""
        return self.tokenizer(sample.gold, add_special_tokens=False, verbose=False)["input_ids"]

    def size(self, sample: Sample) -> int:
        """Tokens of the sample with the longest answer."""
        return len(self.ids(sample)) + sample.max_new


class Task(Protocol):
    """Samples and their score. A sample depends on nothing but the arguments, so that a run can go on where it stopped."""

    @property
    def name(self) -> str:
        """Unique, ``family_task``."""
        ...

    @property
    def family(self) -> str:
        """The benchmark it belongs to."""
        ...

    @property
    def metric(self) -> str:
        """Name of the score."""
        ...

    def sample(self, index: int, length: int, encoder: Encoder) -> Sample:
        """Sample ``index`` in at most ``length`` tokens, the answer included.

        Raises:
            ValueError: too short a length, or no such sample.
        """
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """Score of a completion in [0, 1]."""
        ...


def dice(*seed: object) -> random.Random:
    """Random numbers that depend on these values only."""
    return random.Random("/".join(map(str, seed)))


def fit(
    build: Callable[[int], Sample], length: int, encoder: Encoder, *, least: int, what: str, most: int | None = None
) -> Sample:
    """The largest sample that fits.

    Args:
        build: makes a sample of a given size; always the same one.
        length: most tokens, the answer included.
        encoder: counts them.
        least: smallest size.
        what: name of the task, for the error.
        most: largest size that there is; None for no limit.

    Raises:
        ValueError: even the smallest does not fit, or the largest leaves room.
    """
    low, low_size = least, encoder.size(build(least))
    if low_size > length:
        raise ValueError(f"{what} needs at least {low_size} tokens with its answer, got a length of {length}")
    end = math.inf if most is None else most + 1  # taken for too large
    high, high_size = min(2 * least, end), math.inf
    while high < end and (high_size := encoder.size(build(int(high)))) <= length:
        slope = max((high_size - low_size) / (high - low), 1e-3)
        low, low_size = int(high), high_size
        # Sizes of small samples can stand still for a few units, so no step is longer than the sample itself.
        high = min(low + min(low + 64, max(1, int(1.02 * (length - low_size) / slope) + 1)), end)
        high_size = math.inf
    halve = False
    while high - low > 1:  # sizes grow nearly evenly: aim at the length, and halve every other time
        middle = (low + int(high)) // 2
        if not halve and high_size < math.inf:
            share = (length - low_size) / (high_size - low_size)
            middle = min(int(high) - 1, max(low + 1, low + int(share * (high - low))))
        halve = not halve
        size = encoder.size(build(middle))
        if size <= length:
            low, low_size = middle, size
        else:
            high, high_size = middle, size
    if low == most:
        raise ValueError(
            f"{what} has too little material for a length of {length}: it ends at {encoder.size(build(low))}"
        )
    return build(low)


def shorten(sample: Sample, length: int, encoder: Encoder, make: Callable[[str], Sample], text: str) -> Sample:
    """A sample in at most ``length`` tokens, its text cut in the middle: instructions and question stay whole.

    Raises:
        ValueError: it does not fit without any text.
    """
    if encoder.size(sample) <= length:
        return sample
    if encoder.size(make("")) > length:
        raise ValueError(f"the question alone has more than {length} tokens")
    low, high = 0, len(text)  # characters that are kept
    while high - low > 1:
        middle = (low + high) // 2
        cut = text[: middle // 2] + text[len(text) - middle // 2 :]
        low, high = (middle, high) if encoder.size(make(cut)) <= length else (low, middle)
    return make(text[: low // 2] + text[len(text) - low // 2 :])


def sentences(text: str) -> list[str]:
    """Sentences of a text whose spaces are single: cut after ``.``, ``!`` or ``?``, with closing quotes, before a space."""
    return re.split(r"(?<=[.!?])(?<!\b[A-Z]\.) |(?<=[.!?][\"')]) ", text)
