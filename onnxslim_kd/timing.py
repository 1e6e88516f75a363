"""Time callables against each other: warmed up, interleaved, with the noise of the machine.

A round runs every callable for a moment, in turn, and every second round goes backwards: what
slows the machine for a second then hits all of them, and none always follows the same one.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_kd.machine import cores
from onnxslim_kd.statistics import Latency, Ratio, drift, latency, paired_ratio, spread

Call = Callable[[], object]
Clock = Callable[[], float]
BLOCK = 0.02
"""Seconds that one callable runs for in one round; a slower one runs once."""
MOST_RUNS = 100
"""Runs of one callable in one round, however fast it is."""
FEWEST_ROUNDS = 5
WARM = 5, 0.03
"""Warm: the median of this many runs lies within this share of the median of those before."""
WARM_SECONDS = 2.0
NOISY_SPREAD = 0.10
NOISY_DRIFT = 0.05
FEWEST_TO_DRIFT = 9
"""Rounds: with fewer, one slow round would look like drift."""
BUSY = 0.5
"""Other work per core, as a load average, from which a machine counts as busy."""


@dataclass(frozen=True)
class Timing:
    """What was measured of one callable."""

    rounds: tuple[tuple[float, ...], ...]
    """Seconds of every run, by round."""

    @property
    def medians(self) -> np.ndarray[Any, Any]:
        """The median of each round, in seconds."""
        return np.array([np.median(block) for block in self.rounds])

    @property
    def seconds(self) -> list[float]:
        """Every run, in order."""
        return [run for block in self.rounds for run in block]

    @property
    def latency(self) -> Latency:
        """Percentiles over all runs."""
        return latency(self.seconds)

    def ratio_to(self, reference: "Timing") -> Ratio:
        """Return this over ``reference``, which was measured in the same rounds."""
        return paired_ratio(reference.medians, self.medians)


def interleave(
    calls: Sequence[Call],
    *,
    rounds: int = 30,
    seconds: float = 30.0,
    clock: Clock | None = None,
) -> tuple[Timing, ...]:
    """Warm every callable up, then time all of them in turn, round by round.

    Args:
        calls: What to time; each does the same work whenever it is called.
        rounds: How many rounds.
        seconds: No further round begins after this long, but `FEWEST_ROUNDS` are always made.
        clock: What tells the time of a run, `time.perf_counter` unless given; for work that stays
            in the calling thread, `time.thread_time` leaves out what other programs take of the
            processor.
    """
    clock = clock or time.perf_counter
    with _no_collector():
        counts = [min(max(int(BLOCK / _warm_up(call, clock)), 1), MOST_RUNS) for call in calls]
        blocks: list[list[tuple[float, ...]]] = [[] for _ in calls]
        order, start = list(range(len(calls))), time.perf_counter()
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                break
            for index in order:
                blocks[index].append(
                    tuple(_time(calls[index], clock) for _ in range(counts[index]))
                )
            order.reverse()
    return tuple(Timing(tuple(block)) for block in blocks)


def _time(call: Call, clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start


def _warm_up(call: Call, clock: Clock) -> float:
    """Run until the times stand still or `WARM_SECONDS` are over; return the last median."""
    count, tolerance = WARM
    start, previous = time.perf_counter(), 0.0
    while True:
        median = float(np.median([_time(call, clock) for _ in range(count)]))
        if abs(median - previous) <= tolerance * median:
            return median
        if time.perf_counter() - start > WARM_SECONDS:
            return median
        previous = median


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the garbage collector out of the measured time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def noise(reference: Timing, *, load: float | None = None) -> list[str]:
    """Return what speaks against trusting the times, one sentence each.

    Args:
        reference: The timing that all others are compared with.
        load: The load average before measuring, as `machine.load_average` gave it.
    """
    said = []
    apart, moved = spread(reference.medians), 0.0
    if len(reference.rounds) >= FEWEST_TO_DRIFT:
        moved = drift(reference.medians)
    if apart > NOISY_SPREAD:
        said.append(
            f"noisy machine: rounds of the same work lie {apart:.0%} apart;"
            f" stop other programs, or measure longer (--seconds, --rounds)"
        )
    if abs(moved) > NOISY_DRIFT:
        way = "slower" if moved > 0 else "faster"
        said.append(
            f"drift: the same work became {abs(moved):.0%} {way} while measuring"
            f" (heat, or other programs)"
        )
    if load is not None and load > BUSY * cores():
        said.append(
            f"busy machine: the load average was {load:.1f} on {cores()} cores before measuring"
        )
    return said
