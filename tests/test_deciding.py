"""Deciding with data: criteria against their formulas, steps, and what a trained network keeps."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from onnxslim_kd import Amount, Choice, api, sensitivity
from onnxslim_kd import model as model_io
from onnxslim_kd.cli import main
from onnxslim_kd.errors import UserError
from onnxslim_kd.measures import Measure
from onnxslim_kd.model import load
from onnxslim_kd.passes import criteria
from onnxslim_kd.passes.distance import Distance
from onnxslim_kd.passes.matching import find
from onnxslim_kd.passes.targets import Target
from onnxslim_kd.plans import Plan
from onnxslim_kd.runtime import Session
from onnxslim_kd.samples import Samples
from onnxslim_kd.training import gradients
from tests.digits import DATA, accuracy, loss, read, residual, trained
from tests.models import MODELS, Case, build, proto

CHAIN = Case(
    "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv(b, w2) d = Sigmoid(c) y = Conv(d, w3)",
    "float[16,3,3,3] w1, float[12,16,1,1] w2, float[4,12,1,1] w3",
)


def samples(batches: int = 2, **labels: np.ndarray) -> Samples:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(0, 1, (4, 3, 8, 8)).astype(np.float32)} for _ in range(batches)]
    return Samples("noise", tuple(feeds), (labels,) * batches if labels else ())


def scores(name: str, parameter: str) -> np.ndarray:
    analysis = api.inspect(build(CHAIN))
    return criteria.criterion(name, samples())(analysis, find(analysis, parameter))


def inner(value: str) -> np.ndarray:
    model = build(CHAIN)
    model.graph.outputs.append(ir.convenience.create_value_mapping(model.graph)[value])
    session = Session(model)
    return np.concatenate([session.run(feed)[value] for feed in samples().feeds])


# -------------------------------------------------------------------------- criteria


def test_activation_is_the_mean_magnitude_where_channels_are_consumed() -> None:
    expected = np.abs(inner("b")).mean((0, 2, 3))
    np.testing.assert_allclose(scores("activation", "w1"), expected / expected.mean(), rtol=1e-5)


def test_reconstruction_is_activation_times_the_next_weights() -> None:
    weight = build(CHAIN).graph.initializers["w2"].const_value
    assert weight is not None
    energy = np.square(inner("b")).mean((0, 2, 3)) * np.square(weight.numpy()).sum((0, 2, 3))
    expected = np.sqrt(energy / energy.sum())
    np.testing.assert_allclose(scores("reconstruction", "w1"), expected, rtol=1e-5)


@pytest.mark.parametrize("labelled", [False, True])
def test_taylor_is_the_slope_of_the_loss(labelled: bool) -> None:
    given = samples(1, **({"mask": np.full((4, 8, 8), 2)} if labelled else {}))
    model = build(CHAIN)
    found = gradients.taylor(model, given)["w2"]
    weight = model.graph.initializers["w2"]
    assert weight.const_value is not None
    array = weight.const_value.numpy().astype(np.float64)

    def loss(index: tuple[int, ...], step: float) -> float:
        moved = array.copy()
        moved[index] += step
        weight.const_value = ir.Tensor(moved.astype(np.float32), name="w2")
        y = Session(model).run(given.feeds[0])["y"].astype(np.float64)
        if not labelled:
            return float(np.square(y).mean() / 2)
        return float((np.log(np.exp(y).sum(1)) - y[:, 2]).mean())

    for index in ((0, 0, 0, 0), (5, 7, 0, 0), (11, 15, 0, 0)):
        slope = (loss(index, 1e-2) - loss(index, -1e-2)) / 2e-2
        assert found[index] == pytest.approx(abs(slope * array[index]), rel=0.02, abs=1e-6)


@pytest.mark.parametrize("name", ["residual", "concat", "split", "squeeze-excite", "attention"])
@pytest.mark.parametrize("criterion", ["group-l2", "activation", "reconstruction", "taylor"])
def test_every_structure_gets_finite_scores(name: str, criterion: str) -> None:
    model = build(MODELS[name])
    shapes = api.inspect(model).shapes.inputs
    feeds = {n: np.ones(shape, np.float32) for n, shape in shapes.items()}
    choice = Choice(pattern=".*", criterion=criterion, samples=Samples("ones", (feeds,)))
    for group in api.plan(model, choice).groups:
        assert np.isfinite(group.importance).all()


def test_where_nothing_is_consumed_there_is_nothing_to_observe() -> None:
    model = build(Case("y = Conv(x, w1)", "float[8,3,3,3] w1", outputs="float[N,8,6,6] y"))
    feeds = {"x": np.ones((2, 3, 8, 8), np.float32)}
    choice = Choice(pattern="w1", criterion="activation", samples=Samples("ones", (feeds,)))
    with pytest.raises(UserError, match="criterion activation finds nothing that it could measure"):
        api.plan(model, choice, api.Reading(free_outputs=("y",)))


def test_the_plan_says_what_was_measured_on_what() -> None:
    notes = api.plan(build(CHAIN), Choice(pattern="w", criterion="taylor", samples=samples())).notes
    assert "taylor was measured on noise" in notes
    assert any("the data has no labels: gradients are those of half" in n for n in notes)


# ----------------------------------------------------------------------------- steps


@pytest.mark.parametrize("criterion", ["l1", "geometric-median", "group-l2", "reconstruction"])
def test_two_steps_are_two_prunings(criterion: str) -> None:
    """A quarter, then a third of what is left, is half in two steps."""
    model, given = build(CHAIN), samples()

    def cut(source: ir.Model, ratio: float, steps: int) -> ir.Model:
        choice = Choice(
            pattern="w[12]",
            ratio=ratio,
            criterion=criterion,
            amount=Amount(round_to=1),
            samples=given,
            steps=steps,
        )
        done = api.prune(source, choice)
        assert done.proof is not None
        return done.model

    twice, steps = cut(cut(model, 1 / 4, 1), 1 / 3, 1), cut(model, 1 / 2, 2)
    for name, value in twice.graph.initializers.items():
        expected, got = value.const_value, steps.graph.initializers[name].const_value
        assert expected is not None
        assert got is not None
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_steps_end_in_one_plan_that_reaches_the_target(tmp_path: Path) -> None:
    choice = Choice(
        pattern="w",
        target=Target("macs", 0.5),
        allocation="global",
        amount=Amount(round_to=1),
        steps=4,
    )
    plan = api.plan(build(CHAIN), choice)
    assert plan.macs_after / plan.macs_before == pytest.approx(0.5, abs=0.03)
    assert "scored anew before each of 4 steps" in plan.notes
    plan.save(tmp_path / "plan.json")
    assert api.prune(build(CHAIN), Plan.load(tmp_path / "plan.json")).proof is not None
    for group in plan.groups:
        assert min(group.importance) >= 0  # the scores with which the units went


# ------------------------------------------------------------------- a trained network


def kept(model: ir.Model, given: Samples, share: float, **settings: object) -> float:
    choice = Choice(
        pattern="conv",
        target=Target("macs", share),
        amount=Amount(round_to=1),
        samples=given,
        **settings,  # type: ignore[arg-type]
    )
    return accuracy(api.prune(model, choice, verify=False).model)


def claims(seed: int) -> None:
    model = trained(seed)
    given = read(model, DATA, samples=512)
    assert accuracy(model) > 97
    plain = kept(model, given, 0.4)
    data = kept(model, given, 0.4, criterion="taylor")
    steps = kept(model, given, 0.4, criterion="taylor", steps=5)
    assert steps > data + 5
    assert steps > plain + 10


def test_data_and_steps_keep_accuracy() -> None:
    claims(0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_data_and_steps_keep_accuracy_for_more_seeds(seed: int) -> None:
    claims(seed)


def by_distance(seed: int, path: Path) -> dict[str, float]:
    """Accuracy kept at 20 % of the MACs by one ratio, and by sensitivities of the outputs."""
    model = trained(seed)
    model_io.save(model, path / "digits.onnx")
    given = ("--data", DATA, "--samples", 128, "--metric", "distance", "--criterion", "group-l2")
    file = path / "s.json"
    result = run(
        "sensitivity", path / "digits.onnx", "-o", file, "--pattern", "conv", *given, "--threads", 1
    )
    assert result.exit_code == 0, result.output
    found = sensitivity.load(file)
    assert found.measure == f"output distance on 128 samples of {DATA}"
    curves = found.curves(moved=True)
    held = read(model, DATA, samples=32)
    return {
        "uniform": kept(model, held, 0.2, criterion="group-l2"),
        "sensitivity": kept(model, held, 0.2, criterion="group-l2", sensitivity=curves),
    }


def test_the_distance_of_outputs_is_a_metric(model: Path, tmp_path: Path) -> None:
    """It needs no labels, and grows where top-1 does not move."""
    np.savez(tmp_path / "data.npz", image=samples(16).feeds[0]["x"])
    given = ("--data", f"npz:{tmp_path / 'data.npz'}", "--metric", "distance")
    result = run("sensitivity", model, "-o", tmp_path / "s.json", "--ratios", "0.2,0.8", *given)
    assert result.exit_code == 0, result.output
    found = sensitivity.load(tmp_path / "s.json")
    assert found.measure.startswith("output distance on 4 samples of npz:")
    for name in found.losses:
        (_, few), (_, many) = found.curve(name)
        assert 0 < few < many


@pytest.mark.parametrize(
    ("body", "other", "expected"),
    [
        ("y = Identity(x)", "y = Add(x, x)", 2.0),
        ("y = ArgMax<axis=1,keepdims=0>(x)", "z = Neg(x) y = ArgMax<axis=1,keepdims=0>(z)", 2.0),
        ("y = NonZero(x)", "z = Relu(x) y = NonZero(z)", 2.0),  # of another size
        (
            "y = Identity(x)",
            "a = Add(x,x) b = Add(a,a) c = Add(b,b) d = Add(c,c) e = Add(d,d) f = Add(e,e)"
            " y = Add(f,f)",
            128.0,  # whose squares float16 cannot sum
        ),
    ],
)
def test_distances_of_all_kinds_of_outputs(body: str, other: str, expected: float) -> None:
    kind = "int64" if "ArgMax" in body or "NonZero" in body else "float16"
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float16[2,300] x) => ({0} y) {{{1}}}'
    one, two = (onnx.parser.parse_model(text.format(kind, part)) for part in (body, other))
    distance = Distance.of(load(one), {"x": (2, 300)})
    assert distance(Session(load(one))) == 1
    assert distance(Session(load(two))) == pytest.approx(expected)


@pytest.mark.slow
def test_sensitivities_by_distance_win_on_average(tmp_path: Path) -> None:
    found = []
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        found.append(by_distance(seed, tmp_path / str(seed)))
    means = {name: np.mean([f[name] for f in found]) for name in found[0]}
    assert means["sensitivity"] > means["uniform"] + 2


def losses(seed: int, path: Path) -> dict[str, float]:
    """The loss on the test split at 70 % of the MACs, cut and not trained, by allocation."""
    model = trained(seed, make=residual)
    given = read(model, DATA, samples=512)
    analysis = api.inspect(model)
    job = sensitivity.Job(
        analysis,
        [p for p in analysis.parameters if p.produces],
        *Measure(data=DATA, samples=512).score(analysis),
        criterion="taylor",
        samples=given,
    )
    assert list(sensitivity.run(job, path, threads=1))
    found = {}
    for name, settings in (
        ("uniform", {}),
        ("global", {"allocation": "global"}),
        ("sensitivity", {"sensitivity": sensitivity.load(path).curves(moved=True)}),
    ):
        choice = Choice(
            pattern=".*",
            criterion="taylor",
            samples=given,
            target=Target("macs", 0.3),
            amount=Amount(round_to=1),
            **settings,  # type: ignore[arg-type]
        )
        found[name] = loss(api.prune(model, choice, verify=False).model)
    return found


@pytest.mark.slow
def test_what_was_measured_decides_best(tmp_path: Path) -> None:
    """A ResNet, whose layers matter unequally: one ratio does not know that, scores know some.

    Single seeds differ: global loses to uniform on two of the six.
    """
    found = [losses(seed, tmp_path / f"{seed}.json") for seed in range(6)]
    means = {name: np.mean([f[name] for f in found]) for name in found[0]}
    assert means["sensitivity"] < 0.7 * means["global"]
    assert means["global"] < means["uniform"]


# ------------------------------------------------------------------------- bad input


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(proto(CHAIN), path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_refusals(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", image=np.zeros((0, 3, 8, 8), np.float32))
    one = ("prune", model, "--pattern", "w", "--dry-run")
    for arguments, text in (
        ((*one, "--criterion", "taylor"), "criterion taylor looks at data: give it with --data"),
        ((*one, "--correct"), "--correct looks at data, labelled or not: give it with --data"),
        ((*one, "--steps", "0"), "--steps must be 1 or more, got 0"),
        ((*one, "--steps", "2", "--selector", "energy"), "--steps goes neither with"),
        ((*one, "--data", "digits"), "--data: criterion l1 looks at none, and --correct is not"),
        (
            (*one, "--data", "digits", "--correct", "--samples", "0"),
            "--samples must be 1 or more, got 0",
        ),
        (
            (*one, "--data", "digits", "--criterion", "activation"),
            "input 'x' has shape [batch, 3, 8, 8], the data gives [32, 1, 8, 8]",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert text in " ".join(result.stderr.split())


def broken(outputs: object, entries: object) -> float:
    raise KeyError("no such output")


def nan(outputs: object, entries: object) -> float:
    return float("nan")


def words(outputs: object, entries: object) -> str:
    return "good"


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("broken", "metric broken failed: KeyError: 'no such output'"),
        ("nan", "metric nan is nan"),
        ("words", "metric words gives a str, not a number"),
    ],
)
def test_a_metric_that_fails(tmp_path: Path, metric: str, text: str) -> None:
    path = tmp_path / "digits.onnx"
    model_io.save(trained(0), path)
    given = ("--data", "digits?split=test", "--metric", f"tests.test_deciding:{metric}")
    result = run("sensitivity", path, "-o", tmp_path / "s.json", *given)
    assert result.exit_code == 1, result.output
    assert text in " ".join(result.stderr.split())
    assert not (tmp_path / "s.json").exists()


def test_no_score_is_no_zero() -> None:
    analysis = api.inspect(build(CHAIN))
    nothing = criteria.ByComponent("empty", lambda a: np.full(a.components.count, np.nan))
    with pytest.raises(UserError, match="criterion empty finds nothing that it could measure"):
        nothing(analysis, find(analysis, "w1"))
