"""The masks of transformers: what a layer's mask is, in the form that tells `thrift_attention` so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, causal_mask_function, eager_mask, sliding_window_overlay

_AND, _OVERLAY = and_masks().__code__, sliding_window_overlay(1).__code__  # what sliding-window masks are made of
_RUNS = "_thrift_runs"  # attribute on 2D masks
_SLOTS = "_thrift_slots"  # attribute on 2D masks: key slots that the mask was made for
_PLAIN = "_thrift_plain"  # attribute on 4D masks: the same without its causal part, its window, the version of its data


@torch.compiler.disable
def thrift_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one type of layers, in the form that tells `thrift_attention` what it is.

    Args:
        batch_size: B.
        kv_length: number of key slots, more than are written so far with a static cache.
        kv_offset: position of the first key slot.
        mask_function: the pattern; causal alone, with a sliding window, or one that goes to SDPA.
        attention_mask: bool ``[B, positions]``, True at tokens.
        allow_is_causal_skip: False where the model itself looks at the mask, so that it must be a real one.
        **kwargs: the position of the queries, ``cache_position`` in transformers 5.0, ``q_length`` and ``q_offset``
            later, and what is of no concern here.

    Returns:
        None: causal, keys and queries end together and all are tokens. Bool ``[B, S]``: causal, the last query is in
        slot S - 1, True at tokens. Float ``[B, 1, Tq, kv_length]``, added to the logits: a sliding window, anything else,
        and a mask that the model asks for; `plain_mask` tells the first and the last from others.

    Raises:
        ValueError: an attention mask that ends before the last query.
    """

    def real() -> Tensor:
        # The additive form: SDPA takes it, and models that extend their masks all know it.
        options = {**kwargs, "allow_is_bidirectional_skip": False}  # None has one meaning only
        return eager_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options,
        )

    window = window_of(mask_function)
    if mask_function is not causal_mask_function and window is None:
        return real()
    plain = _tokens(batch_size, kv_length, kv_offset, attention_mask, kwargs)
    if window is None and allow_is_causal_skip and not (plain is not None and _cuts_masks(kwargs)):
        return plain
    with torch.inference_mode(False):  # its data has a version, so that `plain_mask` sees a change
        mask = real()
        setattr(mask, _PLAIN, (plain, window, mask._version))
    return mask


def plain_mask(mask: Tensor | None) -> tuple[Tensor | None, int | None]:
    """A mask in its simplest form.

    Args:
        mask: what `thrift_mask` returned, or any other.

    Returns:
        A real mask that the model has not changed as None or bool ``[B, S]``, any other as it is; and the sliding window
        that comes on top of the causal mask, None if there is none.
    """
    found: tuple[Tensor | None, int | None, int] | None = getattr(mask, _PLAIN, None)
    if mask is None or found is None or mask._version != found[2]:
        return mask, None
    return found[:2]


def check_slots(mask: Tensor | None, slots: int) -> None:
    """Raise NotImplementedError if a layer attends to another number of key slots than its 2D mask was made for."""
    made_for: int = getattr(mask, _SLOTS, slots)
    if made_for != slots:
        raise NotImplementedError(
            f"the mask was made for {made_for} key slots, the layer attends to {slots}: the model counts the tokens of its "
            f"cache otherwise than transformers' masks do, so padding cannot be told from tokens"
        )


def window_of(mask_function: Callable[..., Any]) -> int | None:
    """The window of a mask function that is causal with a sliding window and nothing else; None for any other."""
    parts = _free_variables(mask_function).get("mask_functions")
    if getattr(mask_function, "__code__", None) is not _AND or not isinstance(parts, tuple) or len(parts) != 2:
        return None
    overlay, causal = parts
    if causal is not causal_mask_function or getattr(overlay, "__code__", None) is not _OVERLAY:
        return None
    window = _free_variables(overlay).get("sliding_window")
    return window if isinstance(window, int) else None


def _free_variables(function: Callable[..., Any]) -> Mapping[str, Any]:
    """What a closure holds, by name."""
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    return {} if code is None else dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def only_indexed(mask: Tensor | None, indices: Tensor, slots: int) -> Tensor:
    """A float or bool mask ``[B, 1, Tq, S]`` that shows only the slots ``[B, Tq, k]`` of an index.

    Raises:
        NotImplementedError: no such mask, or indices of another shape.
    """
    if mask is None or mask.ndim != 4 or indices.ndim != 3 or indices.shape[1] != mask.shape[2]:
        raise NotImplementedError(
            f"indices of sparse attention must have shape [B, Tq, k] and come with a 4D mask, got {list(indices.shape)}"
        )
    hidden = torch.ones(*indices.shape[:2], slots, dtype=torch.bool, device=mask.device)
    hidden = hidden.scatter(-1, indices.long().to(mask.device), False)[:, None]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def has_holes(tokens: Tensor) -> bool:
    """Whether there is padding between the tokens of a row of a bool mask ``[B, S]``."""
    runs = getattr(tokens, _RUNS, None)
    return (_count_runs(tokens) if runs is None else runs) > 1


def _tokens(
    batch_size: int, kv_length: int, kv_offset: int, attention_mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """A causal mask as None or bool ``[B, S]``."""
    end = _position_after_queries(kwargs)
    slots = min(end - kv_offset, kv_length)
    if attention_mask is None:
        if slots == kv_length:
            return None
        return torch.ones(batch_size, slots, dtype=torch.bool, device=_device(kwargs))
    if attention_mask.shape[-1] < end:
        raise ValueError(
            f"attention_mask must cover cached and new tokens, {end} positions, got {attention_mask.shape[-1]}"
        )
    tokens = attention_mask[:, kv_offset : kv_offset + slots].bool()
    if slots == kv_length and bool(tokens.all()):
        return None
    setattr(tokens, _RUNS, _count_runs(tokens))  # here once for all layers
    setattr(tokens, _SLOTS, kv_length)
    return tokens


def _cuts_masks(kwargs: Mapping[str, Any]) -> bool:
    """Whether a model cuts the queries of its masks: Gemma 4 does before layers that share K and V of others."""
    return bool(getattr(kwargs.get("config"), "num_kv_shared_layers", 0))


def _count_runs(tokens: Tensor) -> int:
    """Most runs of tokens in a row of ``[B, S]``."""
    starts = tokens[:, :1].sum(-1) + (tokens[:, 1:] & ~tokens[:, :-1]).sum(-1)
    return int(starts.max())


def _position_after_queries(kwargs: Mapping[str, Any]) -> int:
    if (positions := kwargs.get("cache_position")) is not None:
        return int(positions[-1]) + 1
    return int(kwargs["q_offset"]) + int(kwargs["q_length"])


def _device(kwargs: Mapping[str, Any]) -> torch.device | str:
    if (positions := kwargs.get("cache_position")) is not None:
        return positions.device
    return kwargs.get("device", "cpu")
