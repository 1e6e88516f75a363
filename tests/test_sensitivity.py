"""Sensitivities: masks are removal, files survive kills, ratios are PaddleSlim's."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from onnxslim_kd import Amount, Choice, api, sensitivity
from onnxslim_kd.cli import main
from onnxslim_kd.compare import make_feeds
from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.passes import prune as pruning
from onnxslim_kd.passes.targets import ratio_for
from onnxslim_kd.runtime import Session
from tests.models import MODELS, build, proto

PADDLE = json.loads((Path(__file__).parent / "golden/sensitivity/paddleslim.json").read_text())
EXACT = ["residual", "concat", "split", "squeeze-excite", "flatten-gemm", "attention", "lstm"]


@pytest.mark.parametrize("name", EXACT)
def test_a_mask_does_what_removal_does(name: str) -> None:
    model = build(MODELS[name])
    analysis = api.inspect(model)
    plan = pruning.plan(analysis, Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1)))
    removed = pruning.removed_by(analysis, plan)
    masked = sensitivity.with_masks(analysis)
    session = sensitivity.MaskedSession(masked, removed[analysis.components.label].astype(bool))
    feeds = make_feeds(model, analysis.shapes.inputs)
    pruned = Session(api.cut(model, plan)).run(feeds)
    for output, array in session.run(feeds).items():
        np.testing.assert_allclose(array, pruned[output], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", PADDLE["get_ratios_by_loss"])
def test_ratios_are_paddleslims(loss: str) -> None:
    for parameter, expected in PADDLE["get_ratios_by_loss"][loss].items():
        curve = [tuple(point) for point in PADDLE["sensitivities"][parameter]]
        assert ratio_for(curve, float(loss)) == pytest.approx(expected, abs=1e-9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(proto(MODELS["residual"]), path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_killed_run_ends_with_the_same_file(model: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    given = ("--ratios", ",".join(f"{r / 100:g}" for r in range(5, 95, 5)))
    assert run("sensitivity", model, "-o", whole, *given).exit_code == 0
    command = [sys.executable, "-m", "onnxslim_kd", "sensitivity", model, "-o", killed, *given]
    rng = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.05, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, check=True, capture_output=True)
    assert done.returncode == 0
    assert killed.read_bytes() == whole.read_bytes()


def test_two_halves_are_one_whole(model: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.json" for name in ("whole", "a", "b", "joined")]
    given = ("--ratios", "0.25,0.5")
    assert run("sensitivity", model, "-o", paths[0], *given).exit_code == 0
    # w1 and w3 are one group: it goes by the first name that a pattern chooses
    assert run("sensitivity", model, "-o", paths[1], "--ratios", "0.25").exit_code == 0
    assert run("sensitivity", model, "-o", paths[2], "--ratios", "0.5").exit_code == 0
    joined = run("sensitivity", "merge", paths[1], paths[2], "-o", paths[3])
    assert joined.exit_code == 0, joined.output
    assert paths[3].read_bytes() == paths[0].read_bytes()
    assert list(json.loads(paths[0].read_text())["losses"]) == ["w1"]


def test_max_loss_decides_the_ratio(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    run("sensitivity", model, "-o", file, "--ratios", "0.25,0.5,0.75")
    found = sensitivity.load(file)
    curve = found.curve("w1")
    assert found.curves()["w1"] == curve
    moved = found.curves(moved=True)["w1"]
    assert [ratio for ratio, _ in moved] == [0.25, 0.5, 0.75] and moved[0][1] > 0
    assert [loss for _, loss in moved] == pytest.approx([loss**2 for _, loss in curve], rel=1e-3)
    given = ("--pattern", "w", "--sensitivity", file, "--round-to", "1", "--dry-run", "--json")
    for limit in (0.0, curve[0][1] + 1e-6, curve[2][1] + 1.0):
        result = run("prune", model, *given, "--max-loss", limit)
        (group,) = json.loads(result.stdout)["plan"]["groups"]
        assert group["removed"] == round(8 * ratio_for(curve, limit))
    both = run("prune", model, *given, "--target-macs", "0.3")
    assert both.exit_code == 0, both.output


def test_refusals(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    assert run("sensitivity", model, "-o", file, "--ratios", "0.5").exit_code == 0
    other = tmp_path / "other.onnx"
    onnx.save(proto(MODELS["concat"]), other)
    for arguments, text in (
        (("sensitivity", other, "-o", file), "was made with another model"),
        (
            ("sensitivity", model, "-o", file, "--criterion", "l2"),
            "was made with another criterion",
        ),
        (("sensitivity", model, "-o", tmp_path / "x", "--ratios", "1.5"), "is not in (0, 1)"),
        (("sensitivity", model, "-o", tmp_path / "x", "--ratios", "a"), "expected a form such as"),
        (("prune", model, "--pattern", "w", "--sensitivity", file, "--dry-run"), "goes with"),
        (("prune", model, "--pattern", "w", "--sensitivity", other, "--dry-run"), "not a sensit"),
        (("prune", model, "--pattern", "w", "--max-loss", "-1", "--dry-run"), "0 or more"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert text in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_metric_that_is_no_number(model: Path, tmp_path: Path) -> None:
    analysis = api.inspect(model)
    chosen = [p for p in analysis.parameters if p.produces]
    job = sensitivity.Job(analysis, chosen, lambda _: float("nan"), "nan")
    with pytest.raises(OperationError, match="the metric is nan for the whole model"):
        list(sensitivity.run(job, tmp_path / "s.json"))
    with pytest.raises(UserError, match="cannot be read"):
        sensitivity.load(tmp_path / "s.json")
    assert os.listdir(tmp_path) == ["model.onnx"]
