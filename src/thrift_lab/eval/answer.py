"""What a model answers to a prompt: greedily, token by token, and how likely it finds the right answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thrift_attn.stats import Stats
from thrift_attn.transformers.versions import cache_keyword
from thrift_lab.eval.apply import applied, served
from thrift_lab.eval.eviction import evict
from thrift_lab.eval.methods import Method
from thrift_lab.eval.nll import logits_of, wait


@dataclass(frozen=True)
class Answer:
    """What one method gave on one prompt.

    Args:
        tokens: the greedy continuation, up to and without the end-of-text token.
        gold_nll: nats per token of the right answer, given the prompt.
        seconds: of everything.
        stats: what was promoted; None for the model's own attention.
        unserved: layers that the method left to the model's own attention, and why.
    """

    tokens: list[int]
    gold_nll: float
    seconds: float
    stats: Stats | None
    unserved: tuple[str, ...]


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the model's generation settings and its tokenizer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return {token for token in found if token is not None}


def answer(model: Any, method: Method, prompt: list[int], gold: list[int], max_new: int, stops: set[int]) -> Answer:
    """Read the prompt once, score the right answer from there, go back, and continue greedily.

    The right answer is read in one piece: up to 16 tokens of it are decode for thrift attention, more are prefill rows.

    Args:
        model: a causal language model in eval mode.
        method: what its attention computes, in the prompt and in the answer.
        prompt: token ids.
        gold: token ids of the right answer, at least one.
        max_new: most tokens of the continuation.
        stops: tokens that end it.

    Raises:
        ValueError: an empty prompt or answer, or logits that are not finite.
        NotImplementedError: the method serves none of the model's layers.
    """
    if not prompt or not gold:
        raise ValueError(f"prompt and right answer must have tokens, got {len(prompt)} and {len(gold)}")
    from transformers import DynamicCache

    cache: Any = DynamicCache()  # plain layers, sliding ones too, so that tokens can be taken back
    if method.cached and method.config is not None:
        from thrift_attn.transformers import ThriftCache

        cache = ThriftCache(model.config, max_tokens=len(prompt) + max(max_new, len(gold)) + 1, decode=method.config)
    with torch.inference_mode(), applied(model, method):
        ids = torch.tensor([prompt], device=model.device)
        wait(ids)
        start = time.perf_counter()
        first = _next(model, ids, 0, cache)[-1:]
        if method.evict is not None:
            evict(model, cache, method.evict.keep)
        given = torch.tensor([gold], device=model.device)
        after = first
        if len(gold) > 1:
            after = torch.cat([first, _next(model, given[:, :-1], len(prompt), cache)])
            cache.crop(-(len(gold) - 1))
        nll = float(F.cross_entropy(after, given[0]))
        if not nll < float("inf"):
            raise ValueError(f"method {method.name!r} gave logits that are not finite")
        tokens = _greedy(model, first, len(prompt), cache, max_new, stops)
        seconds = time.perf_counter() - start
        stats, unserved = served(model, method)
    return Answer(tokens, nll, seconds, stats, unserved)


def _greedy(model: Any, logits: Tensor, position: int, cache: Any, max_new: int, stops: set[int]) -> list[int]:
    """Continue after ``logits`` ``[1, V]`` at ``position``."""
    tokens: list[int] = []
    while len(tokens) < max_new:
        token = int(logits.argmax())
        if token in stops:
            break
        tokens.append(token)
        if len(tokens) < max_new:
            logits = _next(model, torch.tensor([[token]], device=model.device), position + len(tokens) - 1, cache)
    return tokens


def _next(model: Any, ids: Tensor, position: int, cache: Any) -> Tensor:
    """Float32 logits ``[T, V]`` after each new token ``[1, T]``; only those of the last one for a prompt."""
    positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
    options: dict[str, Any] = {cache_keyword(model.base_model): cache, "use_cache": True}
    states = model.base_model(input_ids=ids, position_ids=positions, **options).last_hidden_state[0]
    return logits_of(model, states[-1:] if position == 0 else states)
