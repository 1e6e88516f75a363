import math

import pytest

from onnxslim_kd.errors import UserError
from onnxslim_kd.training import config as configs
from onnxslim_kd.training.schedules import Schedule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "setting 'epoch' is not known; near misses: epochs"),
        ({"optimizer": {"lrr": 1}}, "setting 'optimizer.lrr' is not known; near misses: lr"),
        ({"terms": {"kl": {"wight": 1}}}, "'terms.kl.wight' is not known; near misses: weight"),
        (
            {"groups": [{"match": "a", "lr_facto": 1}]},
            "'groups.0.lr_facto' is not known; near misses: lr_fac",
        ),
        ({"epochs": 0}, "setting 'epochs': Input should be greater than or equal to 1, got 0"),
        ({"bn": "of"}, "setting 'bn': Input should be 'auto', 'keep', .* got 'of'"),
        ({"batch_size": 10, "accumulate": 4}, "batch_size 10 does not divide by accumulate 4"),
        ({"plan": "p.json"}, "plan has no effect without like"),
        ({"init_shapes": True}, "init_shapes has no effect without init_from"),
        (
            {"epochs": 2, "cuts": [{"epoch": 2, "pattern": "a", "ratio": 0.5}]},
            "a cut after 2 epochs never comes: there are 2",
        ),
        (
            {"optimizer": {"nesterov": True, "momentum": 0}},
            "'optimizer': nesterov needs a momentum",
        ),
        ({"optimizer": {"betas": [0.9, 1]}}, "'optimizer.betas.1': .* less than 1"),
        ({"labels": {"start_epoch": 3, "end_epoch": 2}}, "it ends at epoch 2 and starts at 3"),
        ({"labels": {"mixup": 1, "cutmix": 1}}, "mixup and labels.cutmix exclude each other"),
        ({"schedule": {"kind": "piecewise"}}, "piecewise needs boundaries"),
        (
            {"schedule": {"kind": "piecewise", "boundaries": [3, 1]}},
            r"'schedule': boundaries must rise, got .*'boundaries': \[3, 1\]",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.parse(settings)
    assert "\n" not in str(caught.value)


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("epochs: 3\noptimizer: {lr: 0.1}\ngroups: [{match: fc}]\n")
    overrides = ["optimizer.lr=0.2", "labels.smoothing=0.1", "groups.0.lr_factor=2", "freeze=[a]"]
    config = configs.parse(configs.read(path, overrides))
    assert (config.epochs, config.optimizer.lr, config.labels.smoothing) == (3, 0.2, 0.1)
    assert config.groups[0].lr_factor == 2 and config.freeze == ("a",)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [", [], "train.yaml: is not YAML: .* in line 1, column 5"),
        ("", ["a=["], r"override 'a=\[' is not YAML: .* in line 1, column 2"),
        ("- 1", [], "must hold settings, got a list"),
        ("epochs: 1", ["epochs"], "override 'epochs' must be key=value"),
        ("epochs: 1", ["epochs.a=1"], "override 'epochs.a' does not fit the settings"),
        ("groups: []", ["groups.3.match=a"], "override 'groups.3.match' does not fit"),
    ],
)
def test_broken_files_and_overrides(tmp_path, text, overrides, message):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        configs.read(path, overrides)
    assert "\n" not in str(caught.value)


def rates(epochs=10, **settings):
    schedule = Schedule(**settings)
    return [schedule.rate(0.1, epoch, epochs) for epoch in range(epochs + 1)]


def test_schedules():
    assert rates(kind="constant") == [0.1] * 11
    cosine = rates(kind="cosine")
    assert cosine[5] == pytest.approx(0.05) and cosine[10] == pytest.approx(0)
    assert cosine[3] == pytest.approx(0.05 * (1 + math.cos(math.pi * 0.3)))
    assert rates(kind="cosine", final=0.1)[10] == pytest.approx(0.01)
    assert rates(kind="linear")[3] == pytest.approx(0.07)
    assert rates(kind="poly", power=2)[5] == pytest.approx(0.025)
    steps = rates(kind="piecewise", boundaries=(3, 6))
    assert steps[2:7] == pytest.approx([0.1, 0.01, 0.01, 0.01, 0.001])
    steps = rates(kind="piecewise", boundaries=(3,), values=(0.4, 0.2))
    assert steps[2:4] == [0.4, 0.2]


def test_warm_up_rises_from_zero_and_then_the_schedule_begins():
    found = rates(kind="linear", warmup=2)
    assert found[:3] == pytest.approx([0, 0.05, 0.1])
    assert found[6] == pytest.approx(0.05) and found[10] == pytest.approx(0)
    found = rates(kind="piecewise", boundaries=(4,), values=(0.4, 0.2), warmup=2)
    assert found[:5] == pytest.approx([0, 0.2, 0.4, 0.4, 0.2])
