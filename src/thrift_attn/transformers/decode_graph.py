"""One decode step of a model as a CUDA graph, replayed for every token while the cache grows.

Lengths and positions live on the device, pages are given out on the host before a step needs them. On a device without CUDA
graphs the same steps are launched one by one.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from thrift_attn.cache import PagedThriftCache
from thrift_attn.config import BLOCK
from thrift_attn.decode.tensors import ResidentTensors
from thrift_attn.transformers.thrift_cache import ThriftCache
from thrift_attn.transformers.thrift_layer import ThriftLayer
from thrift_attn.transformers.versions import cache_keyword


class DecodeGraph:
    """One decode step of a model as a CUDA graph.

    The first ``warmup`` steps are launched one by one, for what a first call compiles and allocates must stay out of the
    capture; they are steps like all others. The cache may be cropped or its sequences reordered between steps, as long as the
    batch stays the same; where it has got other tensors since (after `reset` with another batch, `load`), the step is captured
    again.

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
        NotImplementedError: a cache with sliding-window layers, a model on several devices, or transformers before 5.4 on
            a CUDA device, whose masks wait for the device.
    """

    def __init__(self, model: nn.Module, cache: Any, *, position: int | None = None, warmup: int = 1):
        devices = {x.device for x in (*model.parameters(), *model.buffers())}
        if len(devices) != 1:
            names = ", ".join(sorted(map(str, devices))) or "none"
            raise NotImplementedError(f"a decode graph needs a model on one device, this one is on {names}")
        (self.device,) = devices
        self.model, self.cache, self.warmup = model, cache, warmup
        self._ours = cache if isinstance(cache, ThriftCache) else None
        if self._ours is not None:
            if not all(type(layer) is ThriftLayer for layer in self._ours.layers):
                raise NotImplementedError(
                    "a decode graph needs a cache of pages alone, without sliding-window layers or states"
                )
            if not self._ours.get_seq_length():
                raise ValueError("the cache is empty: the prompt comes first")
            positions = self._known()
        elif position is None:
            raise ValueError("the position of the next token must be given for a cache other than ThriftCache")
        else:
            positions = [position] * int(cache.layers[0].keys.shape[0])
        parameters = inspect.signature(type(model).forward).parameters
        if self.device.type == "cuda" and "cache_position" in parameters:
            raise NotImplementedError("decode graphs need transformers >= 5.4")
        self._options: dict[str, Any] = {"use_cache": True, "return_dict": True, cache_keyword(model): cache}
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1
        self.ids = torch.zeros(len(positions), 1, dtype=torch.long, device=self.device)
        self.positions = torch.tensor(positions, device=self.device)[:, None]
        self._at = positions
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[Any] = []  # what the graph has the addresses of, kept alive with it
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
            if len(known) != len(self._at):
                raise ValueError(f"the graph is for {len(self._at)} sequences, the cache holds {len(known)} by now")
            ours.check_room(1)
            if known != self._at:  # cropped or reordered
                self.positions.copy_(torch.tensor(known)[:, None])
                self._at = known
            if any((tokens + 1) % BLOCK == 0 for tokens in known):
                ours.reserve(1)
        self.ids.copy_(ids)
        if self.device.type != "cuda" or self._steps < self.warmup:
            self._logits = self._launched()
        else:
            if self._graph is None or self._moved():
                self._graph = None  # its memory is free before another is captured
                self._graph = self._captured()
            with torch.cuda.device(self.device), nullcontext() if ours is None else ours.replaying(1):
                self._graph.replay()
        self._steps += 1
        self._at = [position + 1 for position in self._at]
        assert self._logits is not None  # one of the branches has set it
        return self._logits

    def _known(self) -> list[int]:
        assert self._ours is not None
        first: ThriftLayer = self._ours.layers[0]
        return [first.tokens(seq) for seq in range(first.paged.batch)]

    def _step(self) -> Tensor:
        out = self.model(input_ids=self.ids, position_ids=self.positions, **self._options)
        self.positions.add_(1)
        return out.logits[:, -1]

    def _tensors(self) -> list[Any]:
        """What the kernels of a step read and write besides the weights: they have its addresses."""
        if self._ours is not None:
            return [x for layer in self._ours.paged_layers if layer.is_initialized for x in _held_by(layer.paged)]
        return [x for layer in self.cache.layers for x in (layer.keys, layer.values)]

    def _moved(self) -> bool:
        """Whether the cache has other tensors than when the step was captured; asks nothing of the device."""
        now = self._tensors()
        return len(now) != len(self._held) or any(x is not y for x, y in zip(now, self._held, strict=True))

    @torch.no_grad()
    def _launched(self) -> Tensor:
        if self.device.type != "cuda":
            return self._step()
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream(self.device)  # as in the capture: what is allocated per stream is there by then
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                logits = self._step()
            torch.cuda.current_stream(self.device).wait_stream(side)
        logits.record_stream(torch.cuda.current_stream(self.device))
        return logits

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        own = torch.cuda.Stream(
            self.device
        )  # torch's own is on the device of the first capture, whatever the current one is
        with warnings.catch_warnings():
            # torch says so and goes on; replays would give the same logits for ever.
            warnings.filterwarnings("error", message=".*CUDA Graph is empty")
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=own):
                self._logits = self._step()
        self._held = self._tensors()
        return graph


def _held_by(paged: PagedThriftCache) -> list[Any]:
    """The tensors of a paged cache and what holds them, one level deep: it is asked for in every step."""
    mine = list(vars(paged).values())
    holders = [x for x in mine if type(x).__module__.startswith("thrift_attn.cache")]
    parts = mine + [x for holder in holders for x in vars(holder).values()]
    return [paged, *holders, *(x for x in parts if type(x) is Tensor or isinstance(x, (tuple, ResidentTensors)))]
