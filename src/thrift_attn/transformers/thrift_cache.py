"""`ThriftCache`: the KV cache of a transformers model in 4 bits and a budget.

    from thrift_attn.transformers import ThriftCache, enable

    enable(model)
    model.generate(**inputs, cache=ThriftCache(model.config, max_tokens=131072))  # past_key_values= before 5.24

Full-attention layers are paged (`thrift_attn.cache.PagedThriftCache`), all others are those of transformers. Pages hold
tokens, no padding: sequences of unequal length cost what they hold.

How attention reaches the pages. ``update`` returns two tensors of the class `Cached`, which have the shape of K and V but no
data. The attention that `enable` puts in takes the pages from them. Any other operation on them widens the pages to 16 bits
first, so a model or a layer that computes its attention otherwise gets right numbers, only without the speed.

What is computed:

- the first tokens of a sequence: `thrift_attn.attention` on the K and V that the model has just made, with ``prefill``;
- up to 16 new tokens: the decode kernels over the pages, with ``decode``;
- more new tokens on a cache that holds some: the pages are widened, layer by layer, for `thrift_attn.attention`.

An interrupted forward leaves tokens in the first layers that the others lack. `get_seq_length` counts those that all layers
hold, and the next forward takes the others back. What is interrupted inside of a change of the books makes a cache that is not
intact and refuses everything but `ThriftCache.reset`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from thrift_attn.cache.changes import Changes
from thrift_attn.cache.paged import DEFAULT
from thrift_attn.checks import positive, whole_number, whole_numbers
from thrift_attn.config import ThriftConfig, check_config
from thrift_attn.crossovers import EVERYWHERE
from thrift_attn.dispatch import cache_config, prefill_config
from thrift_attn.exact import Call
from thrift_attn.transformers.files import identity_of, load, save
from thrift_attn.transformers.padding import MaskReader
from thrift_attn.transformers.state_layers import (
    StateSteps,
    attends,
    can_crop,
    check_head_dims,
    check_kind,
    forget_states,
    has_states,
    head_dim,
    held_tensors,
    make_layers,
)
from thrift_attn.transformers.thrift_layer import REFUSALS, RESET, CacheOptions, ThriftLayer


class ThriftCache(Cache):
    """KV cache of a model for `transformers`: paged in two precisions, for ``cache=`` (``past_key_values=`` before 5.24).

    Args:
        config: of the model. Layers of full attention are paged, all others are those of transformers.
        max_tokens: most tokens of a sequence.
        pool_tokens: tokens for which there are pages in every layer, all sequences together; by default ``max_tokens`` for
            each sequence of the first batch. Sequences that share a prefix need its pages once.
        decode: what is stored, and computed for up to 16 new tokens.
        prefill: what more than 16 tokens are attended with; by default what the device is fast at (``base_format="auto"``)
            with the budget of ``decode``.
        exact_tokens: does nothing any more: the default budget has a floor of 16 blocks, so that up to 1,024 tokens are
            attended with every block in high precision (`thrift_attn.floored`). Accepted with a DeprecationWarning.

    The pages are allocated when the first tokens arrive. ``copy.deepcopy`` of a cache is `fork`: pages are shared.

    Raises:
        TypeError: a config of another kind.
        ValueError: sizes out of range.
        NotImplementedError: a kind of layer that is not served (latent or indexed attention), or a head dimension that pages
            cannot hold.

    Example:
        >>> from transformers import LlamaConfig
        >>> ThriftCache(LlamaConfig(num_hidden_layers=2), max_tokens=4096).get_seq_length()
        0
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        max_tokens: int,
        *,
        pool_tokens: int | None = None,
        decode: ThriftConfig = DEFAULT,
        prefill: ThriftConfig | None = None,
        exact_tokens: int | None = None,
    ):
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be that of a transformers model, got {type(config).__name__}")
        max_tokens = positive("max_tokens", max_tokens)
        pool_tokens = None if pool_tokens is None else positive("pool_tokens", pool_tokens)
        check_config(decode, "decode")
        check_config(prefill or decode, "prefill")
        if exact_tokens is not None:
            told = "ThriftCache: exact_tokens does nothing: budgets have a floor, see thrift_attn.floored"
            warnings.warn(told, DeprecationWarning, stacklevel=2)
        text = config.get_text_config(decoder=True)
        check_kind(config, text)
        self.identity = identity_of(text)
        self.options = CacheOptions(max_tokens, pool_tokens, cache_config(decode), prefill)
        self.text_config = text
        layers = make_layers(config, self.options, MaskReader())
        check_head_dims(text, [at for at, layer in enumerate(layers) if isinstance(layer, ThriftLayer)])
        super().__init__(layers=layers)
        self._changes = Changes(RESET, REFUSALS)
        self._steps = StateSteps()
        self._last_layer = -1  # the layer that has got tokens last
        self._forward_begins = False  # whether a mask has been asked for since

    @property
    def paged_layers(self) -> list[ThriftLayer]:
        """The layers whose K and V lie in pages."""
        return [layer for layer in self.layers if isinstance(layer, ThriftLayer)]

    def _filled(self) -> list[ThriftLayer]:
        """The paged layers that have got tokens, which are those of the model."""
        return [layer for layer in self.paged_layers if layer.is_initialized]

    def prefill_on(self, device: torch.device, tokens: int | None = None) -> ThriftConfig:
        """What a long prompt is attended with on a device, its format named. ``tokens`` does nothing any more."""
        if tokens is not None:
            told = "ThriftCache.prefill_on: tokens does nothing: budgets have a floor, see thrift_attn.floored"
            warnings.warn(told, DeprecationWarning, stacklevel=2)
        text = self.text_config
        first = next((at for at, layer in enumerate(self.layers) if isinstance(layer, ThriftLayer)), None)
        if first is None:
            raise ValueError(f"{type(text).__name__} has no layer of full attention, so nothing is attended by thrift")
        dtype = getattr(text, "dtype", None)
        call = Call(
            device=device,
            dtype=dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype(),
            head_dim=head_dim(text, first),
            queries=EVERYWHERE,
            keys=EVERYWHERE,
        )
        return prefill_config(self.options.prompts, call)

    # -- what transformers calls ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hand new K and V to a layer; the first layer of a forward takes back what an interrupted one has left.

        K and V of a forward are ``[B, Hkv, T, D]``; they may as well be put in by hand (prefix tuning).

        Raises:
            ValueError: a layer that the config of the cache does not have, or other shapes.
            RuntimeError: some layers hold tokens, others have never got any, and it is not known why.
            NotImplementedError: gradients.
        """
        self._changes.check()
        for name, x in (("K", key_states), ("V", value_states)):
            if not isinstance(x, Tensor) or x.ndim != 4:
                got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be a tensor [B, Hkv, T, D], got {got}")
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"the model runs layer {layer_idx}, the cache was made for {len(self.layers)} layers: make it from the "
                f"config of this model"
            )
        if layer_idx <= self._last_layer:
            self._mend(by_hand=not self._forward_begins)
        self._last_layer, self._forward_begins = layer_idx, False
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """The state of a convolution, which the model may change in place."""
        self._steps.note(layer_idx, "conv")
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """The state of linear attention, which the model may change in place."""
        self._steps.note(layer_idx, "recurrent")
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Hand a new state of a convolution to a layer."""
        with self._steps.change(layer_idx, "new conv"):
            return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Hand a new state of linear attention to a layer."""
        with self._steps.change(layer_idx, "new recurrent"):
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots (tokens and padding) that all layers hold, those apart that the model does not run."""
        self._changes.check()
        return min(layer.get_seq_length() for layer in self._running())

    def _running(self) -> list[Any]:
        """The layers of the config less those that the model is known not to have."""
        layers = self._attending()
        begun = sum(layer.is_initialized for layer in layers.values())
        if 0 < begun < len(layers) and (known := self._layers_of_model()) is not None:
            return [layer for at, layer in layers.items() if at in known or layer.is_initialized]
        return list(layers.values())

    def _attending(self) -> dict[int, Any]:
        """The layers with K and V by their numbers: not those of linear attention, or that share K and V of others."""
        return {at: layer for at, layer in enumerate(self.layers) if attends(layer)}

    def _layers_of_model(self) -> frozenset[int] | None:
        """The attention layers of the model that fills the cache; None before its attention has been seen."""
        for layer in self.paged_layers:
            if layer.state is not None and (found := layer.state.layers_of_model()) is not None:
                return found
        return None

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Slots that a layer attends to and the first of them."""
        if not attends(self.layers[layer_idx]):
            layer_idx = next(iter(self._attending()))
        layer, there = self.layers[layer_idx], self.get_seq_length()
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        self._steps.begin(self.layers, there, new)
        self._forward_begins = True
        if layer.get_seq_length() != there and not isinstance(layer, ThriftLayer):
            raise RuntimeError(
                f"an interrupted forward left tokens in sliding-window layer {layer_idx}: call crop(0), or reset()"
            )
        if isinstance(layer, ThriftLayer):
            return there + new, 0
        return layer.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Take slots back from the end of all layers: ``-n`` takes n, and ``n``, as in transformers 5.0, leaves n."""
        tokens_to_remove = whole_number("tokens_to_remove", tokens_to_remove)
        self._mend()
        there = self.get_seq_length()
        keep = max(0, there + tokens_to_remove) if tokens_to_remove <= 0 else min(there, tokens_to_remove)
        if keep < there and any(has_states(layer) for layer in self.layers):
            raise RuntimeError("states of linear attention cannot be taken back: ThriftCache crops no hybrid model")
        for at, layer in self._attending().items():  # before anything is changed
            if keep < there and not isinstance(layer, ThriftLayer) and not can_crop(layer, there - keep):
                raise RuntimeError(
                    f"sliding-window layer {at} is past its window and has forgotten what came before: it cannot go back to "
                    f"{keep} slots. Call reset() and start again, or fork() before what is to be taken back"
                )
        for layer in self._attending().values():
            if isinstance(layer, ThriftLayer):
                layer.keep(keep)
            elif keep < there or getattr(layer, "record_past", False):
                layer.crop(keep - there)

    def _mend(self, *, by_hand: bool = False) -> None:
        """Take back what not all layers hold.

        Args:
            by_hand: K and V that no attention has seen may have been put in by hand, so they stay.
        """
        running = self._running()
        there = min(layer.get_seq_length() for layer in running)
        if by_hand:
            running = [layer for layer in running if not (isinstance(layer, ThriftLayer) and layer.is_pending)]
        extra = {at: layer.get_seq_length() - there for at, layer in self._attending().items() if layer in running}
        if any(extra.values()) and self._layers_of_model() is None:
            self._check_all_have_begun()
        for at, count in extra.items():
            layer = self.layers[at]
            if count and isinstance(layer, ThriftLayer):
                layer.keep(there)
            elif count:
                try:
                    layer.crop(-count)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"an interrupted forward left {count} tokens in sliding-window layer {at} that it cannot take "
                        f"back: call reset() and start again"
                    ) from error

    def _check_all_have_begun(self) -> None:
        """Raise RuntimeError if some layers have never got a token: the model may lack them."""
        layers = self._attending().values()
        begun = sum(layer.is_initialized for layer in layers)
        if begun < len(layers):
            raise RuntimeError(
                f"{begun} layers hold tokens and {len(layers) - begun} of the {len(layers)} that the config has "
                f"never got any: call reset() if a forward was interrupted; if the model has only {begun} layers, make the "
                f"cache from a config with num_hidden_layers={begun}"
            )

    def reorder_cache(self, beam_idx: Any) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was; complete blocks are shared. Wrong ones change nothing."""
        seqs, batch = whole_numbers("beam_idx", beam_idx, each="seq"), self._batch()
        if batch is not None and not (seqs and min(seqs) >= 0 and max(seqs) < batch):
            raise ValueError(f"seq must be from 0 to {batch - 1}, and there must be one, got {seqs}")
        with self._changes:
            index: Any = torch.tensor(seqs, dtype=torch.int64)
            super().reorder_cache(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence ``repeats`` times."""
        repeats = positive("repeats", repeats)
        if (batch := self._batch()) is not None:
            self.reorder_cache([seq for seq in range(batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Any) -> None:
        """Keep only these sequences: their numbers, those from the end below 0, or a bool for each."""
        if (batch := self._batch()) is not None:
            self.reorder_cache(torch.arange(batch)[torch.as_tensor(indices).cpu()])

    def _batch(self) -> int | None:
        """Sequences of the layers that hold tokens; None before the first ones."""
        for layer in self._attending().values():
            if layer.is_initialized:
                return layer.batch_size if isinstance(layer, ThriftLayer) else layer.keys.shape[0]
        return None

    def reset(self) -> None:
        """Empty all layers; pages stay allocated for the next sequences."""
        self._changes.unfinished = True  # until all of it is done
        super().reset()
        for layer in self.layers:
            if has_states(layer):
                forget_states(layer)
        self._steps.clear()
        self._last_layer, self._forward_begins = -1, False
        self._changes.unfinished = False

    # -- growing, sharing, saving --------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Give every sequence of every layer the pages for ``tokens`` more tokens, for steps that a graph replays.

        Raises:
            ValueError: more tokens than a sequence may have.
            RuntimeError: the pages are exhausted.
        """
        self._changes.check()
        for layer in self._filled():
            layer.paged.reserve(tokens)

    def check_room(self, tokens: int) -> None:
        """Raise ValueError if a sequence would be longer than ``max_tokens`` with so many more tokens."""
        self._changes.check()
        for layer in self._filled():
            layer.check_room([tokens] * layer.batch_size)

    def advance(self, tokens: int) -> None:
        """Note that a replayed graph has appended ``tokens`` tokens to every sequence."""
        with self.replaying(tokens):
            pass

    @contextmanager
    def replaying(self, tokens: int) -> Iterator[None]:
        """Replay a graph inside that appends ``tokens`` tokens to every sequence, and note them.

        Where it is interrupted, the device may hold tokens that the host does not count: the cache refuses to go on.
        """
        with self._changes:
            yield
            for layer in self._filled():
                layer.paged.advance(tokens)
                layer.slots += tokens

    @property
    def is_intact(self) -> bool:
        """Whether no change was interrupted halfway; a cache that is not intact refuses everything but `reset`."""
        layers = [layer.is_intact for layer in self.paged_layers]
        return not self._changes.unfinished and all(layers)

    def tokens(self, seq: int) -> int:
        """Tokens of a sequence, without padding."""
        self._changes.check()
        if not self.paged_layers:
            raise ValueError(
                f"{type(self.text_config).__name__} has no layer of full attention, and others do not tell tokens from "
                f"padding: get_seq_length() counts both"
            )
        return min(layer.tokens(seq) for layer in self._running() if isinstance(layer, ThriftLayer))

    def fork(self) -> ThriftCache:
        """Another cache that begins with what this one holds: complete blocks are shared, what follows is its own.

        A prompt that several generations begin with is computed and stored once. The pages of a fork go back to the pool
        when it is dropped or `reset`.
        """
        self._changes.check()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._changes = self._changes.anew()
        reader = MaskReader()
        other.layers = [
            layer.fork(reader)
            if isinstance(layer, ThriftLayer)
            else (copy.deepcopy if has_states(layer) else copy.copy)(layer)
            for layer in self.layers
        ]
        other._steps = self._steps.copy()
        return other

    def __copy__(self) -> ThriftCache:
        """A fork: two caches over the same layers would not know of each other."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> ThriftCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a ThriftCache shares its pages, so it cannot be pickled: save(path) and load(path) keep it in a file"
        )

    def nbytes(self) -> int:
        """Bytes that the cache has allocated on its devices."""
        paged = sum(layer.paged.nbytes() for layer in self._filled())
        return paged + sum(x.numel() * x.element_size() for layer in self.layers for x in held_tensors(layer))

    def bytes_per_token(self) -> float:
        """Bytes of pages for one token in all paged layers."""
        return sum(layer.paged.bytes_per_token() for layer in self._filled())

    @property
    def decode(self) -> ThriftConfig:
        """What is stored, and computed for up to 16 new tokens."""
        return self.options.decode

    def save(self, path: str | Path) -> None:
        """Write what the cache holds to a safetensors file; see `thrift_attn.transformers.files`."""
        self._check_file()
        self._mend()
        save(self, path)

    def _check_file(self) -> None:
        """Refuse layers that files have no form for."""
        for at, layer in enumerate(self.layers):
            if type(layer) not in (ThriftLayer, DynamicSlidingWindowLayer):
                raise NotImplementedError(f"a file of a cache has no form for layer {at}, a {type(layer).__name__}")

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> ThriftCache:
        """Fill this cache, which must be empty, from a file on a device; see `thrift_attn.transformers.files`."""
        self._check_file()
        load(self, path, device)
        return self
