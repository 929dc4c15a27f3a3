"""The paired bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from thrift_lab.eval import bootstrap as stats
from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK, Bootstrap, interval, recovery


def test_means_weigh_a_short_last_block_by_its_tokens() -> None:
    boot = Bootstrap.over(2, 3 * BOOTSTRAP_BLOCK - 1)
    values = np.random.default_rng(0).normal(size=boot.shape)
    whole = Bootstrap(np.ones((1, 6)), boot.shape)  # every block once: the plain mean
    means = whole.means(values)
    assert means is not None
    assert means[0] == pytest.approx(values.mean())


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(150):
        # Neighbours share most of their noise: an interval over single tokens would be far too narrow.
        noise = np.repeat(rng.normal(size=(1, 64)), BOOTSTRAP_BLOCK // 2, axis=1)
        low, high = interval(Bootstrap.over(1, noise.shape[1]).means(noise)) or (0.0, 0.0)
        hits += low <= 0 <= high
    assert 0.85 <= hits / 150 <= 0.99


def test_recovery_is_paired() -> None:
    boot = Bootstrap.over(1, 40 * BOOTSTRAP_BLOCK)
    gap = np.random.default_rng(2).gamma(0.5, 0.2, size=boot.shape)
    back = recovery(boot, 0.25 * gap, gap)
    assert back is not None
    assert back.share == pytest.approx(0.75)
    assert back.interval == pytest.approx((0.75, 0.75))  # the same share in every resample, however noisy the gap


def test_a_share_of_no_gap_is_none() -> None:
    boot = Bootstrap.over(1, 40 * BOOTSTRAP_BLOCK)
    noise = np.random.default_rng(3).normal(size=boot.shape)
    noise -= noise.mean() - 1e-4  # a positive mean, far within the noise
    assert recovery(boot, noise / 2, noise) is None
    assert recovery(boot, noise, -np.ones(boot.shape)) is None


def test_too_few_tokens_for_an_interval() -> None:
    boot = Bootstrap.over(1, BOOTSTRAP_BLOCK)
    ones = np.ones(boot.shape)
    assert interval(boot.means(ones)) is None
    back = recovery(boot, ones / 2, ones)
    assert back is not None
    assert (back.share, back.interval) == (0.5, None)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected values of shape \(1, 128\), got \(1, 127\)"):
        Bootstrap.over(1, 128).means(np.ones((1, 127)))


def test_resamples_repeat() -> None:
    assert np.array_equal(Bootstrap.over(1, 300).weights, Bootstrap.over(1, 300).weights)
