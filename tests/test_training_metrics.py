import sys

import numpy as np
import pytest

from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.training import metrics
from onnxslim_kd.training.optim import Ema


def measured(metric, *batches):
    for outputs, entries in batches:
        metric.update({"out": np.asarray(outputs)}, entries)
    return metric.result()


def test_accuracy_counts_over_batches_and_skips_unlabelled():
    scores = np.eye(8)[[0, 1, 2, 3]] + np.linspace(0, 0.1, 8)
    one = (scores, {"label": np.array([0, 1, 2, -1])})
    two = (scores[:2], {"label": np.array([7, 0])})  # second best, worst
    found = measured(metrics.Accuracy(), one, two)
    assert found == {"top1": pytest.approx(60), "top5": pytest.approx(80)}


@pytest.mark.parametrize("number", [0.0, np.nan])
def test_a_constant_output_is_not_right(number):
    batch = np.full((4, 3), number), {"label": np.zeros(4, int)}
    assert measured(metrics.Accuracy(), batch) == {"top1": 0}


@pytest.mark.parametrize(
    ("scores", "labels", "axis"),
    [
        ((4, 7), (4,), 1),
        ((4, 7), (4, 1), 1),
        ((4, 7, 1, 1), (4,), 1),
        ((4, 9, 7), (4, 9), 2),
        ((4, 7, 9), (4, 9), 1),
        ((4, 9, 9), (4, 9), 2),
        ((4, 7, 5, 6), (4, 5, 6), 1),
        ((4, 5, 6, 7), (4, 5, 6), 3),
        ((4, 7), (4, 7), None),
        ((4, 9, 7), (4,), None),
        ((4,), (4,), None),
    ],
)
def test_labels_tell_which_axis_the_classes_are(scores, labels, axis):
    assert metrics.class_axis(scores, labels) == axis


def test_accuracy_counts_tokens_in_both_layouts():
    scores = np.random.default_rng(0).standard_normal((3, 5, 8))
    entries = {"label": scores.argmax(-1)}
    for output in (scores, np.moveaxis(scores, -1, 1)):
        assert measured(metrics.Accuracy(), (output, entries)) == {"top1": 100, "top5": 100}


def test_accuracy_wants_a_score_per_class():
    with pytest.raises(
        UserError, match=r"the output \[4\] has no score per class for labels \[4\]"
    ):
        measured(metrics.Accuracy(), (np.zeros(4), {"label": np.zeros(4, int)}))


def test_mean_iou_against_a_hand_count():
    truth = np.array([[[0, 0, 1, -1], [0, 1, 1, 2]]])
    found = np.array([[[0, 1, 1, 2], [0, 1, 0, 2]]])
    # class 0: 2 of 4, class 1: 2 of 4, class 2: 1 of 1
    scores = np.moveaxis(np.eye(4)[found], -1, 1)
    for output in (found, scores):
        result = measured(metrics.MeanIoU(), (output, {"mask": truth}))
        assert result == {
            "miou": pytest.approx(100 * (0.5 + 0.5 + 1) / 3),
            "pixels": pytest.approx(100 * 5 / 7),
        }


def test_map_is_perfect_for_perfect_boxes():
    pytest.importorskip("pycocotools")
    boxes = np.array([[[10, 10, 50, 60, 1], [30, 5, 90, 70, 0]], [[1, 2, 40, 50, 0], [-1] * 5]])
    rows = np.concatenate([boxes[..., :4], np.full((2, 2, 1), 0.9), boxes[..., 4:]], -1)
    rows[1, 1, 4] = 0
    result = measured(metrics.CocoMap(), (rows, {"boxes": boxes.astype(float)}))
    assert result == {"map": pytest.approx(100), "map50": pytest.approx(100)}


def test_map_without_pycocotools_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"pip install 'onnxslim-kd\[detection\]'"):
        metrics.CocoMap().result()


def test_map_refuses_other_outputs():
    with pytest.raises(UserError, match=r"needs an output \[batch, boxes, 6\] .* got \[2, 10\]"):
        measured(metrics.CocoMap(), (np.zeros((2, 10)), {"boxes": np.zeros((2, 0, 5))}))


def mean_output(outputs, entries):
    return {"mean": float(next(iter(outputs.values())).mean())}


def nothing(outputs, entries):
    return float("nan")


def test_a_users_function_is_averaged_over_samples(monkeypatch):
    metric = metrics.make(f"{__name__}:mean_output", {})
    found = measured(metric, (np.zeros((3, 2)), {}), (np.ones((1, 2)), {}))
    assert found == {"mean": pytest.approx(0.25)}
    with pytest.raises(OperationError, match="metric nothing is nan after 0 samples"):
        measured(metrics.make(f"{__name__}:nothing", {}), (np.zeros((1, 1)), {}))


def test_auto_goes_by_the_labels():
    assert isinstance(metrics.make("auto", {"image": 0, "label": 0}), metrics.Accuracy)
    assert isinstance(metrics.make("auto", {"image": 0, "mask": 0}), metrics.MeanIoU)
    with pytest.raises(UserError, match="no label, mask or boxes to measure by"):
        metrics.make("auto", {"image": 0})
    with pytest.raises(UserError, match=r"metric 'top' is not one of .* near misses: top1"):
        metrics.make("top", {"label": 0})


def test_the_moving_average_follows_slowly():
    import torch

    tensors = {"w": torch.zeros(1)}
    ema = Ema(0.5, tensors)
    tensors["w"] += 1
    ema.update(tensors, 1000)
    assert float(ema.shadow["w"]) == pytest.approx(0.5)
    ema.update(tensors, 0)  # early steps count more: decay 1/10
    assert float(ema.shadow["w"]) == pytest.approx(0.95)
