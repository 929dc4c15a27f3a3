"""Decoding without the cost of launching a model kernel by kernel: a `DecodeGraph` for every token.

cache = ThriftCache(model.config, max_tokens=131072)
model.generate(**inputs, cache=cache, custom_generate=generate)  # past_key_values= before transformers 5.24
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode

from thrift_attn.transformers.decode_graph import DecodeGraph
from thrift_attn.transformers.thrift_cache import ThriftCache
from thrift_attn.transformers.versions import cache_keyword


def prefill(
    model: nn.Module, prompt: Tensor, cache: Any, *, attention_mask: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Run the part of a prompt that the cache does not hold yet.

    Args:
        model: a decoder of transformers.
        prompt: the whole prompt, what the cache holds included: token ids, int64 ``[B, S]``, or their embeddings
            ``[B, S, hidden]``.
        cache: a cache of transformers.
        attention_mask: ``[B, S]``, 1 at tokens.
        chunk: tokens at a time; all at once by default.

    Returns:
        Logits after the last token ``[B, V]``.

    Raises:
        ValueError: nothing left to run, or a chunk below 1.
    """
    start, stop = int(cache.get_seq_length()), prompt.shape[1]
    if start >= stop:
        raise ValueError(f"the cache holds {start} tokens, the prompt has no more than {stop}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    padded = attention_mask is not None and not bool(attention_mask.all())
    options: dict[str, Any] = {cache_keyword(model): cache, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        options["logits_to_keep"] = 1
    name = "inputs_embeds" if prompt.is_floating_point() else "input_ids"
    logits: Tensor | None = None
    for at in range(start, stop, chunk or stop):
        part = slice(at, min(at + (chunk or stop), stop))
        if padded:
            assert attention_mask is not None
            options["attention_mask"] = attention_mask[:, : part.stop]
            options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, part]
        with torch.no_grad():
            logits = model(**{name: prompt[:, part]}, **options).logits[:, -1]
    assert logits is not None  # at least one part has run
    return logits


def stream(
    model: nn.Module,
    prompt: Tensor,
    cache: ThriftCache,
    *,
    max_new_tokens: int,
    pick: Callable[[Tensor], Tensor] | None = None,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yield the new tokens of a batch one step at a time.

    Args:
        model: a decoder of transformers after `enable`.
        prompt: token ids, int64 ``[B, S]``, or embeddings ``[B, S, hidden]``.
        cache: empty, or with the beginning of the prompt.
        max_new_tokens: steps.
        pick: logits ``[B, V]`` to tokens ``[B]``; the most likely by default.
        attention_mask: ``[B, S]``, 1 at tokens.
        chunk: see `prefill`.

    Yields:
        int64 ``[B]``. After the last one the cache holds all tokens but it.
    """
    pick = pick or _most_likely
    new = pick(prefill(model, prompt, cache, attention_mask=attention_mask, chunk=chunk))
    step: Callable[[Tensor], Tensor] | None = None
    for left in range(max_new_tokens - 1, -1, -1):
        yield new
        if left:
            step = step or _stepper(model, cache)
            new = pick(step(new[:, None]))


def _most_likely(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _stepper(model: nn.Module, cache: ThriftCache) -> Callable[[Tensor], Tensor]:
    return DecodeGraph(model, cache)


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    token_streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy search and sampling with a `DecodeGraph`, for ``model.generate(..., custom_generate=generate)``.

    Args:
        model: after `enable`.
        input_ids: int64 ``[B, S]``.
        logits_processor: of ``generate``.
        stopping_criteria: of ``generate``.
        generation_config: of ``generate``; ``prefill_chunk_size`` cuts the prompt.
        token_streamer: what ``streamer`` is elsewhere (``generate`` keeps that one from functions like this).
        **model_kwargs: ``cache`` (``past_key_values`` before transformers 5.24), a `ThriftCache`, ``attention_mask`` and
            ``inputs_embeds`` in the place of ``input_ids``.

    Returns:
        int64 ``[B, S + new]``; with ``inputs_embeds`` the new tokens alone.

    Raises:
        TypeError: another cache.
        NotImplementedError: another way of decoding than greedy search and sampling, dictionaries as results, or inputs
            that this loop does not hand to the model (images).
    """
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if not isinstance(cache, ThriftCache):
        raise TypeError(f"{cache_keyword(model)} must be a ThriftCache, got {type(cache).__name__}")
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None and input_ids.shape[1]:
        raise NotImplementedError("this decoding loop takes inputs_embeds without input_ids")
    _check_mode(generation_config, (input_ids if embeds is None else embeds).shape[1], model_kwargs)
    ids, pad = input_ids, generation_config._pad_token_tensor
    going = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    ends = any(hasattr(one, "eos_token_id") for one in stopping_criteria)

    def pick(logits: Tensor) -> Tensor:
        scores = logits_processor(ids, logits.float())
        if generation_config.do_sample:
            new = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            new = scores.argmax(-1)
        return torch.where(going, new, pad) if ends else new

    if token_streamer is not None:
        token_streamer.put(ids.cpu())
    options = {"attention_mask": model_kwargs.get("attention_mask"), "chunk": generation_config.prefill_chunk_size}
    for new in stream(model, ids if embeds is None else embeds, cache, max_new_tokens=1 << 62, pick=pick, **options):
        ids = torch.cat([ids, new[:, None]], 1)
        if token_streamer is not None:
            token_streamer.put(new.cpu())
        going = going & ~stopping_criteria(ids, None)
        if not bool(going.any()):
            break
    if token_streamer is not None:
        token_streamer.end()
    return ids


_KNOWN = {"cache", "past_key_values", "attention_mask", "inputs_embeds", "use_cache", "logits_to_keep", "position_ids"}


def _check_mode(config: Any, length: int, model_kwargs: dict[str, Any]) -> None:
    """Refuse what the loop would leave out without a word."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or config.return_dict_in_generate:
        got = "return_dict_in_generate" if config.return_dict_in_generate else mode.value
        raise NotImplementedError(
            f"this decoding loop gives the tokens of greedy search and sampling, nothing else, got {got}"
        )
    if (config.num_return_sequences or 1) > 1 and not config.do_sample:
        raise NotImplementedError("greedy search has one sequence to return: num_return_sequences must be 1")
    unknown = sorted(name for name, x in model_kwargs.items() if isinstance(x, Tensor) and name not in _KNOWN)
    if unknown:
        raise NotImplementedError(f"this decoding loop does not hand {', '.join(unknown)} to the model")
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None:
        return
    usual = torch.arange(length, device=positions.device)[None]
    if mask is not None:
        usual = torch.where(mask.bool(), mask.cumsum(-1) - 1, -1)
    new = usual[..., -positions.shape[-1] :]
    if positions.ndim != 2 or not bool(((positions == new) | (new < 0)).all()):
        raise NotImplementedError(
            "this decoding loop counts the tokens of a row from 0, other position_ids are not served"
        )
