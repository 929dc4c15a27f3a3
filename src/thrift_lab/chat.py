"""What ``thrift generate`` does: answer a prompt through the cache, streaming, and say what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrift_attn.config import ThriftConfig
from thrift_attn.transformers import ThriftCache, enable
from thrift_attn.transformers.generate import stream
from thrift_lab.eval.models import Loaded


@dataclass
class Cost:
    """What a generation took.

    Args:
        prompt: tokens of the prompt.
        new: tokens generated.
        prefill_s: seconds until the first new token.
        decode_s: seconds for the others.
        kv_bytes: bytes of the cache for one token, all layers.
        plain_bytes: the same for K and V in the dtype of the model.
        promoted: share of the complete KV blocks that decode read in high precision.
    """

    prompt: int = 0
    new: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_bytes: float = 0.0
    plain_bytes: float = 0.0
    promoted: float = 0.0

    def lines(self) -> list[str]:
        """In words."""
        rate = (self.new - 1) / self.decode_s if self.decode_s else 0.0
        held = self.prompt + max(0, self.new - 1)
        return [
            f"{self.prompt} tokens of prompt, first token after {self.prefill_s:.2f} s",
            f"{self.new} new tokens, {rate:.1f} tokens/s",
            f"KV cache {self.kv_bytes * held / 2**20:.1f} MiB, {self.kv_bytes:,.0f} bytes a token, "
            f"{self.kv_bytes / self.plain_bytes:.0%} of {self.plain_bytes:,.0f} without thrift",
            f"{self.promoted:.1%} of the complete KV blocks read in high precision",
        ]


def prompt_ids(loaded: Loaded, prompt: str, *, raw: bool) -> Tensor:
    """Token ids ``[1, S]`` of a prompt, through the chat template if the tokenizer has one and ``raw`` is off.

    Raises:
        ValueError: an empty prompt.
    """
    tokenizer = loaded.tokenizer
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if not raw and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids


def sampler(temperature: float, top_p: float) -> Callable[[Tensor], Tensor]:
    """Logits ``[B, V]`` to tokens ``[B]``: the most likely at temperature 0, else drawn from the likeliest ``top_p``.

    Raises:
        ValueError: values out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")

    def pick(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        p, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        return order.gather(-1, torch.multinomial(p, 1))[:, 0]

    return pick


def answer(
    loaded: Loaded,
    ids: Tensor,
    cost: Cost,
    *,
    config: ThriftConfig,
    max_new_tokens: int,
    pick: Callable[[Tensor], Tensor],
    chunk: int | None = None,
) -> Iterator[str]:
    """Yield the answer piece by piece.

    Args:
        loaded: model and tokenizer; the model is switched to thrift.
        ids: ``[1, S]``.
        cost: filled in as it goes.
        config: of the cache.
        max_new_tokens: tokens at most; the answer also ends with the model's end token.
        pick: see `sampler`.
        chunk: tokens of the prompt at a time.

    Raises:
        ValueError: no tokens asked for.
        NotImplementedError: a model that the cache does not serve.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    model: Any = loaded.model
    ids = ids.to(model.device)
    cache = ThriftCache(model.config, ids.shape[1] + max_new_tokens, decode=config)
    enable(model, config)
    ends = _ends(model)
    made: list[int] = []
    shown = ""
    cost.prompt = ids.shape[1]
    began = time.perf_counter()
    for new in stream(model, ids, cache, max_new_tokens=max_new_tokens, pick=pick, chunk=chunk):
        token = int(new)
        if not made:
            cost.prefill_s = time.perf_counter() - began
        made.append(token)
        cost.new, cost.decode_s = len(made), time.perf_counter() - began - cost.prefill_s
        if token in ends:
            break
        text = loaded.tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of several tokens is not complete yet
            yield text[len(shown) :]
            shown = text
    layers = cache.paged_layers
    cost.kv_bytes = cache.bytes_per_token()
    cost.plain_bytes = sum(
        2 * layer.paged.kv_heads * layer.paged.head_dim * layer.paged.tail.element_size() for layer in layers
    )
    cost.promoted = layers[0].decode_stats(heads=1).share


def _ends(model: Any) -> set[int]:
    """Tokens that end an answer."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else set() if found is None else {found}
