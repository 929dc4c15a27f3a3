"""Paired bootstrap over blocks of tokens: neighbouring tokens are not independent, so blocks of them are resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BOOTSTRAP_BLOCK = 64
RESAMPLES = 4000
LEVEL = 0.95

Interval = tuple[float, float]


@lru_cache(maxsize=12)
def draws(units: int, *, seed: int = 0) -> NDArray[np.float64]:
    """How often each of so many units is drawn in every resample, `[resamples, units]`; not to be written to."""
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


@dataclass(frozen=True)
class Bootstrap:
    """One set of resamples shared by all methods of a run, which makes every comparison paired.

    Args:
        weights: how often each block of tokens is drawn, `[resamples, blocks]`.
        shape: windows and scored tokens of a window.
    """

    weights: NDArray[np.float64]
    shape: tuple[int, int]

    @classmethod
    def over(cls, windows: int, tokens: int, *, seed: int = 0) -> Bootstrap:
        """Resamples for `[windows, tokens]` values; blocks do not cross windows."""
        blocks = windows * -(-tokens // BOOTSTRAP_BLOCK)
        return cls(draws(blocks, seed=seed), (windows, tokens))

    def means(self, values: NDArray[np.floating]) -> NDArray[np.float64] | None:
        """Mean of the values in every resample, `[resamples]`; None when there are fewer than two blocks."""
        if values.shape != self.shape:
            raise ValueError(f"expected values of shape {self.shape}, got {values.shape}")
        if self.weights.shape[1] < 2:
            return None
        starts = np.arange(0, self.shape[1], BOOTSTRAP_BLOCK)
        sums = np.add.reduceat(values.astype(np.float64), starts, axis=1).ravel()
        sizes = np.tile(np.diff(starts, append=self.shape[1]), self.shape[0])
        return (self.weights @ sums) / (self.weights @ sizes)


def block_means(values: Tensor) -> list[float]:
    """Means over `BOOTSTRAP_BLOCK` tokens each of values ``[n]``."""
    return [float(part.mean()) for part in values.double().split(BOOTSTRAP_BLOCK)]


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean difference of block means of the same tokens, and its 95% interval."""
    difference = np.array(values) - np.array(base)
    return float(difference.mean()), interval(draws(len(difference)) @ difference / len(difference))


def between(limits: Interval | None) -> str:
    """An interval of nats in words; nothing for none."""
    return "" if limits is None else f"{limits[0]:+.4f} to {limits[1]:+.4f}"


def interval(samples: NDArray[np.float64] | None) -> Interval | None:
    """Central 95% of the samples."""
    if samples is None:
        return None
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Recovery:
    """How much of the fp4-to-fp16 gap a method brings back; 1 is all of it."""

    share: float
    interval: Interval | None


def recovery(boot: Bootstrap, loss: NDArray[np.floating], gap: NDArray[np.floating]) -> Recovery | None:
    """Recovered share 1 - mean(loss) / mean(gap), with a paired interval.

    Args:
        boot: resamples.
        loss: NLL of the method minus NLL of fp16 for every token, `[windows, tokens]`.
        gap: the same for uniform fp4.

    Returns:
        None when the gap is not above 0 at the 95% level: a share of nothing means nothing.
    """
    gaps, losses = boot.means(gap), boot.means(loss)
    if float(gap.mean()) <= 0 or (gaps is not None and float(np.quantile(gaps, (1 - LEVEL) / 2)) <= 0):
        return None
    share = 1 - float(loss.mean()) / float(gap.mean())
    if gaps is None or losses is None:
        return Recovery(share, None)
    positive = gaps > 0  # at most 2.5% of the resamples are left out, by the test above
    return Recovery(share, interval(1 - losses[positive] / gaps[positive]))
