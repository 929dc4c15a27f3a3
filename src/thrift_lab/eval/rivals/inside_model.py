"""A rival inside a model, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thrift_attn.stats import Stats
from thrift_lab.eval.rivals.rival import Rival

_NAME = "thrift-eval-rival"


@dataclass
class Tally:
    """What a rival has done in a model: statistics, and the tokens of the prompt by layer."""

    stats: Stats | None = None
    prompts: dict[Any, int] = field(default_factory=dict)
    calls: int = 0

    def add(self, stats: Stats | None) -> None:
        """Count one call of one layer."""
        self.calls += 1
        if stats is not None:
            self.stats = stats if self.stats is None else self.stats + stats


@contextmanager
def attending(model: Any, rival: Rival) -> Iterator[Tally]:
    """The model with a rival's attention inside the block, its own outside.

    Every call has to be causal attention of whole sequences: no padding, no window, no softcap, no sinks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    tally = Tally()

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        _check(module, key, value, mask, options)
        index, tokens = getattr(module, "layer_idx", None), key.shape[2]
        if query.shape[2] == tokens:
            tally.prompts[index] = tokens
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        rows = []
        with torch.no_grad():
            for q, k, v in zip(query, key, value, strict=True):
                out, stats = rival.attend(q, k, v, scale, tally.prompts.get(index, tokens))
                tally.add(stats)
                rows.append(out.to(query.dtype))
        return torch.stack(rows).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, forward)
    AttentionMaskInterface.register(_NAME, _no_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield tally
    finally:
        model.set_attn_implementation(before)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """A mask is never made: rivals are causal.

    Raises:
        NotImplementedError: padding.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError("rivals attend to whole sequences: padding was given")


def _check(module: Any, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]) -> None:
    """Raise NotImplementedError for what no rival computes."""
    wrong = [name for name in ("sliding_window", "softcap", "s_aux") if options.get(name) is not None]
    if mask is not None:
        wrong.append("a mask")
    if options.get("is_causal", getattr(module, "is_causal", True)) is False:
        wrong.append("attention that is not causal")
    if key.shape[-1] != value.shape[-1]:
        wrong.append(f"head dims of K and V that differ, {key.shape[-1]} and {value.shape[-1]}")
    if wrong:
        raise NotImplementedError(
            f"rivals compute plain causal attention; {type(module).__name__} has {', '.join(wrong)}"
        )
