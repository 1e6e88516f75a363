"""Percentiles, paired ratios and their intervals."""

import numpy as np
import pytest

from onnxslim_kd.statistics import Ratio, drift, latency, paired_ratio, spread


def test_latency_in_milliseconds():
    found = latency(np.arange(1, 101) / 1000)
    assert (found.median, found.runs) == (pytest.approx(50.5), 100)
    assert found.p90 == pytest.approx(90.1) and found.p99 == pytest.approx(99.01)


def test_ratio_is_paired_so_that_common_noise_cancels():
    rng = np.random.default_rng(1)
    slow_moments = rng.uniform(1, 10, 30)
    ratio = paired_ratio(slow_moments, 0.6 * slow_moments)
    assert ratio.median == pytest.approx(0.6)
    assert ratio.low == pytest.approx(0.6) and ratio.high == pytest.approx(0.6)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(200):
        noise = rng.normal(1, 0.05, (2, 30))
        ratio = paired_ratio(noise[0], 0.8 * noise[1])
        hits += ratio.low <= 0.8 <= ratio.high
    assert 180 <= hits <= 199


def test_the_same_seed_gives_the_same_interval():
    a, b = np.random.default_rng(3).uniform(1, 2, (2, 12))
    assert paired_ratio(a, b) == paired_ratio(a, b)


def test_unequal_rounds_are_refused():
    with pytest.raises(ValueError, match="cannot pair 2 rounds with 3"):
        paired_ratio([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="cannot pair 0 rounds with 0"):
        paired_ratio([], [])


def test_spread_and_drift():
    assert spread([1.0] * 10) == 0
    assert spread(np.linspace(1, 2, 11)) == pytest.approx(0.8 / 1.5)
    assert drift([1, 1, 1, 5, 5, 5, 2, 2, 2]) == pytest.approx(1.0)


def test_ratio_reads_well():
    assert str(Ratio(0.6, 0.59, 0.61)) == "0.600 [0.590, 0.610]"
