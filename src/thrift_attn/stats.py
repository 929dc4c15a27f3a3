"""What a call promoted, so that a budget can be checked against what was spent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Counts of one or more calls; add them up with ``+``.

    Args:
        visible: (query head, query block, KV block) pairs that hold at least one visible key.
        promoted: those of them computed in high precision.
        asked: pairs the budget asked for, before rounding to whole blocks.
        mass: softmax mass that went through the high-precision path, summed over rows.
        rows: (query head, query) rows that see at least one key.
        exact: visible pairs of sequences that were attended exactly as a whole, since that is faster (``exact_below`` of
            `ThriftConfig`); they count as promoted, and say nothing about the quality of a budget.
    """

    visible: int = 0
    promoted: int = 0
    asked: float = 0.0
    mass: float = 0.0
    rows: int = 0
    exact: int = 0

    @property
    def share(self) -> float:
        """Share of the visible pairs that was promoted."""
        return self.promoted / self.visible if self.visible else 0.0

    @property
    def asked_share(self) -> float:
        """Share of the visible pairs that the budget asked for."""
        return self.asked / self.visible if self.visible else 0.0

    @property
    def high_mass(self) -> float:
        """Mean share of a row's softmax mass that went through the high-precision path; the rest took the low path."""
        return self.mass / self.rows if self.rows else 0.0

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.visible + other.visible,
            self.promoted + other.promoted,
            self.asked + other.asked,
            self.mass + other.mass,
            self.rows + other.rows,
            self.exact + other.exact,
        )
