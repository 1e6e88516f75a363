import errno
import os
import tempfile

import numpy as np
import onnx_ir as ir
import pytest
import torch
from training_models import build, classifier, numbers, pair

from onnxslim_kd.errors import NotFoundError, OperationError, UserError
from onnxslim_kd.runtime import Session
from onnxslim_kd.training import config as configs
from onnxslim_kd.training import engine
from onnxslim_kd.training.data import Batch
from onnxslim_kd.training.objective import PARTNER, Objective


def fit(model, **settings):
    events = []
    base = {"epochs": 2, "batch_size": 64, "optimizer": {"lr": 0.1}, "seed": 3}
    outcome = engine.train(model, configs.parse(base | settings), events.append)
    return outcome, events


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def test_fine_tuning_a_plain_model_learns_digits_and_keeps_names():
    model = classifier(8)
    names = [value.name for value in model.graph.initializers.values()]
    outcome, events = fit(model, epochs=6)
    assert outcome.history[-1]["top1"] > 75
    assert [value.name for value in outcome.model.graph.initializers.values()] == names
    (start,) = of(events, "start")
    assert set(start["trained"]) == {n for n in names if n not in ("bn1_mean", "bn1_var")}
    assert start["teacher"] is None and start["unused"] == []


def test_the_written_weights_give_the_accuracy_that_was_reported():
    model = classifier(8)
    outcome, _ = fit(model, epochs=3)
    from onnxslim_kd.training.datasets import open_source

    test = open_source("digits?split=test").arrays
    scores = Session(model).run({"image": test["image"]})["logits"]
    top1 = 100 * float((scores.argmax(1) == test["label"]).mean())
    assert top1 == pytest.approx(outcome.history[-1]["top1"])


def test_distillation_trains_student_and_helper_but_not_the_teacher():
    model = pair()
    before = numbers(model)
    outcome, events = fit(model, epochs=3)
    after = numbers(outcome.model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert not any(name.startswith("teacher_") for name in changed)
    assert {"conv1_weights", "bn1_mean", "fc_weights", "loss_align_weights"} <= changed
    steps = of(events, "step")
    assert steps[-1]["kl"] < steps[0]["kl"] and steps[-1]["hint"] < steps[0]["hint"]
    last = steps[-1]
    assert last["loss"] == pytest.approx(last["kl"] + 0.5 * last["hint"], rel=1e-5)


@pytest.mark.parametrize("change", [{"teacher_runtime": "torch"}, {"cache_teacher": True}])
def test_the_teacher_gives_the_same_wherever_it_runs(change):
    (a, _), (b, _) = fit(pair()), fit(pair(), **change)
    for name, value in numbers(a.model).items():
        assert np.allclose(value, numbers(b.model)[name], atol=1e-4), name


def test_a_running_teacher_leaves_no_files_that_a_kill_would_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    settings = configs.parse({"epochs": 1, "batch_size": 64, "cache_teacher": True})
    engine.train(pair(), settings, lambda event: seen.extend(tmp_path.iterdir()))
    assert seen == []


def test_a_cache_that_the_disk_cannot_hold_is_one_sentence(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OperationError, match=r"cache_teacher: cannot keep \d+ bytes in .*No space"):
        fit(pair(), cache_teacher=True)


def test_weights_and_epochs_of_terms_change_without_merging_again():
    _, events = fit(pair(), terms={"hint": {"weight": 2.0, "end_epoch": 1}}, log_steps=1)
    for step in of(events, "step"):
        hint = 2 * step["hint"] if step["epoch"] == 0 else 0
        assert ("hint" in step) == (step["epoch"] == 0)
        assert step["loss"] == pytest.approx(step["kl"] + hint, rel=1e-5)


def test_plain_fine_tuning_follows_when_the_terms_end():
    ends = {"kl": {"end_epoch": 1}, "hint": {"end_epoch": 1}}
    _, events = fit(pair(), terms=ends, labels={"weight": 1, "start_epoch": 1})
    assert {"kl", "hint"} <= of(events, "step")[0].keys()
    assert "labels" in of(events, "step")[-1] and "kl" not in of(events, "step")[-1]


def test_mutual_learning_trains_both():
    model = pair()
    before = numbers(model)
    fit(model, mutual=True, labels={"weight": 1})
    after = numbers(model)
    for name in ("conv1_weights", "teacher_conv1_weights", "teacher_bn1_mean"):
        assert not np.array_equal(before[name], after[name])


def test_two_runs_give_the_same_bits():
    (a, _), (b, _) = fit(pair()), fit(pair())
    for name, value in numbers(a.model).items():
        assert np.array_equal(value, numbers(b.model)[name]), name


def test_pieces_of_a_batch_add_up_to_the_batch():
    freeze = {"bn": "frozen", "epochs": 1}  # batch statistics depend on the pieces
    (a, _), (b, _) = fit(classifier(), **freeze), fit(classifier(), accumulate=4, **freeze)
    for name, value in numbers(a.model).items():
        assert np.allclose(value, numbers(b.model)[name], atol=1e-5), name


def test_frozen_batchnorm_keeps_its_statistics():
    model = classifier()
    fit(model, bn="frozen")
    assert np.array_equal(numbers(model)["bn1_var"], np.ones(4, np.float32))


def test_freeze_and_train_patterns():
    model = classifier()
    before = numbers(model)
    _, events = fit(model, freeze=["conv1", "bn1"], epochs=1)
    assert set(of(events, "start")[0]["frozen"]) == {"conv1_weights", "bn1_scale", "bn1_bias"}
    after = numbers(model)
    for name in ("conv1_weights", "bn1_scale", "bn1_mean", "bn1_var"):
        assert np.array_equal(before[name], after[name]), name
    with pytest.raises(NotFoundError, match="freeze: no parameter matches 'conv3'; near misses"):
        fit(classifier(), freeze=["conv3"])
    with pytest.raises(UserError, match="no parameter is left to train"):
        fit(classifier(), freeze=["."])


def test_layers_that_share_a_bias_in_the_file_train_their_own(tmp_path):
    model = classifier(10)
    own = model.graph.initializers["bn1_bias"]
    own.replace_all_uses_with(model.graph.initializers["fc_bias"])
    model.graph.initializers.pop("bn1_bias")
    outcome, _ = fit(model, epochs=1)
    trained = numbers(outcome.model)
    assert not np.array_equal(trained["fc_bias"], trained["fc_bias_1"])
    first = {
        node.op_type: node.inputs[2].name for node in outcome.model.graph if len(node.inputs) > 2
    }
    assert {first["BatchNormalization"], first["Gemm"]} == {"fc_bias", "fc_bias_1"}


def test_constants_of_a_loss_do_not_train():
    model = pair()
    scale = ir.Value(name="loss/hint/scale", const_value=ir.tensor(np.full(16, 2, np.float32)))
    model.graph.register_initializer(scale)
    node = next(node for node in model.graph if node.outputs[0].name == "projected")
    scaled = ir.node("Mul", [node.outputs[0], scale], name="loss/hint/scaled")
    node.outputs[0].replace_all_uses_with(scaled.outputs[0])
    scaled.replace_input_with(0, node.outputs[0])
    model.graph.insert_after(node, scaled)
    outcome, events = fit(model, epochs=1)
    (start,) = of(events, "start")
    assert start["frozen"]["loss/hint/scale"] == "constant of a loss"
    assert (numbers(outcome.model)["loss/hint/scale"] == 2).all()


def test_parameters_without_gradient_are_named():
    body = """
        scaled = Gemm(image, lost)
        whole = Cast<to=7>(scaled)
        back = Cast<to=1>(whole)
        both = Add(back, image)
        y = Gemm(both, found)
    """
    shapes = {"lost": (4, 4), "found": (4, 10)}
    model = build(body, "float[N,4] image", "float[N,10] y", shapes)
    _, events = fit(model, data="random?size=64", epochs=1)
    assert of(events, "unreached")[0]["names"] == ["lost"]


def test_softmax_at_the_end_is_seen_through():
    model = classifier(8, tail=" probabilities = Softmax(logits)\n")
    outcome, _ = fit(model, epochs=6)
    assert outcome.history[-1]["top1"] > 75


@pytest.mark.parametrize(("preprocess", "channels"), [("", 1), ("nhwc", 3)])
def test_cutmix_takes_whole_pixels_of_the_partner(preprocess, channels):
    shape = [6, 8, 8]
    shape.insert(channels, 3)
    image = torch.arange(6.0).view(-1, 1, 1, 1).expand(shape)
    batch = Batch({"image": image, "label": torch.arange(6)}, list(range(6)))
    config = configs.parse({"labels": {"cutmix": 1.0}, "preprocess": preprocess})
    mixed, mix = Objective(classifier(), None, config).mixed(batch, [1])
    found = mixed.entries["image"]
    assert (found.amax(channels) == found.amin(channels)).all()
    stays = (found == image).float().mean((1, 2, 3))
    other = mixed.entries[PARTNER] != mixed.entries["label"]
    assert torch.allclose(stays[other], torch.tensor(mix.part)) and 0 < mix.part < 1


@pytest.mark.parametrize(
    "labels", [{"smoothing": 0.1}, {"mixup": 0.2}, {"cutmix": 1.0}, {"loss": "ce"}]
)
def test_shaped_labels_train(labels):
    outcome, _ = fit(classifier(8), epochs=6, labels=labels)
    assert outcome.history[-1]["top1"] > 50


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_optimizer_trains(name):
    lr = {"sgd": 0.1}.get(name, 0.01)
    _, events = fit(classifier(), optimizer={"name": name, "lr": lr}, log_steps=1)
    losses = [step["loss"] for step in of(events, "step")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_ema_averages_and_is_what_is_written():
    plain, averaged = classifier(), classifier()
    fit(plain)
    fit(averaged, ema=0.99)
    a, b = numbers(plain)["fc_weights"], numbers(averaged)["fc_weights"]
    assert not np.allclose(a, b) and np.abs(a).sum() > np.abs(b).sum()


def test_a_loss_that_is_not_finite_stops_and_names_the_value():
    model = classifier()
    broken = model.graph.initializers["bn1_var"]
    broken.const_value = type(broken.const_value)(np.full(4, -1.0, np.float32), name="bn1_var")
    before = numbers(model)["conv1_weights"]
    with pytest.raises(OperationError, match=r"the loss is nan at epoch 1, step 1.*'b1'"):
        fit(model, bn="frozen")
    assert np.array_equal(before, numbers(model)["conv1_weights"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5000}, "1437 samples, less than one batch of 5000"),
        ({"data": "random?classes=11"}, "sample 10 has label 10, the model has 10 classes"),
        ({"terms": {"k": {"weight": 1}}}, "terms.k: the model's loss terms are: none"),
        ({"preprocess": "resize=9"}, r"input 'image' has shape \[batch, 1, 8, 8\], the data gives"),
        ({"preprocess": "normalise=half"}, "near misses: normalize"),
        ({"labels": {"weight": 0}}, "no loss term is active in epoch 1"),
        ({"amp": "fp16"}, "amp fp16 needs a CUDA device"),
        ({"cache_teacher": True, "preprocess": "flip"}, None),
    ],
)
def test_bad_settings_are_one_sentence(settings, message):
    if message is None:
        with pytest.raises(UserError, match="cache_teacher needs the same images"):
            fit(pair(), **settings)
        return
    with pytest.raises(UserError, match=message) as caught:
        fit(classifier(), **settings)
    assert "\n" not in str(caught.value)


def test_init_from_reports_what_fits(tmp_path):
    from onnxslim_kd import model as model_io

    model_io.save(classifier(4, seed=9), tmp_path / "other.onnx")
    model = pair(4)
    _, events = fit(model, init_from=tmp_path / "other.onnx", epochs=1)
    (init,) = of(events, "init")
    assert init["loaded"] == 9 and init["other_shape"] == {}
    assert "teacher_conv1_weights" in init["missing"]
    with pytest.raises(UserError, match="no initializer has the same name and shape"):
        fit(
            build(" y = Gemm(image, w)", "float[N,4] image", "float[N,2] y", {"w": (4, 2)}),
            init_from=tmp_path / "other.onnx",
        )


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_bf16_and_compile_options_reach_the_step():
    outcome, _ = fit(classifier(8), epochs=4, amp="bf16")
    assert outcome.history[-1]["top1"] > 50


def test_layout_and_clipping_change_little():
    (a, _), (b, _) = fit(classifier()), fit(classifier(), channels_last=False)
    for name, value in numbers(a.model).items():
        assert np.allclose(value, numbers(b.model)[name], atol=1e-4), name
    still = {"clip_norm": 1e-6, "optimizer": {"lr": 0.1, "weight_decay": 0}}
    clipped, _ = fit(classifier(), **still)
    start, end = numbers(classifier())["fc_weights"], numbers(clipped.model)["fc_weights"]
    assert np.allclose(start, end, atol=1e-4)


def test_groups_have_their_own_settings():
    groups = [{"match": "fc", "lr_factor": 0.0}, {"match": "conv", "weight_decay": 0.0}]
    model = classifier()
    before = numbers(model)
    fit(model, groups=groups, epochs=1)
    after = numbers(model)
    assert np.array_equal(before["fc_weights"], after["fc_weights"])
    assert not np.array_equal(before["conv1_weights"], after["conv1_weights"])


def test_weight_decay_leaves_norms_and_biases_alone_unless_told():
    def start():
        model = classifier()
        bias = model.graph.initializers["conv2_bias"]  # [8, 1, 1]
        bias.const_value = ir.Tensor(np.ones((8, 1, 1), np.float32), name="conv2_bias")
        return model

    decayed, before = {}, numbers(start())
    for name, decay in (("spared", {}), ("all", {"decay_vectors": True})):
        model = start()
        settings = {"lr": 0.1, "weight_decay": 0.5, "no_decay": ["fc_w"], **decay}
        labels = {"loss": f"{__name__}:nothing_to_learn"}
        fit(model, epochs=1, optimizer=settings, labels=labels)
        decayed[name] = numbers(model)
    for name in ("bn1_scale", "conv2_bias"):
        assert np.array_equal(decayed["spared"][name], before[name])
        assert decayed["all"][name].sum() < before[name].sum()
    assert np.array_equal(decayed["all"]["fc_weights"], before["fc_weights"])
    size = np.abs(decayed["spared"]["conv1_weights"]).sum()
    assert size < np.abs(before["conv1_weights"]).sum()


def nothing_to_learn(outputs, entries):
    return next(iter(outputs.values())).sum() * 0


def test_a_loss_and_a_metric_of_the_users():
    settings = {"labels": {"loss": f"{__name__}:own_loss"}, "metric": f"{__name__}:own_metric"}
    outcome, _ = fit(classifier(8), epochs=4, **settings)
    assert outcome.history[-1]["right"] > 0.4


def own_loss(outputs, entries):
    return torch.nn.functional.cross_entropy(outputs["logits"], entries["label"])


def own_metric(outputs, entries):
    return {"right": float((outputs["logits"].argmax(1) == entries["label"]).mean())}


def test_the_loss_as_metric_needs_no_labels():
    outcome, _ = fit(pair(), metric="loss", val_data="digits?split=test", epochs=3)
    losses = [epoch["val_loss"] for epoch in outcome.history]
    assert losses[-1] < losses[0]


def test_the_loss_of_no_samples_is_no_number(tmp_path):
    empty = {"x": np.zeros((0, 1, 8, 8), np.float32), "y": np.zeros(0, np.int64)}
    np.savez(tmp_path / "empty.npz", **empty)
    with pytest.raises(UserError, match="the evaluation data has no samples"):
        fit(classifier(), metric="loss", val_data=f"npz:{tmp_path / 'empty.npz'}")


def test_statistics_of_a_single_number_are_refused_in_one_sentence():
    body = """
     p = GlobalAveragePool(image)
     n = BatchNormalization(p, scale, bias, mean, var)
     f = Flatten(n)
     logits = Gemm<transB=1>(f, fc_weights, fc_bias)
    """
    shapes = {name: (1,) for name in ("scale", "bias", "mean", "var")}
    shapes |= {"fc_weights": (10, 1), "fc_bias": (10,)}
    model = build(body, "float[N,1,8,8] image", "float[N,10] logits", shapes)
    with pytest.raises(OperationError, match="on this batch: Expected more than 1 value per chan"):
        fit(model, batch_size=1)


def test_a_pruned_file_shapes_the_graph(tmp_path):
    import onnxslim_kd
    from onnxslim_kd import model as model_io
    from onnxslim_kd.passes.prune import Choice

    onnxslim_kd.prune(classifier(8), Choice(pattern="conv", ratio=0.5), tmp_path / "half.onnx")
    half = model_io.load(tmp_path / "half.onnx")
    settings = {"init_from": tmp_path / "half.onnx", "init_shapes": True, "freeze": ["conv"]}
    with pytest.raises(OperationError, match=r"does not run on this batch: mat1 and mat2 shapes"):
        fit(pair(8), **settings)  # the hint's projection still reads the wide map
    model = classifier(8)
    fit(model, epochs=1, **settings)
    for name in ("conv1_weights", "conv2_weights"):
        assert np.array_equal(numbers(model)[name], numbers(half)[name])


def test_a_fixed_batch_of_one_is_freed():
    model = classifier()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = type(value.shape)([1, *value.shape[1:]])
    outcome, _ = fit(model, epochs=1)
    assert not isinstance(outcome.model.graph.inputs[0].shape[0], int)
    model = pair()
    model.graph.inputs[0].shape = type(model.graph.inputs[0].shape)([4, 1, 8, 8])
    with pytest.raises(UserError, match="'image' has a fixed batch of 4, training computes 64"):
        fit(model)


def test_labels_that_only_a_batch_shows_are_checked(tmp_path, monkeypatch):
    (tmp_path / "twelve.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return [(torch.zeros(1, 8, 8), 12 if i == 9 else 3) for i in range(64)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="sample 9 has label 12, the model has 10 classes"):
        fit(classifier(), data="twelve:make")


def test_a_run_that_blows_up_names_what_did_and_not_the_statistics_it_spoilt():
    with pytest.raises(OperationError, match="the first value that is not finite is 'c2'"):
        fit(classifier(), epochs=1, optimizer={"lr": 1e30})
