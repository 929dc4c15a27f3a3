"""``thrift generate --demo``: a number hidden in a long text is asked for, with three ways to read the text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from thrift_attn.config import ThriftConfig, fraction
from thrift_attn.transformers import disable
from thrift_lab import chat
from thrift_lab.console import Log
from thrift_lab.eval.answer import answer, stop_tokens
from thrift_lab.eval.decode_quality import NEEDLE, QUESTION, hide
from thrift_lab.eval.methods import parse_method
from thrift_lab.eval.nll import chars_needed
from thrift_lab.models import Loaded

TOKENS, DEPTH, NUMBER, SHARE = 4096, 0.3, "4817", 0.05
"""Of the prompt; where in the text the number lies; the number; blocks that are read in high precision."""

_WORDS = 8
"""Tokens of an answer."""

PLAIN, DROPPED, THRIFT = "as it is", "dropped", "thrift"


@dataclass(frozen=True)
class Told:
    """What one way of reading gave.

    Args:
        way: `PLAIN`, `DROPPED` or `THRIFT`.
        said: the answer.
        found: whether the number is in it.
        seconds: of prompt and answer.
    """

    way: str
    said: str
    found: bool
    seconds: float


def ask(
    loaded: Loaded,
    text: str,
    show: Callable[[str], None],
    log: Log,
    *,
    tokens: int = TOKENS,
) -> list[Told]:
    """Hide the number and ask for it: of the model as it is, with all but 5% of the blocks dropped, and of thrift.

    Args:
        loaded: model and tokenizer.
        text: at least ``tokens`` long.
        show: called with each piece of what is said, as soon as it is known.
        log: called with a line before each way.
        tokens: of the prompt.

    Returns:
        One entry for each way.

    Raises:
        ValueError: a text that is too short.
    """
    ids = hide(loaded, text[: chars_needed(tokens, 1)], tokens, DEPTH, NUMBER)
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens with its question, {tokens} are needed")
    shown = f"{SHARE:.0%} of the blocks"
    log(
        f"Hidden {DEPTH:.0%} into {tokens:,} tokens: {NEEDLE.format(number=NUMBER).strip()!r} Asked: {QUESTION.strip()!r}"
    )
    told = []
    for way, words in (
        (PLAIN, "the model as it is, K and V in 16 bits"),
        (DROPPED, f"{shown} in 16 bits, all others dropped (Quest)"),
        (THRIFT, f"{shown} in high precision, all others in 4 bits (thrift)"),
    ):
        log(f"{words}:")
        began, pieces = time.perf_counter(), []

        def piece(text: str, pieces: list[str] = pieces) -> None:
            pieces.append(text)
            show(text)

        if way == THRIFT:
            config = ThriftConfig.for_cache(budget=fraction(SHARE))
            chat.answer(loaded, ids, piece, config=config, max_new_tokens=_WORDS, **chat.sampling(0.0, 1.0))
            disable(loaded.model)
        else:
            method = parse_method("fp16" if way == PLAIN else f"quest:budget={SHARE}")
            gold = loaded.tokenizer(f" {NUMBER}", add_special_tokens=False).input_ids
            stops = stop_tokens(loaded.model, loaded.tokenizer)
            found = answer(loaded.model, method, ids[0].tolist(), gold, _WORDS, stops)
            piece(loaded.tokenizer.decode(found.tokens, skip_special_tokens=True))
        said = "".join(pieces)
        told.append(Told(way, said, NUMBER in said, time.perf_counter() - began))
        show("\n")
        log(f"  {'found' if told[-1].found else 'missed'}, {told[-1].seconds:.0f} s")
    return told
