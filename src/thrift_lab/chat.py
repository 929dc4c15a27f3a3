"""What ``thrift generate`` does: answer a prompt through the cache, streaming, and say what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrift_attn.config import ThriftConfig
from thrift_attn.transformers import ThriftCache, enable
from thrift_attn.transformers.generate import generate
from thrift_attn.transformers.versions import cache_keyword
from thrift_lab.models import Loaded
from transformers import TextStreamer


@dataclass
class Cost:
    """What an answer took.

    Args:
        prompt: tokens of the prompt.
        new: tokens generated.
        prefill_s: seconds until the first new token.
        decode_s: seconds for the others.
        kv_bytes: bytes of the cache for one token, all layers.
        plain_bytes: the same for K and V in the dtype of the model.
        dtype: of the model.
        promoted: share of the complete KV blocks that decode read in high precision.
    """

    prompt: int = 0
    new: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_bytes: float = 0.0
    plain_bytes: float = 0.0
    dtype: str = ""
    promoted: float = 0.0

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        rate = (self.new - 1) / self.decode_s if self.decode_s else 0.0
        held = self.prompt + max(0, self.new - 1)
        return [
            f"{self.prompt} tokens of prompt, first token after {self.prefill_s:.2f} s",
            f"{self.new} new tokens, {rate:.1f} tokens/s",
            f"KV cache {self.kv_bytes * held / 2**20:.1f} MiB, {self.kv_bytes:,.0f} bytes a token, "
            f"{self.kv_bytes / self.plain_bytes:.0%} of {self.plain_bytes:,.0f} in {self.dtype}",
            f"{self.promoted:.1%} of the complete KV blocks read in high precision",
        ]


def prompt_ids(loaded: Loaded, prompt: str, *, raw: bool) -> Tensor:
    """Return token ids ``[1, S]`` of a prompt, through the chat template if the tokenizer has one and ``raw`` is off.

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


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Return the options of ``model.generate`` that draw tokens: greedy at temperature 0.

    Raises:
        ValueError: values out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


class _Streamer(TextStreamer):
    """Hands on finished pieces of text, and notes when tokens come."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None], cost: Cost):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.cost, self.began = show, cost, time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each new token."""
        if not self.next_tokens_are_prompt:
            passed = time.perf_counter() - self.began
            self.cost.new += 1
            if self.cost.new == 1:
                self.cost.prefill_s = passed
            self.cost.decode_s = passed - self.cost.prefill_s
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece of text."""
        if text:
            self.show(text)


def answer(
    loaded: Loaded,
    ids: Tensor,
    show: Callable[[str], None],
    *,
    config: ThriftConfig,
    max_new_tokens: int,
    chunk: int | None = None,
    **options: Any,
) -> Cost:
    """Answer a prompt through the cache.

    Args:
        loaded: model and tokenizer; the model is switched to thrift.
        ids: int64 ``[1, S]``.
        show: called with each piece of the answer as soon as it is complete.
        config: of the cache.
        max_new_tokens: tokens at most; the answer also ends with the model's end token.
        chunk: tokens of the prompt at a time; all at once by default.
        **options: of ``model.generate``, see `sampling`.

    Returns:
        What it took.

    Raises:
        ValueError: no tokens asked for, or a chunk below 1.
        NotImplementedError: a model that the cache does not serve.
    """
    if max_new_tokens < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"max_new_tokens and chunk must be at least 1, got {max_new_tokens} and {chunk}")
    model: Any = loaded.model
    ids = ids.to(model.device)
    cache = ThriftCache(model.config, ids.shape[1] + max_new_tokens, decode=config)
    enable(model, config)
    cost = Cost(prompt=ids.shape[1])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=generate,
        token_streamer=_Streamer(loaded.tokenizer, show, cost),
        max_new_tokens=max_new_tokens,
        prefill_chunk_size=chunk,
        pad_token_id=_pad(model),
        **{cache_keyword(model): cache},
        **options,
    )
    layers = cache.paged_layers
    cost.kv_bytes = cache.bytes_per_token()
    cost.plain_bytes = sum(
        2 * layer.paged.kv_heads * layer.paged.head_dim * next(model.parameters()).element_size() for layer in layers
    )
    cost.dtype = str(model.dtype).removeprefix("torch.")
    cost.promoted = layers[0].decode_stats(heads=1).share
    return cost


def _pad(model: Any) -> int | None:
    """Return a token to pad with, so that ``generate`` does not warn; a batch of one needs none."""
    ends = model.generation_config.eos_token_id
    return ends[0] if isinstance(ends, list) else ends
