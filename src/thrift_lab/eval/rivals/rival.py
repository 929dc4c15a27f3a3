"""What a rival has to say: how it attends, what it stores, what it reads, what it multiplies.

Shapes: H query heads, Hkv KV heads, Tq new tokens at the end of Tk, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from thrift_attn.stats import Stats


class Cost(NamedTuple):
    """What a method costs, dense 16-bit attention being 1.

    Args:
        prefill: multiplications, each divided by the rate of the tensor cores for its operands (Blackwell).
        stored: bytes of the KV cache.
        read: bytes of it that one step of decode reads.
    """

    prefill: float
    stored: float
    read: float


@dataclass(frozen=True)
class Rival(ABC):
    """Causal attention of one sequence by somebody else's rule; its options are the fields of the dataclass."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int) -> tuple[Tensor, Stats | None]:
        """Attend, and count what went through a better path, if there is one.

        Args:
            q: ``[H, Tq, D]``.
            k: ``[Hkv, Tk, D]``; queries are right-aligned with the keys.
            v: the shape of ``k``.
            scale: factor of the logits.
            prompt: tokens of the prompt that the sequence began with; Tk where this call is the prompt.

        Returns:
            The output ``[H, Tq, D]`` in the dtype of ``q``, and statistics, or None.
        """

    @abstractmethod
    def cost(self, head_dim: int, tokens: int, share: float | None) -> Cost:
        """What it costs at a length.

        Args:
            head_dim: D.
            tokens: in the cache.
            share: of the blocks that went through the better path; None where there is none.
        """


def check_rate(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless a number lies in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
