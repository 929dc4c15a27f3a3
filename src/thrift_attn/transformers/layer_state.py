"""What is kept on the modules of a model: what an attention layer computes, and what it has done so far."""

from __future__ import annotations

import inspect
import sys
import weakref
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from thrift_attn.config import ThriftConfig
from thrift_attn.dispatch import Served
from thrift_attn.stats import Stats

NAME = "thrift"
"""The name to give as ``attn_implementation``."""

ServedBy = Literal["thrift", "exact", "sdpa", "eager"]
"""Exact: by thrift's choice, since it is faster (`thrift_attn.dispatch.serve`); SDPA and eager: what thrift does not serve."""

_LAYER = "_thrift_layer"  # attribute on attention modules


@dataclass
class Tally:
    """Calls of one kind.

    Args:
        calls: their number.
        stats: their statistics added up.
    """

    calls: int = 0
    stats: Stats = field(default_factory=Stats)


@dataclass
class LayerState:
    """What an attention module needs to know, and what it has done since `enable`.

    Args:
        config: what is computed; None: left to SDPA.
        backend: for `thrift_attn.attention`.
        stats: whether to count what is promoted; None: on a CPU.
        tallies: calls by who served them and why.
        model: the model that the module is part of; copies do not know it.
    """

    config: ThriftConfig | None
    backend: str = "auto"
    stats: bool | None = None
    tallies: dict[tuple[ServedBy, str], Tally] = field(default_factory=dict)
    model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None}

    def layers_of_model(self) -> frozenset[int] | None:
        """The numbers of the attention layers that the model has now; None if that is not known."""
        model = None if self.model is None else self.model()
        if model is None:
            return None
        return frozenset(index for m in model.modules() if dispatches(m) and (index := layer_idx(m)) is not None)

    def counts(self, device: torch.device) -> bool:
        """Whether a call on this device counts what it promotes."""
        return device.type == "cpu" if self.stats is None else self.stats

    def count_thrift(self, served: Served, reason: str, stats: Stats) -> None:
        """Note one call of `thrift_attn.interface.attend`."""
        if served.by == "exact":
            self.count("exact", f"{reason}; {served.why}", stats)
        else:
            self.count("thrift", f"{reason}; {served.why}" if served.why else reason, stats)

    def count(self, served_by: ServedBy, reason: str, stats: Stats) -> None:
        """Note one call."""
        tally = self.tallies.setdefault((served_by, reason), Tally())
        tally.calls += 1
        tally.stats += stats


def state_of(module: nn.Module) -> LayerState:
    """The state of an attention module; one with the default configuration is made for a module without."""
    return vars(module).setdefault(_LAYER, LayerState(ThriftConfig()))


def find_state(module: nn.Module) -> LayerState | None:
    """The state of a module, if it has one."""
    return vars(module).get(_LAYER)


def set_state(module: nn.Module, state: LayerState | None) -> None:
    """Give a module a state, or take it away."""
    if state is None:
        vars(module).pop(_LAYER, None)
    else:
        vars(module)[_LAYER] = state


def layer_idx(module: nn.Module) -> int | None:
    """The number that transformers gives an attention layer."""
    index = vars(module).get("layer_idx")
    return index if isinstance(index, int) else None


def dispatches(module: nn.Module) -> bool:
    """Whether the forward of a module looks up transformers' table of attention functions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def hides_causality(module: nn.Module) -> bool:
    """Whether a module is of a decoder, says that it is not causal, and transformers runs its model with eager attention only.

    Eager attention always gets a mask, and looks at nothing else. BigBird-Pegasus, PEGASUS-X and Informer do so.
    """
    flags = vars(module)
    return flags.get("is_decoder") is True and flags.get("is_causal") is False and _is_eager_only(type(module))


@lru_cache(maxsize=256)
def _is_eager_only(kind: type[nn.Module]) -> bool:
    """Whether no model in the file of a module runs with SDPA."""
    classes = vars(sys.modules[kind.__module__]).values()
    own = [c for c in classes if isinstance(c, type) and c.__module__ == kind.__module__]
    return not any(getattr(c, "_supports_sdpa", False) for c in own)


def implementation(model: nn.Module) -> str | None:
    """The ``attn_implementation`` of a model."""
    return getattr(model.config, "_attn_implementation", None)


def check_model(model: object) -> None:
    """Raise TypeError for anything else than a transformers model."""
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")


def check_enabled(model: nn.Module) -> None:
    """Raise TypeError for anything else than a transformers model, ValueError for one that does not use thrift."""
    check_model(model)
    if implementation(model) != NAME:
        raise ValueError(f"the model does not use thrift attention but {implementation(model)!r}")
