"""Interleaved timing, with a clock of our own where the real one would make tests flaky."""

import gc

import pytest

from onnxslim_kd import timing
from onnxslim_kd.timing import Timing, interleave, noise


class Clock:
    """A clock that only calls move."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


def test_rounds_alternate_and_forget_the_warm_up(monkeypatch):
    clock = Clock(monkeypatch)
    a, b = interleave([clock.work("a", 0.1), clock.work("b", 0.2)], rounds=6)
    assert [len(a.rounds), len(b.rounds)] == [6, 6]
    assert clock.calls[-12:] == list("abbaabbaabba")
    assert a.medians == pytest.approx([0.1] * 6)
    assert b.ratio_to(a).median == pytest.approx(2)
    assert b.latency.median == pytest.approx(200)


def test_fast_callables_run_in_blocks(monkeypatch):
    clock = Clock(monkeypatch)
    fast, slow = interleave([clock.work("f", 0.001), clock.work("s", 1.0)], rounds=5)
    assert {len(block) for block in fast.rounds} <= {19, 20}
    assert {len(block) for block in slow.rounds} == {1}


def test_time_limit_leaves_the_fewest_rounds(monkeypatch):
    clock = Clock(monkeypatch)
    (only,) = interleave([clock.work("a", 1.0)], rounds=100, seconds=0.5)
    assert len(only.rounds) == timing.FEWEST_ROUNDS


def test_warm_up_waits_until_times_stand_still(monkeypatch):
    clock = Clock(monkeypatch)
    durations = iter([0.10] * 5 + [0.05] * 5 + [0.02] * 1000)

    def call():
        clock.now += next(durations)

    (only,) = interleave([call], rounds=5)
    assert only.seconds == pytest.approx([0.02] * len(only.seconds))


def test_collector_is_off_while_timing_and_on_again():
    seen = []
    interleave([lambda: seen.append(gc.isenabled())], rounds=5, seconds=0.01)
    assert not any(seen) and gc.isenabled()


def test_collector_is_on_again_after_a_failure():
    def fail():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        interleave([fail])
    assert gc.isenabled()


def test_noise_is_said(monkeypatch):
    monkeypatch.setattr(timing, "cores", lambda: 2)
    quiet = Timing(tuple((1.0 + i % 2 / 100,) for i in range(12)))
    assert noise(quiet, load=0.2) == []
    assert noise(quiet, load=None) == []
    busy, *others = noise(quiet, load=1.5)
    assert busy == "busy machine: the load average was 1.5 on 2 cores before measuring"
    assert others == []
    uneven = noise(Timing(tuple((1.0 + i % 2,) for i in range(12))))
    assert any("noisy machine: rounds of the same work lie 67% apart" in s for s in uneven)
    slower = noise(Timing(tuple((1.0 + i / 160,) for i in range(15))))
    assert slower == [
        "drift: the same work became 6% slower while measuring (heat, or other programs)"
    ]
