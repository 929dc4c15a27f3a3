"""Layers of a `ThriftCache` that are not pages alone: linear attention beside them or instead of them.

The states of linear attention (Mamba, gated delta rules, short convolutions) are those of transformers. A step overwrites
them, so an interrupted forward cannot be taken back; `StateSteps` notices it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from thrift_attn.cache.changes import Changes
from thrift_attn.dispatch import HEAD_DIMS
from thrift_attn.transformers.padding import MaskReader
from thrift_attn.transformers.thrift_layer import RESET, CacheOptions, ThriftLayer
from transformers import cache_utils


class _Absent:
    """Stands for a class that the installed transformers does not have."""


_Linear: Any = getattr(cache_utils, "LinearAttentionLayer", _Absent)
_Hybrid: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", _Absent)
_Dummy: Any = getattr(cache_utils, "DummyLayer", _Absent)

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
if _Linear is not _Absent:
    _KINDS |= {"linear_attention", "conv", "hybrid", "moe", "mlp"}


class ThriftStateLayer(_Linear, ThriftLayer):  # pyright: ignore[reportGeneralTypeIssues]
    """Attention and linear attention side by side (Falcon-H1, Zamba 2): pages, and states as in transformers.

    Args:
        options: of the cache.
        reader: of masks.
        states: number of states of each kind.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, options: CacheOptions, reader: MaskReader, states: int = 1):
        ThriftLayer.__init__(self, options, reader)
        _Linear.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the pages for K and V, which come by position, or states, which come by name."""
        (ThriftLayer if args else _Linear).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Give all pages back and forget the states."""
        ThriftLayer.reset(self)
        forget_states(self)

    def select(self, seqs: list[int]) -> None:
        """Make sequence i what sequence ``seqs[i]`` was, in pages and states."""
        ThriftLayer.select(self, seqs)
        _Linear.reorder_cache(self, torch.tensor(seqs))

    reorder_cache = ThriftLayer.reorder_cache
    crop = ThriftLayer.crop
    offload = ThriftLayer.offload

    def fork(self, reader: MaskReader) -> ThriftLayer:
        """The same tokens over the same pages, and a copy of the states."""
        other = ThriftLayer.fork(self, reader)
        for name in _fresh(self):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other


def forget_states(layer: Any) -> None:
    """Make the states of a layer as they are at first: the next batch may have another size."""
    vars(layer).update(_fresh(layer))


def _fresh(layer: Any) -> dict[str, Any]:
    """What a layer with empty states holds, by name."""
    new = vars(_Linear(number_of_states=layer.number_of_states))
    return {name: value for name, value in new.items() if name not in ("device", "dtype")}


def make_layers(config: Any, options: CacheOptions, reader: MaskReader) -> list[Any]:
    """The layers of a cache: pages for full attention, for everything else those of transformers.

    Full attention with heads larger than the kernels serve has 16-bit layers of transformers, too.

    Raises:
        NotImplementedError: no layer for pages, or one of another kind.
    """
    text = config.get_text_config(decoder=True)
    name = type(text).__name__
    if getattr(text, "model_type", None) == "minimax":
        raise NotImplementedError(f"ThriftCache does not serve {name}, whose model takes no cache but its own")
    if kinds := set(getattr(text, "layer_types", None) or ()) - _KINDS:
        raise NotImplementedError(f"ThriftCache does not serve {name}, which has layers of {', '.join(sorted(kinds))}")
    if _Linear is _Absent and (
        set(getattr(text, "layers_block_type", ())) - {"attention"} or hasattr(text, "mamba_d_state")
    ):
        raise NotImplementedError(
            f"ThriftCache does not serve {name} with this transformers, whose caches hold no states"
        )
    layers: list[Any] = DynamicCache(config=config).layers
    for at, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            if head_dim(text, at) <= max(HEAD_DIMS):
                layers[at] = ThriftLayer(options, reader)
        elif type(layer) is _Hybrid:
            layers[at] = ThriftStateLayer(options, reader, layer.number_of_states)
        elif type(layer) not in (DynamicSlidingWindowLayer, _Linear, _Dummy):
            raise NotImplementedError(
                f"ThriftCache does not serve {name}, which needs a {type(layer).__name__} for layer {at}"
            )
    if any(map(has_states, layers)) and not any(isinstance(layer, ThriftLayer) for layer in layers):
        raise NotImplementedError(f"ThriftCache has pages for full attention, and {name} has none")
    return layers


def head_dim(text: Any, at: int) -> int:
    """The head dimension of a layer; it may differ by layer."""
    every = getattr(text, "per_layer_config", None)
    one = text if every is None else every[at]
    return getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads


def can_crop(layer: Any, slots: int) -> bool:
    """Whether a layer of transformers can take so many slots back: not past its window, unless it has recorded the past."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or layer.cumulative_length < layer.sliding_window:
        return True
    needed = min(layer.sliding_window - 1, layer.cumulative_length - slots)
    held = 0 if layer.keys is None else layer.keys.shape[-2]
    return getattr(layer, "record_past", False) and held - slots >= needed


def check_kind(config: Any, text: Any) -> None:
    """Refuse models whose K and V are not one pair for each token, head and layer."""
    name = type(text).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"ThriftCache serves decoder-only models; {name} is of an encoder-decoder model, whose cross-attention would "
            f"write into the same layers"
        )
    if getattr(text, "kv_lora_rank", None):
        raise NotImplementedError(
            f"ThriftCache holds K and V of each head; {name} has latent attention (kv_lora_rank={text.kv_lora_rank})"
        )


def check_head_dims(text: Any, layers: list[int]) -> None:
    """Refuse a head dimension that pages cannot hold; it may differ by layer."""
    for at in layers:
        dim = head_dim(text, at)
        if dim % 16:
            raise NotImplementedError(
                f"ThriftCache needs a head dimension that is a multiple of 16, got {dim} in layer {at}"
            )


def attends(layer: Any) -> bool:
    """Whether a layer of a cache holds K and V, so that it knows its length."""
    return isinstance(layer, CacheLayerMixin)


def has_states(layer: Any) -> bool:
    """Whether a layer of a cache holds states of linear attention."""
    return isinstance(layer, _Linear)


def held_tensors(layer: Any) -> Iterable[torch.Tensor]:
    """The tensors of a layer of transformers."""
    for value in vars(layer).values():
        for x in value.values() if isinstance(value, dict) else (value,):
            if isinstance(x, torch.Tensor):
                yield x


class StateSteps:
    """What a forward has done so far in a cache with states of linear attention, so that an interrupted one is noticed.

    Models change states in place after they have asked for them, so asking counts, too. An interrupt between asking and such
    a change in the last layer is not noticed; one in a change by the cache itself is.
    """

    def __init__(self) -> None:
        self._done: dict[int, set[str]] = {}
        self._changes = Changes(RESET)  # of states
        self._slots: int | None = None  # of the cache when the forward is through

    def note(self, layer: int, step: str) -> None:
        """Note what a layer has done with its states."""
        self._done.setdefault(layer, set()).add(step)

    @contextmanager
    def change(self, layer: int, step: str) -> Iterator[None]:
        """Change a state of a layer inside, and note it."""
        with self._changes:
            self.note(layer, step)
            yield

    def begin(self, layers: list[Any], held: int, new: int) -> None:
        """Begin a forward; calling it again before the first layer changes nothing.

        Args:
            layers: of the cache.
            held: slots that all layers with attention hold.
            new: slots of the forward.

        Raises:
            RuntimeError: the last one has changed some layers and not the others.
        """
        with_states = [at for at, layer in enumerate(layers) if has_states(layer)]
        if not with_states:
            return
        done = {frozenset(self._done.get(at, ())) for at in with_states}
        half = self._slots is not None and self._done and (held != self._slots or len(done) > 1)
        self._changes.check()
        if half:
            raise RuntimeError(
                "an interrupted forward left states of linear attention that cannot be taken back: call reset() and start "
                "again"
            )
        self._done.clear()
        self._slots = held + new

    def clear(self) -> None:
        """Forget the last forward."""
        self._done.clear()
        self._slots, self._changes = None, self._changes.anew()

    def copy(self) -> StateSteps:
        """The same for another cache."""
        other = StateSteps()
        other._done = {layer: set(steps) for layer, steps in self._done.items()}
        other._slots, other._changes.unfinished = self._slots, self._changes.unfinished
        return other
