"""What needs a GPU; elsewhere these tests are skipped, and say why."""

from pathlib import Path

import numpy as np
import pytest

from onnxslim_kd import Choice, api
from onnxslim_kd.bench import Setting, bench
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import latency_measure
from onnxslim_kd.passes.targets import Device, LatencyTarget
from onnxslim_kd.runtime import Session
from tests.models import MODELS, Case, build

WIDE = Case(
    "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2) d = Relu(c)"
    " e = Conv<pads=[1,1,1,1]>(d, w3) f = Relu(e) y = Conv(f, w4)",
    "float[256,3,3,3] w1, float[256,256,3,3] w2, float[256,256,3,3] w3, float[4,256,1,1] w4",
    "float[8,3,112,112] x",
)


def missing() -> str:
    """Why nothing can run on CUDA here; nothing if it can."""
    try:
        Session(build(MODELS["residual"]), provider="cuda")
    except UserError as error:
        return str(error)
    return ""


needs_cuda = pytest.mark.skipif(bool(missing()), reason=f"needs a GPU: {missing()}")


@needs_cuda
def test_both_providers_give_the_same() -> None:
    model = build(WIDE)
    feeds = {"x": np.random.default_rng(0).normal(size=(8, 3, 112, 112)).astype(np.float32)}
    here, there = (Session(model, provider=p).run(feeds)["y"] for p in ("cpu", "cuda"))
    assert np.abs(here - there).max() < 0.02 * np.abs(here).max()  # TF32 has 10 bits


@needs_cuda
def test_bench_says_what_ran() -> None:
    wide, half = build(WIDE), api.prune(build(WIDE), Choice(pattern="w", ratio=0.5)).model
    report = bench([wide, half], setting=Setting("cuda", rounds=10, seconds=5.0, profile=True))
    assert report.ran_on == "CUDAExecutionProvider"
    (case,) = report.cases
    assert case.rows[1].ratio.high < 1
    assert any(o.provider == "CUDAExecutionProvider" for o in case.rows[0].operators)


@needs_cuda
def test_a_latency_is_reached(tmp_path: Path) -> None:
    model, device = build(WIDE), Device("cuda", cache=tmp_path)
    choice = Choice(pattern="w", target=LatencyTarget(0.6), device=device)
    done = api.prune(model, choice)
    shapes = {"x": (8, 3, 112, 112)}
    ratio = latency_measure.compare(model, done.model, shapes, device.setting)
    assert ratio.median == pytest.approx(0.6, rel=0.1), done.plan.notes
