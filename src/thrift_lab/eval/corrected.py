"""Intervals that hold for all rows of a table at once: 25 languages or 13 tasks are 25 or 13 chances to be wrong.

The interval of one of m rows has the level 1 - 0.05 / m (Bonferroni), from the spread of paired bootstrap means: with m tests
the ends lie too far out to be read off the resamples themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from thrift_lab.eval.bootstrap import LEVEL, draws

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A mean paired difference.

    Args:
        mean: over all units.
        low: lower end of the interval; None for fewer than two units.
        high: upper end.
        units: how many.
    """

    mean: float
    low: float | None
    high: float | None
    units: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.low is None else f" [{self.low:+.4f}, {self.high:+.4f}]")


def difference(
    gaps: Floats, sizes: Floats | None = None, *, tests: int = 1, groups: list[int] | None = None
) -> Difference:
    """Mean of paired differences with an interval that is one of ``tests``.

    Args:
        gaps: sums of differences of each unit.
        sizes: what each unit counts; None: one each.
        tests: rows of the table.
        groups: units of each group, in order: resampled within their group, so that a pooled mean keeps its tasks.

    Raises:
        ValueError: no unit, or groups that are not all units.
    """
    weights = np.ones(len(gaps)) if sizes is None else sizes
    parts = [len(gaps)] if groups is None else groups
    if not len(gaps) or sum(parts) != len(gaps):
        raise ValueError(f"expected differences in groups {parts}, got {len(gaps)}")
    mean = float(gaps.sum() / weights.sum())
    if min(parts) < 2:
        return Difference(mean, None, None, len(gaps))
    drawn = np.concatenate([draws(size, seed=at) for at, size in enumerate(parts)], 1)
    spread = float(((drawn @ gaps) / (drawn @ weights)).std())
    reach = NormalDist().inv_cdf(1 - (1 - LEVEL) / (2 * tests)) * spread
    return Difference(mean, mean - reach, mean + reach, len(gaps))
