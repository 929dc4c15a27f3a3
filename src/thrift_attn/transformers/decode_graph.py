"""One decode step of a model as a CUDA graph, replayed for every token while the cache grows.

Lengths and positions live on the device, pages are given out on the host before a step needs them. On a device without CUDA
graphs the same steps are launched one by one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from thrift_attn.config import BLOCK
from thrift_attn.transformers.thrift_cache import ThriftCache
from thrift_attn.transformers.thrift_layer import ThriftLayer


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
