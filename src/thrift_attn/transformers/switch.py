"""Switching a model to thrift attention and back: `enable`, `disable`, `register`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import transformers
from thrift_attn.checks import check_flag
from thrift_attn.config import Backend, ThriftConfig, check_choice
from thrift_attn.transformers.attention_function import thrift_attention
from thrift_attn.transformers.layer_state import (
    NAME,
    LayerState,
    check_enabled,
    check_model,
    dispatches,
    hides_causality,
    implementation,
    layer_idx,
    set_state,
)
from thrift_attn.transformers.masks import thrift_mask
from thrift_attn.transformers.versions import RANGE, SUPPORTED, VERSION
from transformers import AttentionInterface, AttentionMaskInterface

LayerConfigs = Mapping[int, ThriftConfig | None] | Callable[[int], ThriftConfig | None]

_MODEL = "_thrift_model"  # attribute on the model


@dataclass(frozen=True)
class _Enabled:
    """What `disable` restores."""

    implementations: dict[str, str] | None
    disable_compile: bool | None


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
        ValueError: ``layers`` names a layer that the model does not have, or an unknown backend.
        NotImplementedError: the model does not dispatch its attention through transformers' AttentionInterface.
    """
    check_model(model)
    if not isinstance(config, ThriftConfig):
        raise TypeError(
            f"config must be a ThriftConfig, got {type(config).__name__}; layers= leaves single layers to SDPA"
        )
    check_choice("backend", backend, Backend)
    if not (layers is None or isinstance(layers, Mapping) or callable(layers)):
        raise TypeError(f"layers must be a mapping from layer_idx, or a function of it, got {type(layers).__name__}")
    if stats is not None:
        check_flag("stats", stats)
    if SUPPORTED[1] < VERSION:
        warnings.warn(f"thrift is tested with transformers {RANGE}, not with {transformers.__version__}", stacklevel=2)
    modules = dict(model.named_modules())
    known = {layer_idx(m) for m in modules.values() if dispatches(m)} - {None}
    if isinstance(layers, Mapping) and (unknown := set(layers) - known):
        raise ValueError(f"layers must name attention layers of the model, {_span(known)}, got {sorted(unknown)}")
    for name, module in modules.items():
        if hides_causality(module):
            raise NotImplementedError(
                f"{type(model).__name__} says that {name} is not causal and leaves it to a mask that only eager attention gets"
            )
    states: list[tuple[nn.Module, LayerState]] = []
    for module in modules.values():
        index = layer_idx(module)
        chosen = config
        if layers is not None and index is not None:
            chosen = layers.get(index, config) if isinstance(layers, Mapping) else layers(index)
        if chosen is not None and not isinstance(chosen, ThriftConfig):
            raise TypeError(f"layer {index} must have a ThriftConfig or None, got {type(chosen).__name__}")
        states.append((module, LayerState(chosen, backend, stats, model=weakref.ref(model))))

    register()
    enabled = vars(model).get(_MODEL) or _snapshot(model)
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    if implementation(model) != NAME:
        raise NotImplementedError(
            f"{type(model).__name__} does not dispatch its attention through transformers' AttentionInterface"
        )
    vars(model)[_MODEL] = enabled
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.disable_compile = True
    for module, state in states:
        # Every module gets one: which of them call the attention is known for sure only when they do.
        set_state(module, state)


def disable(model: nn.Module) -> None:
    """Restore the attention that a model had before `enable`, and forget the statistics.

    A model that was loaded with ``attn_implementation="thrift"`` goes to the default of transformers.

    Args:
        model: a transformers model that uses thrift.

    Raises:
        TypeError: something else than a transformers model.
        ValueError: the model does not use thrift.
    """
    check_enabled(model)
    enabled = vars(model).pop(_MODEL, None) or _snapshot(model)
    model.set_attn_implementation(enabled.implementations)  # pyright: ignore[reportCallIssue]
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.disable_compile = enabled.disable_compile
    for module in model.modules():
        set_state(module, None)


def _snapshot(model: nn.Module) -> _Enabled:
    """The implementation of a model and its sub-models; None, the default, if it was loaded with thrift."""
    generation = getattr(model, "generation_config", None)
    disable_compile = getattr(generation, "disable_compile", None)
    if implementation(model) == NAME:
        return _Enabled(None, disable_compile)
    config: Any = model.config
    current = {"": config._attn_implementation}
    for key in config.sub_configs:
        if (sub := getattr(config, key, None)) is not None:
            current[key] = sub._attn_implementation
    return _Enabled(current, disable_compile)


def _span(layers: set[int | None]) -> str:
    numbers = sorted(index for index in layers if index is not None)
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
