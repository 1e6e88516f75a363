"""Correcting a cut: redundancy is made up for, accuracy returns, the rest stays."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxslim_kd import Amount, Choice, api
from onnxslim_kd import model as model_io
from onnxslim_kd.cli import main
from onnxslim_kd.compare import Reference
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import correct
from onnxslim_kd.passes import prune as pruning
from onnxslim_kd.passes.targets import Target
from onnxslim_kd.runtime import Session
from onnxslim_kd.samples import Samples
from tests.digits import DATA, accuracy, read, trained
from tests.models import MODELS, Case, build

LAYERS = {
    "conv": (
        "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a)"
        " y = Conv<pads=[1,0,2,1], strides=[2,1], dilations=[1,2]>(b, w2, w3)",
        "float[8,3,3,3] w1, float[4,8,3,3] w2, float[4] w3",
    ),
    "conv without a bias": (
        "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) y = Conv(b, w2)",
        "float[8,3,3,3] w1, float[4,8,3,3] w2",
    ),
    "conv and norm": (
        "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv(b, w2)"
        " y = BatchNormalization(c, w3, w4, w5, wpos6)",
        "float[8,3,3,3] w1, float[4,8,3,3] w2, float[4] w3, float[4] w4, float[4] w5,"
        " float[4] wpos6",
    ),
    "gemm": (
        "a = Conv(x, w1) b = Relu(a) p = GlobalAveragePool(b) f = Flatten(p)"
        " y = Gemm<transB=1>(f, w2, w3)",
        "float[8,3,3,3] w1, float[4,8] w2, float[4] w3",
    ),
    "matmul": (
        "a = Conv(x, w1) b = Relu(a) p = GlobalAveragePool(b) f = Flatten(p)"
        " c = MatMul(f, w2) y = Add(c, w3)",
        "float[8,3,3,3] w1, float[8,4] w2, float[4] w3",
    ),
}
FEW = ("gemm", "matmul")


def noise(batches: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    shape = (16, 3, 8, 8)
    feeds = [{"x": rng.normal(0, 1, shape).astype(np.float32)} for _ in range(batches)]
    return Samples("noise", tuple(feeds))


def redundant(name: str, rank: int = 0) -> ir.Model:
    """A model in which channels 4 to 7 are 0 to 3 again, scaled: to remove them loses nothing."""
    body, weights = LAYERS[name]
    rank = rank or (2 if name in FEW else 4)
    dims = ",".join("NCHW"[:rank])
    model = build(Case(body, weights, outputs=f"float[{dims}] y".replace("C", "4")))
    weight = model.graph.initializers["w1"]
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[4:] = array[:4] * 0.5
    weight.const_value = ir.Tensor(array, name="w1")
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_redundant_is_made_up_for(name: str) -> None:
    model = redundant(name)
    choice = Choice(pattern="w1", ratio=0.5, amount=Amount(round_to=1))
    plain = api.prune(model, choice)
    mended = api.prune(model, choice, reading=api.Reading(correct=noise(8)))
    fresh = noise(1, seed=1).feeds[0]
    wanted = Session(model).run(fresh)["y"]
    scale = np.abs(wanted).max()
    assert np.abs(Session(plain.model).run(fresh)["y"] - wanted).max() > 0.05 * scale
    assert np.abs(Session(mended.model).run(fresh)["y"] - wanted).max() < 0.01 * scale
    (layer,) = mended.corrected
    assert layer.after < 0.01 * layer.before
    assert mended.plan == plain.plan
    assert mended.proof is not None


SHARED = {
    "bias of two gemms": (
        "a = Conv(x, w1) b = Relu(a) p = GlobalAveragePool(b) f = Flatten(p)"
        " c = Gemm<transB=1>(f, w2, w3) d = Gemm<transB=1>(f, w4, w3) y = Sub(c, d)",
        "float[8,3,3,3] w1, float[4,8] w2, float[4] w3, float[4,8] w4",
    ),
    "one number for all": (
        "a = Conv(x, w1) b = Relu(a) p = GlobalAveragePool(b) f = Flatten(p)"
        " y = Gemm<transB=1>(f, w2, w3)",
        "float[8,3,3,3] w1, float[4,8] w2, float[1] w3",
    ),
    "mean of two norms": (
        "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a)"
        " c = Conv(b, w2) d = BatchNormalization(c, w3, w4, w5, wpos6)"
        " e = Conv(b, w7) f = BatchNormalization(e, w8, w4, w5, wpos6) y = Sub(d, f)",
        "float[8,3,3,3] w1, float[4,8,3,3] w2, float[4] w3, float[4] w4, float[4] w5,"
        " float[4] wpos6, float[4,8,3,3] w7, float[4] w8",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_several_layers_add_stays_for_the_others(name: str, monkeypatch) -> None:
    monkeypatch.setitem(LAYERS, name, SHARED[name])
    model = redundant(name, rank=4 if "norm" in name else 2)
    for value in model.graph.initializers.values():  # far from zero, so that twice is too much
        if value.name in ("w3", "w5"):
            value.const_value = ir.Tensor(value.const_value.numpy() + np.float32(3))
    choice = Choice(pattern="w1", ratio=0.5, amount=Amount(round_to=1))
    mended = api.prune(model, choice, reading=api.Reading(correct=noise(8)))
    fresh = noise(1, seed=1).feeds[0]
    wanted, got = (Session(m).run(fresh)["y"] for m in (model, mended.model))
    assert np.abs(got - wanted).max() < 0.01 * np.abs(wanted).max()
    assert all(layer.after < 0.01 * layer.before for layer in mended.corrected)


@pytest.mark.parametrize("name", MODELS)
def test_every_structure_can_be_corrected(name: str) -> None:
    model = build(MODELS[name])
    reference = Reference.of(model)
    given = Samples("random", reference.feeds[:1])
    choice = Choice(pattern=".*", amount=Amount(round_to=1))
    done = api.prune(model, choice, reading=api.Reading(correct=given), verify=False)
    for layer in done.corrected:
        assert layer.after <= layer.before


def test_only_the_layers_that_lost_inputs_change() -> None:
    model = redundant("conv")
    choice = Choice(pattern="w1", ratio=0.5, amount=Amount(round_to=1))
    plain = api.prune(model, choice).model.graph.initializers
    mended = api.prune(model, choice, reading=api.Reading(correct=noise(4))).model
    for name, value in mended.graph.initializers.items():
        before, after = plain[name].const_value, value.const_value
        assert before is not None
        assert after is not None
        assert np.array_equal(before.numpy(), after.numpy()) == (name == "w1")


def test_a_layer_that_cannot_get_better_stays() -> None:
    """Pure noise in, unrelated noise wanted: what fits the one half does not fit the other."""
    body, weights = LAYERS["gemm"]
    model = build(Case(body, weights, outputs="float[N,4] y"))
    one = Samples("few", ({"x": noise(1).feeds[0]["x"][:4]},))
    choice = Choice(pattern="w1", ratio=0.5, amount=Amount(round_to=1))
    (layer,) = api.prune(model, choice, reading=api.Reading(correct=one)).corrected
    assert layer.after <= layer.before


def test_one_sample_is_too_few() -> None:
    one = Samples("one", ({"x": noise(1).feeds[0]["x"][:1]},))
    choice = Choice(pattern="w1", ratio=0.5)
    with pytest.raises(UserError, match="needs two samples or more"):
        api.prune(redundant("gemm"), choice, reading=api.Reading(correct=one))


def recovered(seed: int, share: float) -> tuple[float, float, float]:
    model = trained(seed)
    choice = Choice(pattern="conv", target=Target("macs", share), amount=Amount(round_to=1))
    analysis = api.inspect(model)
    plan = api.plan(model, choice)
    removed = api.pruning.removed_by(analysis, plan)
    layers = correct.layers(analysis, removed)
    cut = api.cut(model, plan)
    before = accuracy(cut)
    correct.correct(analysis.model, cut, layers, read(model, DATA, samples=256))
    return accuracy(model), before, accuracy(cut)


def test_most_of_the_accuracy_returns_at_half_of_the_macs() -> None:
    whole, pruned, mended = recovered(0, 0.5)
    assert whole - pruned > 30
    assert whole - mended < 0.1 * (whole - pruned)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_at_least_half_returns_for_more_seeds(seed: int, share: float) -> None:
    whole, pruned, mended = recovered(seed, share)
    assert whole - mended < 0.5 * (whole - pruned)


def test_the_command_says_what_was_verified(tmp_path: Path) -> None:
    path, output = tmp_path / "digits.onnx", tmp_path / "out.onnx"
    model_io.save(trained(0), path)
    given = ("--pattern", "conv", "--data", DATA, "--samples", "64", "--correct")
    result = CliRunner().invoke(main, ["prune", str(path), *given, "-o", str(output)])
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "What was verified is the cut; the weights were corrected after that." in text
    assert accuracy(model_io.load(output)) > 80


def test_layers_that_cannot_be_corrected_are_named() -> None:
    analysis = api.inspect(build(MODELS["grouped"]))
    choice = Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
    removed = pruning.removed_by(analysis, pruning.plan(analysis, choice))
    nodes = analysis.model.graph
    grouped = [node.name for node in nodes if "w3" in {v.name for v in node.inputs}]
    assert correct.left_out(analysis, removed) == grouped
