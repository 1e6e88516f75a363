"""Searching: the budget holds in every trial, a kill leaves no trace, a plan comes out."""

import builtins
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from onnxslim_kd import Amount, Choice, api, search
from onnxslim_kd.budgets import Macs, Seconds
from onnxslim_kd.cli import main
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import prune
from onnxslim_kd.passes.distance import Distance
from onnxslim_kd.passes.latency import Course
from onnxslim_kd.passes.latency_path import menu
from onnxslim_kd.passes.targets import Device, LatencyTarget, Target
from tests.models import Case, build, proto
from tests.test_latency import WIDE, Machine

DEEP = Case(
    "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2) d = Relu(c)"
    " e = Conv<pads=[1,1,1,1]>(d, w3) f = Relu(e) y = Conv(f, w4)",
    "float[16,3,3,3] w1, float[24,16,3,3] w2, float[16,24,3,3] w3, float[4,16,1,1] w4",
)


def job(share: float = 0.5, pattern: str = ".*") -> search.Job:
    analysis = api.inspect(build(DEEP))
    ranked, _, _ = prune.rank(analysis, Choice(pattern=pattern))
    budget = Macs(analysis, ranked, Target("macs", share), Amount(round_to=1))
    score = Distance.of(analysis.model, analysis.shapes.inputs)
    return search.Job(analysis, ranked, budget, score, "distance", lower_is_better=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(proto(DEEP), path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_model_without_macs_cannot_lose_any() -> None:
    rows = ", ".join(map(str, range(72)))
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (int64[N] x) => (float[N,1] y) <float[9,8] w = {{{rows}}}, int64[1] axis = {{1}}>
    {{ h = Gather(w, x) y = ReduceSum(h, axis) }}"""
    analysis = api.inspect(onnx.parser.parse_model(text))
    ranked, _, _ = prune.rank(analysis, Choice(pattern="w"))
    with pytest.raises(UserError, match=r"at most 0\.0% can go"):
        Macs(analysis, ranked, Target("macs", 0.5), Amount()).fit([0.5])


def test_every_trial_holds_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    assert list(search.run(job(), file, 15))[-1] == (15, 15)
    study = search.load(file)
    assert all(trial.spent <= 0.51 for trial in study.trials)
    assert study.best.value <= study.trials[0].value  # the first one is the uniform ratio
    assert len({tuple(t.weights.values()) for t in study.trials}) == 15


def test_a_search_that_was_stopped_ends_with_the_same_file(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    list(search.run(job(), whole, 12))
    for trials in (3, 4, 10, 12):
        list(search.run(job(), parts, trials))
    assert parts.read_bytes() == whole.read_bytes()


def test_the_best_trial_becomes_a_plan_that_replays(model: Path, tmp_path: Path) -> None:
    study, plan, output = tmp_path / "s.json", tmp_path / "s.plan.json", tmp_path / "out.onnx"
    given = ("--trials", 4, "--target-macs", 0.5, "--round-to", 1)
    result = run("search", model, "-o", study, *given)
    assert result.exit_code == 0, result.output
    assert "the best of 4 trials (output distance)" in " ".join(result.stdout.split())
    assert run("search", model, "-o", study, *given).exit_code == 2  # the plan is there already
    replayed = run("prune", model, "--plan", plan, "-o", output, "--json")
    assert replayed.exit_code == 0, replayed.output
    found = json.loads(replayed.stdout)
    kept = found["after"]["macs"] / found["before"]["macs"]
    assert kept == pytest.approx(search.load(study).best.spent, abs=1e-9)


def test_what_cannot_be_reached_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds too little, at most \d+\.\d% can go"):
        list(search.run(job(0.95, pattern="w1"), tmp_path / "s.json", 3))
    assert not list(tmp_path.iterdir())


def test_refusals(model: Path, tmp_path: Path) -> None:
    study = tmp_path / "s.json"
    assert run("search", model, "-o", study, "--trials", 1, "--target-macs", 0.5).exit_code == 0
    for arguments, text in (
        (("-o", study, "--target-macs", 0.4, "--force"), "was made with another budget"),
        (("-o", study, "--target-macs", 0.5, "--force", "--criterion", "l2"), "another criterion"),
        (("-o", model, "--target-macs", 0.5), "not a study file"),
        (("-o", study), "give either target_macs or target_latency"),
        (("-o", study, "--target-macs", 1.5, "--force"), "must be in (0, 1)"),
    ):
        result = run("search", model, "--trials", 1, *arguments)
        assert result.exit_code == 2, result.output
        assert text in " ".join(result.stderr.split())


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blind(name: str, *args: object, **kwargs: object) -> object:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", blind)
    with pytest.raises(UserError, match=r"pip install 'onnxslim-kd\[search\]'"):
        list(search.run(job(), tmp_path / "s.json", 1))


@pytest.mark.parametrize("elsewhere", [0.0, 0.3])
def test_the_plan_measures_the_latency_asked_for(tmp_path: Path, elsewhere: float) -> None:
    """Trials go by single layers; a part of the time that is in none of them is corrected for."""
    machine = Machine(tmp_path, elsewhere=elsewhere)
    analysis = api.inspect(build(WIDE))
    ranked, refused, _ = prune.rank(analysis, Choice(pattern=".*"))
    budget = Seconds.of(analysis, ranked, LatencyTarget(0.6), Device(), machine.clock)
    score = Distance.of(analysis.model, analysis.shapes.inputs)
    wide = search.Job(analysis, ranked, budget, score, "distance", lower_is_better=True)
    list(search.run(wide, tmp_path / "s.json", 3))
    plan = search.plan(wide, search.load(tmp_path / "s.json"), refused)
    measured = machine.ratio(build(WIDE), prune.cut(build(WIDE), plan), {})
    assert measured == pytest.approx(0.6, abs=0.04)
    assert f"measured {measured:.3f} of the original's latency after" in plan.notes[0]


@dataclass(frozen=True)
class Line:
    """A layer whose seconds go down with the level of one group."""

    group: int
    seconds: float = 1.0
    name: str = "layer"

    @property
    def groups(self) -> frozenset[int]:
        return frozenset({self.group})

    def at(self, levels: Sequence[int]) -> float:
        return self.seconds * (1 - 0.4 * levels[self.group])


def test_a_latency_budget_by_layers(tmp_path: Path) -> None:
    made = job()
    menus = [menu(candidate, 8) for candidate in made.ranked]
    layers: Any = [Line(0, 3.0), Line(1), Line(2)]
    course = Course(made.ranked, menus, layers, {"a": 3, "b": 1, "c": 1, "head": 1}, ())
    budget = Seconds(made.analysis, course, 0.7, lambda removed: 1.0)
    file = tmp_path / "s.json"
    list(search.run(replace(made, budget=budget), file, 6))
    assert all(trial.spent <= 0.7 for trial in search.load(file).trials)
    floor = replace(budget, share=0.05)
    with pytest.raises(UserError, match=r"every group at its floor \d+\.\d% is expected"):
        floor.fit([1.0] * 3)
