"""What a list of durations says: percentiles, and ratios with an interval.

Ratios are paired: each round measures every model once, so that whatever slows the machine for a
while slows both sides of a ratio alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RESAMPLES = 2000
CONFIDENCE = 95.0
"""Percent; of the bootstrap interval of a ratio."""


@dataclass(frozen=True)
class Latency:
    """How long one run takes, in milliseconds."""

    median: float
    p90: float
    p99: float
    runs: int


@dataclass(frozen=True)
class Ratio:
    """A ratio and the interval that holds it with a confidence of 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def latency(seconds: Sequence[float] | Array) -> Latency:
    """Return the percentiles of ``seconds``, in milliseconds."""
    median, p90, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99])
    return Latency(float(median), float(p90), float(p99), len(seconds))


def paired_ratio(
    reference: Sequence[float] | Array, other: Sequence[float] | Array, *, seed: int = 0
) -> Ratio:
    """Return the median of ``other / reference`` by round, with its bootstrap interval.

    Args:
        reference: One number per round.
        other: One number for each of the same rounds.
        seed: Of the resampling.

    Raises:
        ValueError: The two are not equally long, or empty.
    """
    below, above = np.asarray(reference, float), np.asarray(other, float)
    if below.shape != above.shape or below.size == 0:
        raise ValueError(f"cannot pair {above.size} rounds with {below.size}")
    ratios = above / below
    drawn = np.random.default_rng(seed).integers(0, ratios.size, (RESAMPLES, ratios.size))
    medians = np.median(ratios[drawn], axis=1)
    low, high = np.percentile(medians, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def spread(rounds: Sequence[float] | Array) -> float:
    """Return how far rounds of equal work lie apart: (p90 - p10) / median."""
    p10, median, p90 = np.percentile(np.asarray(rounds), [10, 50, 90])
    return float((p90 - p10) / median)


def drift(rounds: Sequence[float] | Array) -> float:
    """Return how much slower (faster: negative) the last third is than the first."""
    third = max(len(rounds) // 3, 1)
    first, last = np.median(rounds[:third]), np.median(rounds[-third:])
    return float(last / first - 1)
