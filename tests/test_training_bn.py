"""BatchNormalization that an exporter folded: put back, trained, calibrated, folded again."""

import numpy as np
import onnx_ir as ir
import pytest
from training_models import classifier, numbers, pair

import onnxslim_kd
from onnxslim_kd import model as model_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.fold import fold
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.runtime import Session
from onnxslim_kd.training import bn, engine
from onnxslim_kd.training import config as configs
from onnxslim_kd.training.data import Loader
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.transforms import Preprocess

SETTINGS = {"epochs": 2, "batch_size": 64, "optimizer": {"lr": 0.1}, "seed": 3, "threads": 1}


def fit(model, **settings):
    events = []
    outcome = engine.train(model, configs.parse(SETTINGS | settings), events.append)
    return outcome, events


def top1(model):
    test = open_source("digits?split=test").arrays
    scores = Session(model).run({"image": test["image"]})["logits"]
    return 100 * float((scores.argmax(1) == test["label"]).mean())


def kinds(model):
    return [node.op_type for node in model.graph]


def some(batches=8):
    return Loader(open_source("digits"), Preprocess(), 64).some(batches)


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A trained classifier whose BatchNormalization an exporter folded away."""
    model = fit(classifier(8), epochs=6)[0].model
    before = top1(model)
    path = tmp_path_factory.mktemp("folded") / "folded.onnx"
    model_io.save(model, path.with_name("live.onnx"))
    fold(model)
    model_io.save(model, path)
    assert "BatchNormalization" not in kinds(model) and top1(model) == before > 75
    return path


@pytest.fixture(scope="module")
def pruned(folded):
    """The same with half of both convolutions' channels, and the plan."""
    result = onnxslim_kd.prune(folded, Choice(pattern="conv", ratio=0.5))
    path = folded.with_name("pruned.onnx")
    model_io.save(result.model, path)
    result.plan.save(folded.with_name("plan.json"))
    return path


def test_auto_reinserts_where_it_was_folded_and_keeps_where_it_lives(folded):
    model = model_io.load(folded)
    _, events = fit(model, epochs=1)
    assert [e["reinserted"] for e in events if e["event"] == "bn"] == [["b1", "c2"]]
    assert kinds(model).count("BatchNormalization") == 2
    live = classifier()
    _, events = fit(live, epochs=1)
    assert kinds(live).count("BatchNormalization") == 1
    assert not [e for e in events if e["event"] == "bn"]
    none = model_io.load(folded)
    fit(none, epochs=1, bn="none")
    assert "BatchNormalization" not in kinds(none)


def test_reinsertion_changes_nothing_before_training(folded):
    model = model_io.load(folded)
    image = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    before = Session(model).run({"image": image})["logits"]
    assert bn.reinsert(model, None, some()) == ["b1", "c2"]
    after = Session(model).run({"image": image})["logits"]
    assert np.allclose(before, after, atol=1e-4)


def test_folding_back_after_training_is_exact(folded):
    model = model_io.load(folded)
    fit(model)
    image = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    before = Session(model).run({"image": image})["logits"]
    fold(model)
    assert "BatchNormalization" not in kinds(model)
    assert np.allclose(before, Session(model).run({"image": image})["logits"], atol=1e-4)


def test_calibration_lifts_a_pruned_model_without_training(folded, pruned):
    model = model_io.load(pruned)
    before = top1(model)
    done = bn.calibrate(model, some(), folded, folded.with_name("plan.json"))
    assert done == {"reestimated": 0, "corrected": 2}
    assert "BatchNormalization" not in kinds(model) and top1(model) > before


def test_models_of_one_sample_are_calibrated_on_whole_batches(folded, pruned, tmp_path):
    def of_one(path):
        model = model_io.load(path)
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = ir.Shape([1, *list(value.shape)[1:]])
        model_io.save(model, tmp_path / path.name)
        return tmp_path / path.name

    free, fixed = model_io.load(pruned), model_io.load(of_one(pruned))
    plan = pruned.with_name("plan.json")
    bn.calibrate(free, some(2), like=folded, plan=plan)
    bn.calibrate(fixed, some(2), like=of_one(folded), plan=plan)
    for name, array in numbers(free).items():
        np.testing.assert_allclose(numbers(fixed)[name], array, rtol=1e-4, atol=1e-5)
    assert model_io.dims(fixed.graph.inputs[0])[0] == 1
    live = model_io.load(of_one(folded.with_name("live.onnx")))
    assert bn.calibrate(live, some(2))["reestimated"] == 1


def test_the_original_may_have_live_batch_normalization(folded, pruned):
    corrected = []
    for name in ("folded.onnx", "live.onnx"):
        model = model_io.load(pruned)
        bn.calibrate(model, some(), folded.with_name(name), pruned.with_name("plan.json"))
        corrected.append(Session(model).run(next(bn.arrays(model, some(1))))["logits"])
    np.testing.assert_allclose(*corrected, rtol=1e-4, atol=1e-4)


def test_an_original_of_another_network_is_refused(pruned, tmp_path):
    other = classifier(8)
    fold(other)
    for node in other.graph:
        for output in node.outputs:
            output.name = f"other_{output.name}"
    model_io.save(other, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"other.onnx has none of the values .*: b1, c2"):
        bn.calibrate(model_io.load(pruned), some(1), tmp_path / "other.onnx")


def test_a_pruned_model_recovers_better_with_it(folded, pruned):
    like = {"like": folded, "plan": folded.with_name("plan.json")}
    found = {
        mode: fit(model_io.load(pruned), bn=mode, **(like if mode == "reinsert" else {}))[0]
        for mode in ("reinsert", "none")
    }
    scores = {mode: outcome.history[-1]["top1"] for mode, outcome in found.items()}
    assert scores["reinsert"] > scores["none"]


def test_other_channels_need_the_plan(folded, pruned):
    with pytest.raises(UserError, match=r"b1 has 8 channels in .* and 4 here; give the pruning pl"):
        bn.reinsert(model_io.load(pruned), None, some(1), folded)


def test_calibrate_without_anything_to_calibrate(folded):
    with pytest.raises(UserError, match="no BatchNormalization; give the original with --like"):
        bn.calibrate(model_io.load(folded), some(1))


def test_of_a_merged_model_the_student_alone_is_normalised():
    model = pair()
    fold(model)
    assert "BatchNormalization" not in kinds(model)
    before = numbers(model)
    fit(model, epochs=1)
    assert kinds(model).count("BatchNormalization") == 2
    assert np.array_equal(before["teacher_conv1_weights"], numbers(model)["teacher_conv1_weights"])


def test_reestimated_statistics_are_the_datas():
    model = classifier()
    bn.reestimate(model, some(22))
    images = np.concatenate([batch.entries["image"].numpy() for batch in some(22)])
    model.graph.outputs.append(next(n for n in model.graph if n.op_type == "Conv").outputs[0])
    maps = Session(model).run({"image": images})["c1"]
    assert np.allclose(numbers(model)["bn1_mean"], maps.mean((0, 2, 3)), atol=1e-2)
    assert np.allclose(numbers(model)["bn1_var"], maps.var((0, 2, 3)), rtol=2e-2)
