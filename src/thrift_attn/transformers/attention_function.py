"""What transformers calls for one attention layer with ``attn_implementation="thrift"``.

The rule. A call of an attention layer is served by thrift when its mask is causal, with padding only before and after
the tokens of a row. The others are computed in the dtype of the model by PyTorch's SDPA:

- a layer left out by ``enable(layers=...)``;
- attention that is not causal: encoders, cross-attention;
- a layer with a sliding window, but for long prompts on a GPU (more than four windows), which go through the kernels that
  skip what is before the window, with every block in high precision;
- dropout in training;
- K and V of different head dims (multi-head latent attention), and a head dim that the kernels do not have;
- K or V that a model changes after it has put them into a ThriftCache (differential attention);
- any other mask: packed sequences, prefix-LM, image tokens, a 4D mask given by the caller, and padding between tokens
  (which a ThriftCache leaves out, so that with one it is served too).

Of the calls that thrift serves, those of short sequences are attended exactly where that has been measured to be faster
(`thrift_attn.dispatch.serve`); the report says ``exact``.

Learned sinks (``s_aux``, gpt-oss) are served: a logit without a value is one more term in the sum of the softmax. SDPA has
neither sinks nor softcap: layers off the rule that need them (sliding layers of gpt-oss, Gemma 2) are computed by a plain
softmax, and the report says ``eager``. A call with tensors that neither path knows raises. `report` names the
path and the reason of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thrift_attn.config import DECODE_ROWS, ThriftConfig, fraction
from thrift_attn.dispatch import HEAD_DIMS
from thrift_attn.stats import Stats
from thrift_attn.transformers.dense import attend_masked, autocast_dtype
from thrift_attn.transformers.fallback import attend_exactly
from thrift_attn.transformers.layer_state import hides_causality, state_of
from thrift_attn.transformers.lazy_kv import Cached, pending_of, widened
from thrift_attn.transformers.masks import check_slots, has_holes, only_indexed, plain_mask

_HARMLESS = {"position_ids", "cache_position", "token_type_ids", "mm_token_type_ids", "num_items_in_batch"}


@torch.compiler.disable
def thrift_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: by thrift, or by SDPA under the rule of this module.

    Args:
        module: the attention layer; it carries its configuration after `enable`.
        query: ``[B, Hq, Tq, D]``.
        key: ``[B, Hkv, Tk, D]``.
        value: ``[B, Hkv, Tk, Dv]``.
        attention_mask: what `thrift_mask` returned, or a 4D mask of the caller.
        scaling: factor of the logits; 1/sqrt(D) by default.
        dropout: probability; above 0 the call goes to SDPA.
        is_causal: overrides ``module.is_causal``.
        sliding_window: the window of the layer, if it has one.
        softcap: logits become softcap * tanh(logits / softcap).
        s_aux: ``[Hq]``, logits of attention sinks.
        indices: int ``[B, Tq, k]``, the slots that each query sees (DeepSeek's sparse attention), with a 4D mask.
        **kwargs: what other implementations need.

    Returns:
        The output ``[B, Tq, Hq, Dv]``, 0 for padded queries of layers served by thrift, and None for the weights.

    Raises:
        NotImplementedError: attention weights asked for, tensors of an unknown meaning (position biases, packed lengths,
            indices without a 4D mask), continuous batching, gradients.
    """
    pending = pending_of(key, value)
    try:
        _check_extras(module, attention_mask, kwargs)
        if (attention_mask is None or attention_mask.ndim == 2) and hides_causality(module):
            raise NotImplementedError(
                f"{type(module).__name__} says that it is not causal, and was given no mask that says more: use eager attention"
            )
        mask, window = plain_mask(attention_mask)
        check_slots(mask, key.shape[2])
        if indices is not None:
            mask = attention_mask = only_indexed(attention_mask, indices, key.shape[2])
            window = None
        dtype = autocast_dtype(query.device)
        query = query if dtype is None else query.to(dtype)
        state = state_of(module)
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", None)
        reason = _off_the_rule(state.config, causal, dropout, query, key, value, mask, s_aux)
        if reason is None and (window or sliding_window) and not _window_pays(query, key, window):
            reason = f"sliding window of {window or sliding_window}"
        options = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "backend": state.backend}
        counted = state.counts(query.device)
        if pending is not None:
            layer = pending.layer
            layer.state = state
            tokens = mask if mask is not None and mask.ndim == 2 else None
            reason = reason or ("sliding window over pages" if window else layer.why_not(pending, query, tokens))
            if reason is None:
                out, stats, served = layer.attend(pending, query, tokens, counted=counted, **options)
                if served is None:
                    state.count("thrift", "causal, cached", stats)
                else:
                    state.count_thrift(served, "causal, cached", stats)
                return out.transpose(1, 2).contiguous(), None
            key, value = layer.full(pending, tokens)
        elif isinstance(key, Cached) or isinstance(value, Cached):
            reason = reason or "K or V is not what the cache was given"
            key, value = widened(key), widened(value)
        elif reason is None and mask is not None and has_holes(mask):
            reason = "the mask is not causal with padding at the ends"
        if dtype is not None:
            key, value = key.to(dtype), value.to(dtype)
        if reason is None:
            config = state.config
            if window is not None and config is not None:
                config = config.with_(budget=fraction(1.0))
            out, stats, served = attend_masked(
                query, key, value, mask, counted, config=config, window=window, **options
            )
            state.count_thrift(served, "causal" if window is None else f"sliding window of {window}", stats)
            return out.transpose(1, 2).contiguous(), None
    except BaseException:
        if pending is not None:
            pending.layer.drop(pending)
        raise
    out, served_by, lacks = attend_exactly(
        module,
        query,
        key,
        value,
        attention_mask,
        causal=causal is not False,  # as SDPA does
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
    )
    state.count(served_by, f"{reason}; SDPA has no {lacks}" if lacks else reason, Stats())
    return out, None


def _window_pays(query: Tensor, key: Tensor, window: int | None) -> bool:
    """Whether a layer with a sliding window goes to the kernels, which skip what is before it; SDPA computes all pairs.

    Long prompts on a GPU, where at least three of four pairs are skipped; never without a mask that says so.
    """
    return window is not None and query.is_cuda and query.shape[2] > DECODE_ROWS and key.shape[2] >= 4 * window


def _off_the_rule(
    config: ThriftConfig | None,
    causal: bool | None,
    dropout: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> str | None:
    """Why thrift does not serve a call, None if it may; whether a 2D mask has holes is for later."""
    if config is None:
        return "left out by enable(layers=...)"
    if not causal:
        return "not causal" if causal is not None else "does not say that it is causal"
    if sinks is not None and sinks.shape != query.shape[1:2]:
        return f"sinks of shape {list(sinks.shape)}"
    if dropout > 0:
        return "dropout in training"
    if value.shape[-1] != key.shape[-1]:
        return f"head dims of K and V differ, {key.shape[-1]} and {value.shape[-1]}"
    if key.shape[-1] > max(HEAD_DIMS) or (key.is_cuda and key.shape[-1] not in HEAD_DIMS):
        return f"head dim {key.shape[-1]}, for which there are no kernels"
    if mask is not None and mask.ndim == 4:
        return "the mask is not causal with padding at the ends"
    return None


def _check_extras(module: nn.Module, mask: object, kwargs: Mapping[str, Any]) -> None:
    """Refuse what would change the result and is not known here."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        got = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(f"thrift attention takes a mask of 2 or 4 dimensions, got {got}")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("thrift attention has no attention weights: output_attentions needs 'eager'")
    if kwargs.get("cache") is not None:
        raise NotImplementedError("thrift attention does not serve continuous batching, which passes its paged cache")
    unknown = sorted(name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in _HARMLESS)
    if unknown:
        raise NotImplementedError(
            f"thrift attention does not know what {type(module).__name__} passes to its attention: {', '.join(unknown)}"
        )
