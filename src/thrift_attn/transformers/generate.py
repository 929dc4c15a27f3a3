"""Decoding without the cost of launching a model kernel by kernel: one CUDA graph replayed for every token.

    cache = ThriftCache(model.config, max_tokens=131072)
    model.generate(**inputs, past_key_values=cache, custom_generate=generate)

`DecodeGraph` captures one step of a model (one new token for each sequence) and replays it while the cache grows: lengths
and positions live on the device, pages are given out on the host before a step needs them. On a device without CUDA graphs
the same steps are launched one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thrift_attn.config import BLOCK
from thrift_attn.transformers.thrift_cache import ThriftCache, ThriftLayer


class DecodeGraph:
    """One decode step of a model as a CUDA graph.

    The first ``warmup`` steps are launched one by one, for what a first call compiles and allocates must stay out of the
    capture; they are steps like all others. The cache may be cropped or its rows reordered between steps, as long as the
    batch stays the same.

    Args:
        model: a decoder of transformers. Its attention must not wait for the device: with `enable` and a `ThriftCache`
            it does not.
        cache: a `ThriftCache` without sliding-window layers, or a cache of transformers whose tensors stay where they are
            (``StaticCache``), filled with the prompt.
        position: position of the next token of each sequence; for a `ThriftCache` it is known.
        warmup: steps before the capture.

    Attributes:
        captured: whether steps are replayed by now.

    Raises:
        ValueError: an empty cache, or no position.
        NotImplementedError: a cache with sliding-window layers, or transformers before 5.4 on a CUDA device, whose masks
            wait for the device.
    """

    def __init__(self, model: nn.Module, cache: Any, *, position: int | None = None, warmup: int = 1):
        self.model, self.cache, self.warmup = model, cache, warmup
        self._ours = cache if isinstance(cache, ThriftCache) else None
        if self._ours is not None:
            if not all(isinstance(layer, ThriftLayer) for layer in self._ours.layers):
                raise NotImplementedError("a decode graph needs a cache without sliding-window layers")
            if not self._ours.get_seq_length():
                raise ValueError("the cache is empty: the prompt comes first")
            positions = self._known()
        elif position is None:
            raise ValueError("the position of the next token must be given for a cache other than ThriftCache")
        else:
            positions = [position] * int(cache.layers[0].keys.shape[0])
        self.device: torch.device = next(model.parameters()).device
        parameters = inspect.signature(type(model).forward).parameters
        if self.device.type == "cuda" and "cache_position" in parameters:
            raise NotImplementedError("decode graphs need transformers >= 5.4")
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.ids = torch.zeros(len(positions), 1, dtype=torch.long, device=self.device)
        self.positions = torch.tensor(positions, device=self.device)[:, None]
        self._at = positions
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether steps are replayed by now."""
        return self._graph is not None

    def __call__(self, ids: Tensor) -> Tensor:
        """Append one token to every sequence.

        Args:
            ids: int64 ``[B, 1]``.

        Returns:
            Logits of the next token ``[B, V]``. The next call writes into the same tensor.

        Raises:
            ValueError: another batch, or a sequence longer than the cache allows.
            RuntimeError: the pages are exhausted; nothing has been appended.
        """
        if ids.shape != self.ids.shape:
            raise ValueError(f"ids must have shape {list(self.ids.shape)}, got {list(ids.shape)}")
        ours = self._ours
        if ours is not None:
            known = self._known()
            if known != self._at:  # cropped or reordered
                self.positions.copy_(torch.tensor(known)[:, None])
                self._at = known
            if any((tokens + 1) % BLOCK == 0 for tokens in known):
                ours.reserve(1)
        self.ids.copy_(ids)
        if self.device.type != "cuda" or self._steps < self.warmup:
            self._logits = self._launched()
        else:
            self._graph = self._graph or self._captured()
            self._graph.replay()
            if ours is not None:
                ours.advance(1)
        self._steps += 1
        self._at = [position + 1 for position in self._at]
        assert self._logits is not None  # one of the branches has set it
        return self._logits

    def _known(self) -> list[int]:
        assert self._ours is not None
        first: ThriftLayer = self._ours.layers[0]
        return [first.tokens(row) for row in range(first.paged.batch)]

    def _step(self) -> Tensor:
        out = self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **self._options,
        )
        self.positions.add_(1)
        return out.logits[:, -1]

    @torch.no_grad()
    def _launched(self) -> Tensor:
        if self.device.type != "cuda":
            return self._step()
        side = torch.cuda.Stream(self.device)  # as in the capture: what is allocated per stream is there by then
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            logits = self._step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        return logits

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step()
        return graph


def prefill(
    model: nn.Module, ids: Tensor, cache: Any, *, attention_mask: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Run the part of a prompt that the cache does not hold yet.

    Args:
        model: a decoder of transformers.
        ids: int64 ``[B, S]``, the whole prompt, what the cache holds included.
        cache: a cache of transformers.
        attention_mask: ``[B, S]``, 1 at tokens.
        chunk: tokens at a time; all at once by default.

    Returns:
        Logits after the last token ``[B, V]``.

    Raises:
        ValueError: nothing left to run, or a chunk below 1.
    """
    start, stop = int(cache.get_seq_length()), ids.shape[1]
    if start >= stop:
        raise ValueError(f"the cache holds {start} tokens, the prompt has no more than {stop}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    padded = attention_mask is not None and not bool(attention_mask.all())
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        options["logits_to_keep"] = 1
    logits: Tensor | None = None
    for at in range(start, stop, chunk or stop):
        part = slice(at, min(at + (chunk or stop), stop))
        if padded:
            assert attention_mask is not None
            options["attention_mask"] = attention_mask[:, : part.stop]
            options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, part]
        with torch.no_grad():
            logits = model(ids[:, part], **options).logits[:, -1]
    assert logits is not None  # at least one part has run
    return logits


def stream(
    model: nn.Module,
    ids: Tensor,
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
        ids: int64 ``[B, S]``, the prompt.
        cache: empty, or with the beginning of the prompt.
        max_new_tokens: steps.
        pick: logits ``[B, V]`` to tokens ``[B]``; the most likely by default.
        attention_mask: ``[B, S]``, 1 at tokens.
        chunk: see `prefill`.

    Yields:
        int64 ``[B]``. After the last one the cache holds all tokens but it.
    """
    pick = pick or _most_likely
    new = pick(prefill(model, ids, cache, attention_mask=attention_mask, chunk=chunk))
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
        **model_kwargs: ``past_key_values`` (``cache`` since transformers 5.24), a `ThriftCache`, and ``attention_mask``.

    Returns:
        int64 ``[B, S + new]``.

    Raises:
        TypeError: another cache.
        NotImplementedError: beams, or dictionaries as results.
    """
    cache = model_kwargs.get("past_key_values", model_kwargs.get("cache"))
    if not isinstance(cache, ThriftCache):
        raise TypeError(f"past_key_values must be a ThriftCache, got {type(cache).__name__}")
    if generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
        raise NotImplementedError("this decoding loop gives the tokens of greedy search and sampling, nothing else")
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
    for new in stream(model, ids, cache, max_new_tokens=1 << 62, pick=pick, **options):
        ids = torch.cat([ids, new[:, None]], 1)
        if token_streamer is not None:
            token_streamer.put(new.cpu())
        going = going & ~stopping_criteria(ids, None)
        if not bool(going.any()):
            break
    if token_streamer is not None:
        token_streamer.end()
    return ids
