"""Pruning while training: several small cuts, and group sparsity before one."""

import numpy as np
import pytest
import torch
from training_models import classifier, numbers, pair

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import NotFoundError, UserError
from onnxslim_kd.runtime import Session
from onnxslim_kd.training import config as configs
from onnxslim_kd.training import engine, shrink
from onnxslim_kd.training.lowering import lower

SETTINGS = {"epochs": 4, "batch_size": 64, "optimizer": {"lr": 0.1}, "seed": 3, "threads": 1}
CUTS = [
    {"epoch": 1, "pattern": "conv1", "ratio": 0.25},
    {"epoch": 3, "pattern": "conv", "ratio": 0.5},
]


def fit(model, listen=lambda event: None, **settings):
    return engine.train(model, configs.parse(SETTINGS | settings), listen)


def test_a_schedule_is_equal_cuts_that_multiply_up():
    cuts = shrink.parse("conv.*=0.5@0,2,4")
    assert [cut["epoch"] for cut in cuts] == [0, 2, 4]
    assert (1 - cuts[0]["ratio"]) ** 3 == pytest.approx(0.5)
    for text in ("conv", "conv=2@1", "conv=0.5", "=0.5@1", "conv=0.5@a"):
        with pytest.raises(UserError, match="must be PATTERN=RATIO@EPOCHS"):
            shrink.parse(text)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_graph_shrinks_and_training_goes_on(optimizer):
    lr = {"sgd": 0.1, "adam": 0.01}[optimizer]
    outcome = fit(
        classifier(8), cuts=CUTS, ema=0.9, optimizer={"name": optimizer, "lr": lr}, epochs=6
    )
    after = numbers(outcome.model)
    assert after["conv1_weights"].shape == (3, 1, 3, 3) and after["bn1_var"].shape == (3,)
    assert after["conv2_weights"].shape == (8, 3, 3, 3) and after["fc_weights"].shape == (10, 8)
    assert outcome.history[-1]["top1"] > 25
    Session(outcome.model).run({"image": np.zeros((2, 1, 8, 8), np.float32)})


def test_momentum_is_cut_with_its_weights():
    model = classifier(8)
    state = {}
    for name, array in numbers(model).items():
        if array.dtype == np.float32:
            state[f"weight/{name}"] = torch.from_numpy(array.copy())
            state[f"optimizer/{name}/momentum_buffer"] = torch.from_numpy(array * 3)
            state[f"optimizer/{name}/step"] = torch.tensor(7.0)
    plan = shrink.decide(model, configs.Cut(epoch=0, pattern="conv1", ratio=0.5))
    cut = shrink.sliced(model, state, plan)
    for name in ("conv1_weights", "bn1_scale", "conv2_weights", "fc_weights"):
        assert torch.equal(cut[f"weight/{name}"] * 3, cut[f"optimizer/{name}/momentum_buffer"])
        assert cut[f"optimizer/{name}/step"] == 7
    assert cut["weight/conv2_weights"].shape == (16, 4, 3, 3)


def test_a_merged_student_is_cut_and_the_teacher_is_not():
    outcome = fit(pair(8, 8), cuts=[{"epoch": 1, "pattern": "conv1", "ratio": 0.5}])
    after = numbers(outcome.model)
    assert after["conv1_weights"].shape[0] == 4
    assert after["teacher_conv1_weights"].shape[0] == 8


def test_a_resumed_run_replays_the_cuts(tmp_path):
    class Killed(Exception):
        pass

    def kill(event):
        if event["event"] == "tick" and (event["epoch"], event["step"]) == (3, 9):
            raise Killed

    undisturbed = numbers(fit(classifier(8), cuts=CUTS).model)
    with pytest.raises(Killed):
        fit(classifier(8), kill, cuts=CUTS, checkpoint=tmp_path, checkpoint_steps=4)
    assert (tmp_path / "3-8").is_dir()
    resumed = numbers(fit(classifier(8), cuts=CUTS, checkpoint=tmp_path).model)
    assert undisturbed.keys() == resumed.keys()
    for name, value in undisturbed.items():
        assert np.array_equal(value, resumed[name]), name


def test_the_best_model_is_of_the_width_that_the_last_cut_left(tmp_path):
    cut = {"epoch": 3, "pattern": "conv1", "ratio": 0.75}
    outcome = fit(classifier(8), cuts=[cut], checkpoint=tmp_path)
    scores = [record["top1"] for record in outcome.history]
    assert scores[-1] < max(scores)  # the cut cost more than one epoch brings back
    best = numbers(model_io.load(tmp_path / "best.onnx"))
    assert best["conv1_weights"].shape == numbers(outcome.model)["conv1_weights"].shape


def test_a_cut_that_matches_nothing_is_refused():
    with pytest.raises(NotFoundError, match="konv"):
        fit(classifier(), cuts=[{"epoch": 0, "pattern": "konv", "ratio": 0.5}])


def test_the_pull_is_the_gradient_of_the_sum_of_group_norms():
    model = classifier(4)
    lowered = lower(model)
    parameters = lowered.parameters_by_name
    sparsity = shrink.GroupSparsity(
        model, parameters, configs.Sparsity(pattern="conv1", strength=0.5)
    )
    assert sparsity.count == 4
    first, second = parameters["conv1_weights"], parameters["conv2_weights"]
    squares = first.square().sum((1, 2, 3)) + second.square().sum((0, 2, 3))
    squares = squares + sum(parameters[f"bn1_{name}"].square() for name in ("scale", "bias"))
    wanted = torch.autograd.grad(0.5 * squares.sqrt().sum(), [first, second])
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    sparsity.apply()
    assert torch.allclose(sparsity.norms(), squares.sqrt())
    assert torch.allclose(first.grad, wanted[0]) and torch.allclose(second.grad, wanted[1])
    assert float(parameters["fc_weights"].grad.abs().sum()) == 0


def test_sparsity_of_what_does_not_train_is_refused():
    settings = {"sparsity": {"pattern": "conv1"}, "train": ["fc"], "freeze": ["conv", "bn"]}
    with pytest.raises(UserError, match="sparsity: nothing of 'conv1' trains"):
        fit(classifier(), **settings)


def test_sparsity_shrinks_channels_so_that_a_cut_loses_less():
    def norms(**settings):
        model = fit(classifier(8), epochs=6, **settings).model
        return np.sort(np.linalg.norm(numbers(model)["conv1_weights"].reshape(8, -1), axis=1))

    plain = norms()
    sparse = norms(sparsity={"pattern": "conv1", "strength": 0.01})
    assert sparse[0] / sparse[-1] < plain[0] / plain[-1] and sparse.sum() < plain.sum()
