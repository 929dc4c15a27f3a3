"""``attn_implementation="thrift"`` for decoder-only models of transformers 5.

    from thrift_attn.transformers.attention_function import disable, enable, report

    enable(model, ThriftConfig(budget=fraction(0.05)))
    model.generate(...)
    print(report(model))
    disable(model)

or, with the default configuration: ``register()`` and ``from_pretrained(..., attn_implementation="thrift")``. With
``past_key_values=ThriftCache(model.config, max_tokens=...)`` K and V are also stored in 4 bits, see
`thrift_attn.transformers.thrift_cache`; that cache's configurations then say what is computed.

The rule. A call of an attention layer is served by thrift when its mask is causal, with padding only before and after
the tokens of a row. The others are computed in the dtype of the model by PyTorch's SDPA:

- a layer left out by ``enable(layers=...)``;
- attention that is not causal: encoders, cross-attention;
- a layer with a sliding window, whatever the length of the input;
- attention sinks (``s_aux``, gpt-oss);
- dropout in training;
- K and V of different head dims (multi-head latent attention);
- any other mask: packed sequences, prefix-LM, image tokens, a 4D mask given by the caller, and padding between tokens
  (which a ThriftCache leaves out, so that with one it is served too).

SDPA has neither softcap nor sinks: layers off the rule that need them (sliding layers of Gemma-2, gpt-oss) are computed
by a plain softmax here, and the report says ``eager``. A call with tensors that neither path knows raises. `report`
names the path and the reason of every layer.

Inference only. Not traceable by torch.compile: `enable` keeps ``generate`` from compiling the model for a static cache
on GPU; without `enable`, pass it ``disable_compile=True``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thrift_attn.config import ThriftConfig
from thrift_attn.stats import Stats

try:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, eager_mask

    import transformers
    from thrift_attn.transformers.lazy_kv import Cached, with_stats
    from thrift_attn.transformers.thrift_cache import ThriftCache
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError('this integration needs transformers >= 5.0: pip install "thrift-attn[hf]"') from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"this integration needs transformers >= 5.0, got {transformers.__version__}")

__all__ = ["ThriftCache", "disable", "enable", "register", "report"]

NAME = "thrift"
"""The name to give as ``attn_implementation``."""

ServedBy = Literal["thrift", "sdpa", "eager"]
LayerConfigs = Mapping[int, ThriftConfig | None] | Callable[[int], ThriftConfig | None]

_LAYER, _MODEL = "_thrift_layer", "_thrift_model"  # attributes on attention modules and on the model
_RUNS = "_thrift_runs"  # attribute on 2D masks
_HARMLESS = {"position_ids", "cache_position", "token_type_ids", "mm_token_type_ids", "num_items_in_batch"}
_EAGER_QUERIES = 512  # queries at a time where SDPA cannot compute a layer


# -- what is kept on a model ------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    calls: int = 0
    stats: Stats = field(default_factory=Stats)


@dataclass
class _Layer:
    """What an attention module needs to know, and what it has done since `enable`."""

    config: ThriftConfig | None  # None: left to SDPA
    backend: str = "auto"
    stats: bool | None = None
    tallies: dict[tuple[ServedBy, str], _Tally] = field(default_factory=dict)

    def counts(self, device: torch.device) -> bool:
        """Whether a call on this device counts what it promotes."""
        return device.type == "cpu" if self.stats is None else self.stats

    def count(self, served_by: ServedBy, reason: str, stats: Stats) -> None:
        tally = self.tallies.setdefault((served_by, reason), _Tally())
        tally.calls += 1
        tally.stats += stats


@dataclass(frozen=True)
class _Enabled:
    """What `disable` restores."""

    implementations: dict[str, str] | None
    disable_compile: bool | None


@dataclass(frozen=True)
class LayerRow:
    """One way in which one attention layer was computed.

    Args:
        layer: its ``layer_idx``; None if it has none.
        name: dotted name of the module in the model.
        served_by: ``"thrift"``, ``"sdpa"``, ``"eager"``, or None before the first call.
        reason: why.
        calls: number of calls since `enable`.
        stats: their statistics added up, all zero if not served by thrift or not counted (see `enable`).
    """

    layer: int | None
    name: str
    served_by: ServedBy | None
    reason: str
    calls: int = 0
    stats: Stats = field(default_factory=Stats)


class Report(list[LayerRow]):
    """Rows of `report`; ``print`` shows them as a table."""

    @property
    def stats(self) -> Stats:
        """Statistics of all layers added up."""
        return sum((row.stats for row in self), Stats())

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("layer", "module", "served by", "calls", "promoted", "high mass", "reason"),
        ]
        for row in self:
            counted = row.stats.visible > 0
            table.append(
                (
                    "-" if row.layer is None else str(row.layer),
                    row.name,
                    row.served_by or "-",
                    str(row.calls),
                    f"{row.stats.share:.2%}" if counted else "-",
                    f"{row.stats.high_mass:.2%}" if counted else "-",
                    row.reason,
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


# -- what a user calls ------------------------------------------------------------------------------------------------


def register() -> None:
    """Make ``attn_implementation="thrift"`` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, thrift_attention)
    AttentionMaskInterface.register(NAME, thrift_mask)


def enable(
    model: nn.Module,
    config: ThriftConfig = ThriftConfig(),  # noqa: B008 (frozen, so sharing the default is safe)
    *,
    layers: LayerConfigs | None = None,
    backend: str = "auto",
    stats: bool | None = None,
) -> None:
    """Switch a model to thrift attention; a second call changes the configuration and starts the statistics again.

    Args:
        model: a transformers model.
        config: what is computed in every layer.
        layers: what is computed in single layers: a mapping from ``layer_idx`` (others get ``config``) or a function of
            it; None leaves the layer to SDPA.
        backend: passed on to `thrift_attn.attention`.
        stats: whether `report` tells what was promoted. On a GPU that takes time (numbers are copied to the host, and the
            fastest kernel does not work them out); None counts on a CPU only.

    Raises:
        TypeError: something else than a transformers model, or than a configuration.
        ValueError: ``layers`` names a layer that the model does not have.
        NotImplementedError: the model does not dispatch its attention through transformers' AttentionInterface.
    """
    _check_model(model)
    modules = dict(model.named_modules())
    known = {_layer_idx(m) for m in modules.values() if _dispatches(m)} - {None}
    if isinstance(layers, Mapping) and (unknown := set(layers) - known):
        raise ValueError(f"layers must name attention layers of the model, {_span(known)}, got {sorted(unknown)}")
    states: list[tuple[nn.Module, _Layer]] = []
    for module in modules.values():
        index = _layer_idx(module)
        chosen = config
        if layers is not None and index is not None:
            chosen = layers.get(index, config) if isinstance(layers, Mapping) else layers(index)
        if chosen is not None and not isinstance(chosen, ThriftConfig):
            raise TypeError(f"config must be a ThriftConfig, got {type(chosen).__name__}")
        states.append((module, _Layer(chosen, backend, stats)))

    register()
    enabled = vars(model).get(_MODEL) or _snapshot(model)
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    if _implementation(model) != NAME:
        raise NotImplementedError(
            f"{type(model).__name__} does not dispatch its attention through transformers' AttentionInterface"
        )
    vars(model)[_MODEL] = enabled
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.disable_compile = True
    for module, state in states:
        # Every module gets one: which of them call the attention is known for sure only when they do.
        vars(module)[_LAYER] = state


def disable(model: nn.Module) -> None:
    """Restore the attention that a model had before `enable`, and forget the statistics.

    A model that was loaded with ``attn_implementation="thrift"`` goes to the default of transformers.

    Raises:
        TypeError: something else than a transformers model.
        ValueError: the model does not use thrift.
    """
    _check_enabled(model)
    enabled = vars(model).pop(_MODEL, None) or _snapshot(model)
    model.set_attn_implementation(enabled.implementations)  # pyright: ignore[reportCallIssue]
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.disable_compile = enabled.disable_compile
    for module in model.modules():
        vars(module).pop(_LAYER, None)


def report(model: nn.Module) -> Report:
    """How every attention layer of a model was computed since `enable`.

    Returns:
        A list of `LayerRow` in the order of the layers, one for each path and reason; ``print`` shows a table.

    Raises:
        TypeError: something else than a transformers model.
        ValueError: the model does not use thrift.
    """
    _check_enabled(model)
    rows = Report()
    for name, module in model.named_modules():
        layer: _Layer | None = vars(module).get(_LAYER)
        for (served_by, reason), tally in (layer.tallies if layer else {}).items():
            rows.append(LayerRow(_layer_idx(module), name, served_by, reason, tally.calls, tally.stats))
        if _dispatches(module) and not (layer and layer.tallies):
            rows.append(LayerRow(_layer_idx(module), name, None, "not called yet"))
    return rows


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")


def _check_enabled(model: nn.Module) -> None:
    _check_model(model)
    if _implementation(model) != NAME:
        raise ValueError(f"the model does not use thrift attention but {_implementation(model)!r}")


def _implementation(model: nn.Module) -> str | None:
    return getattr(model.config, "_attn_implementation", None)


def _snapshot(model: nn.Module) -> _Enabled:
    """The implementation of a model and its sub-models; None, the default, if it was loaded with thrift."""
    generation = getattr(model, "generation_config", None)
    disable_compile = getattr(generation, "disable_compile", None)
    if _implementation(model) == NAME:
        return _Enabled(None, disable_compile)
    config: Any = model.config
    current = {"": config._attn_implementation}
    for key in config.sub_configs:
        if (sub := getattr(config, key, None)) is not None:
            current[key] = sub._attn_implementation
    return _Enabled(current, disable_compile)


def _layer_idx(module: nn.Module) -> int | None:
    index = vars(module).get("layer_idx")
    return index if isinstance(index, int) else None


def _dispatches(module: nn.Module) -> bool:
    """Whether the forward of a module looks up transformers' table of attention functions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _span(layers: set[int | None]) -> str:
    numbers = sorted(index for index in layers if index is not None)
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"


# -- what transformers calls ------------------------------------------------------------------------------------------


@torch.compiler.disable
def thrift_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one type of layers, in the form that tells `thrift_attention` what it is.

    Args:
        batch_size: B.
        kv_length: number of key slots, more than are written so far with a static cache.
        kv_offset: position of the first key slot.
        mask_function: the pattern; causal alone, or one that goes to SDPA.
        attention_mask: bool ``[B, positions]``, True at tokens.
        **kwargs: the position of the queries, ``cache_position`` in transformers 5.0, ``q_length`` and ``q_offset``
            later, and what is of no concern here.

    Returns:
        None: causal, keys and queries end together and all are tokens. Bool ``[B, S]``: causal, the last query is in
        slot S - 1, True at tokens. Float ``[B, 1, Tq, kv_length]``, added to the logits: anything else.

    Raises:
        ValueError: an attention mask that ends before the last query.
    """
    if mask_function is causal_mask_function:
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
        return tokens
    kwargs["allow_is_bidirectional_skip"] = False  # None has one meaning only
    # The additive form: SDPA takes it, and models that extend their masks all know it.
    return eager_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


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
        **kwargs: what other implementations need.

    Returns:
        The output ``[B, Tq, Hq, Dv]``, 0 for padded queries of layers served by thrift, and None for the weights.

    Raises:
        NotImplementedError: attention weights asked for, tensors of an unknown meaning (position biases, packed lengths,
            indices of sparse attention), continuous batching, gradients.
    """
    _check_extras(module, attention_mask, kwargs)
    layer: _Layer = vars(module).setdefault(_LAYER, _Layer(ThriftConfig()))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", None)
    config, reason = layer.config, None
    if config is None:
        reason = "left out by enable(layers=...)"
    elif not causal:
        reason = "not causal" if causal is not None else "does not say that it is causal"
    elif sliding_window is not None:
        reason = f"sliding window of {sliding_window}"
    elif s_aux is not None:
        reason = "attention sinks"
    elif dropout > 0:
        reason = "dropout in training"
    elif value.shape[-1] != key.shape[-1]:
        reason = f"head dims of K and V differ, {key.shape[-1]} and {value.shape[-1]}"
    elif attention_mask is not None and attention_mask.ndim == 4:
        reason = "the mask is not causal with padding at the ends"
    if isinstance(key, Cached):
        tokens = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if reason is None:
            counted = layer.counts(query.device)
            found = key.step.attend(
                query, tokens, scale=scaling, softcap=softcap, backend=layer.backend, counted=counted
            )
            if found is not None:
                layer.count("thrift", "causal, cached", found[1])
                return found[0].transpose(1, 2).contiguous(), None
            reason = "the mask hides tokens that the cache holds"
        key, value = key.step.full(tokens)
    elif reason is None and attention_mask is not None:
        runs = getattr(attention_mask, _RUNS, None)
        if (_count_runs(attention_mask) if runs is None else runs) > 1:
            reason = "the mask is not causal with padding at the ends"
    if config is not None and reason is None:
        counted = layer.counts(query.device)
        out, stats = _serve(query, key, value, attention_mask, config, layer.backend, scaling, softcap, counted)
        layer.count("thrift", "causal", stats)
        return out.transpose(1, 2).contiguous(), None

    assert reason is not None  # one of the two is set
    causal = causal is not False  # as SDPA does
    lacks = " and ".join(["softcap"] * (softcap is not None) + ["sinks"] * (s_aux is not None))
    mask = attention_mask
    if mask is not None and mask.ndim == 2:
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    implied = mask is None and not lacks and query.shape[2] in (1, key.shape[2])  # SDPA's is_causal is enough
    if causal and not implied and (mask is None or mask.ndim == 2):
        mask = _causal_mask(query, key, mask)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    if not lacks:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal
        )
        layer.count("sdpa", reason, Stats())
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _softmax_attention(query, key, value, mask, scale, softcap, s_aux, dropout).transpose(1, 2).contiguous()
        layer.count("eager", f"{reason}; SDPA has no {lacks}", Stats())
    return out, None


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


def _serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    config: ThriftConfig,
    backend: str,
    scale: float | None,
    softcap: float | None,
    counted: bool,
) -> tuple[Tensor, Stats]:
    """Thrift attention ``[B, Hq, Tq, D]`` under None or a 2D mask of `thrift_mask`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Stats]:
        options: dict[str, Any] = {"config": config, "scale": scale, "softcap": softcap, "backend": backend}
        return with_stats(q, k, v, counted, kv_lengths=lengths, **options)

    if mask is None:
        return attend(query, key, value, None)
    if mask.shape[0] != key.shape[0] or not query.shape[2] <= mask.shape[1] <= key.shape[2]:
        raise ValueError(f"mask {list(mask.shape)} does not fit q {list(query.shape)} and k {list(key.shape)}")
    mask = mask.to(key.device)
    key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    if bool(mask.all()):
        return attend(query, key, value, None)
    # Tokens of a row are one run. KV blocks count from its first token, queries are aligned with its last.
    lengths, before = mask.sum(-1), mask.int().argmax(-1)
    after = mask.shape[1] - before - lengths
    out, stats = attend(_roll(query, -after), _roll(key, before), _roll(value, before), lengths.clamp(min=1))
    is_token = mask[:, -query.shape[2] :]
    return _roll(out, after).masked_fill(~is_token[:, None, :, None], 0), stats


def _roll(x: Tensor, shifts: Tensor) -> Tensor:
    """Roll the tokens of each row of ``[B, H, T, D]`` to the left by ``shifts`` ``[B]``."""
    index = (torch.arange(x.shape[2], device=x.device) + shifts[:, None]) % x.shape[2]  # [B, T]
    return x.gather(2, index[:, None, :, None].expand_as(x))


def _causal_mask(query: Tensor, key: Tensor, tokens: Tensor | None) -> Tensor:
    """Bool ``[B or 1, 1, Tq, Tk]`` for queries that end with the keys; ``tokens`` ``[B, Tk]`` is False at padding."""
    slots = torch.arange(key.shape[2], device=key.device)
    mask = (slots <= slots[-query.shape[2] :, None])[None, None]
    return mask if tokens is None else mask & tokens.to(key.device)[:, None, None]


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention as it is defined, ``[B, Hq, Tq, Dv]``, for what SDPA lacks; some queries at a time to save memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outs: list[Tensor] = []
    for start in range(0, query.shape[2], _EAGER_QUERIES):
        rows = slice(start, start + _EAGER_QUERIES)
        logits = (query[:, :, rows] @ key.mT).float() * scale
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        if mask is not None:
            part = mask[..., rows, :]
            if part.dtype == torch.bool:
                part = torch.where(part, 0.0, torch.finfo(logits.dtype).min)
            logits = logits + part
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        p = torch.nn.functional.dropout(logits.softmax(-1)[..., : key.shape[2]], dropout)
        outs.append(p.to(value.dtype) @ value)
    return torch.cat(outs, 2)
