"""Every loss of the table at the points where losses break, at every opset, at any batch."""

import numpy as np
import pytest
import test_losses_custom
import test_losses_formulas
import torch
from losses_models import check, loss_model, newest_opset, runner
from onnx_torch import gradients
from test_losses_golden import kinds

from onnxslim_kd.passes import losses

LOGITS = {"s": (4, 6), "t": (4, 6)}
MAPS = {"s": (4, 6, 4, 4), "t": (4, 6, 4, 4)}
EXAMPLES = {
    "l1": ("l1:s=t", MAPS),
    "l2": ("l2:s=t", MAPS),
    "smooth_l1": ("smooth_l1:s=t", MAPS),
    "cosine": ("cosine:s=t", MAPS),
    "fsp": ("fsp:s+s=t+t", MAPS),
    "at": ("at:s=t", MAPS),
    "cwd": ("cwd:s=t", MAPS),
    "soft_label": ("soft_label:s=t", LOGITS),
    "kl": ("kl:s=t", LOGITS),
    "js": ("js:s=t", LOGITS),
    "dml": ("dml:s=t", LOGITS),
    "dist": ("dist:s=t", LOGITS),
    "ce": ("ce:s", LOGITS),
    "dkd": ("dkd:s=t", LOGITS),
    "skd": ("skd:s=t,alpha=0.9", LOGITS),
    "wsl": ("wsl:s=t", LOGITS),
    "rkd_distance": ("rkd_distance:s=t", MAPS),
    "rkd_angle": ("rkd_angle:s=t", MAPS),
    "mgd": ("mgd:s=t", MAPS),
    "pefd": ("pefd:s=t", MAPS),
    "overhaul": ("overhaul:s=t", MAPS),
    "afd": ("afd:s+s=t+t+t,qk_dim=8", MAPS),
    "yolov3": ("yolov3:s=t,anchors=1,classes=1", MAPS),
    "custom": ("custom:s=t,function=test_losses_custom:mean_gap", LOGITS),
}
MORE = {
    "dml probabilities": ("dml:s=t,act=none", LOGITS),
    "dml sigmoid": ("dml:s=t,act=sigmoid", LOGITS),
    "dml detach": ("dml:s=t,detach=true", LOGITS),
    "dkd teacher": ("dkd:s=t,target=teacher,temperature=4,beta=8", LOGITS),
    "skd own multiplier": ("skd:s=t", LOGITS),
    "ce maps": ("ce:s,epsilon=0.1", MAPS),
    "ce soft": ("ce:s,soft=true", LOGITS),
    "kl maps": ("kl:s=t", MAPS),
    "dkd maps": ("dkd:s=t", MAPS),
    "wsl maps": ("wsl:s=t", MAPS),
    "pefd gap": ("pefd:s=t,mode=gap", MAPS),
    "overhaul margin": ("overhaul:s=t,margin=-0.1", MAPS),
    "at p=3": ("at:s=t,p=3", MAPS),
    "rkd pooled": ("rkd_angle:s=t,target_size=3", MAPS),
}
ALL = {**EXAMPLES, **MORE}


def labels(shape: tuple[int, ...]) -> np.ndarray:
    """Classes, and in the first place none."""
    found = np.arange(np.prod(shape)).reshape(shape) % 6
    found.flat[0] = -1
    return found


def feeds_for(model, arrays):
    batch = len(arrays["s"])
    feeds = dict(arrays)
    for given in model.graph.inputs:
        shape = tuple(d if isinstance(d, int) else batch for d in given.shape)
        if given.name == "label":
            feeds["label"] = labels(shape)
        elif given.name == "label_soft":
            feeds["label_soft"] = np.eye(shape[1], dtype=np.float32)[labels(shape[:1])]
        elif given.name not in feeds:
            feeds[given.name] = np.ones(shape, np.float32)
    return {name: feeds[name] for name in (v.name for v in model.graph.inputs)}


def ordinary(case, batch=4):
    rng = np.random.default_rng(3)
    sizes = {name: (batch, *shape[1:]) for name, shape in ALL[case][1].items()}
    arrays = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    if case == "dml probabilities":
        arrays = {name: np.abs(a) / np.abs(a).sum(1, keepdims=True) for name, a in arrays.items()}
    return arrays


def one_hot(shape, at):
    found = np.zeros(shape, np.float32)
    found.reshape(shape[0], -1)[:, at] = 1
    return found


POINTS = {
    "identical": lambda s, t: (s, s),
    "zero student": lambda s, t: (0 * s, t),
    "zero teacher": lambda s, t: (s, 0 * t),
    "all zero": lambda s, t: (0 * s, 0 * t),
    "constant rows": lambda s, t: (0 * s + 0.3, t),
    "equal samples": lambda s, t: (0 * s + s[:1], t),
    "one-hot teacher": lambda s, t: (s, one_hot(t.shape, 2)),
    "certain teacher": lambda s, t: (s, 1e4 * one_hot(t.shape, 2)),
    "certain and wrong": lambda s, t: (1e4 * one_hot(s.shape, 3), 1e4 * one_hot(t.shape, 2)),
    "logits of 1e4": lambda s, t: (1e4 * np.sign(s), 1e4 * np.sign(t)),
    "batch of one": lambda s, t: (s[:1], t[:1]),
    "one zero sample": lambda s, t: (s[:1] * 0, t[:1] * 0),
}


@pytest.mark.parametrize("case", ALL)
def test_finite_at_nasty_points(case):
    text, shapes = ALL[case]
    model = loss_model(text, {name: ("N", *shape[1:]) for name, shape in shapes.items()})
    arrays, run = ordinary(case), runner(model)
    trained = [n for n in model.graph.initializers if n.startswith("loss_") and "._" not in n]
    sides = [n for n in ("s", "t") if n in [v.name for v in model.graph.inputs]]
    for name, point in POINTS.items():
        if case == "dml probabilities" and "1e4" in name:
            continue  # these are no probabilities
        s, t = point(arrays["s"], arrays["t"])
        feeds = feeds_for(model, {"s": s, "t": t})
        loss, found = gradients(model, feeds, sides + trained, dtype=torch.float32)
        assert np.isfinite(run(feeds)), name
        assert np.isfinite(loss), name
        for key, gradient in found.items():
            assert np.isfinite(gradient).all(), (name, key)


@pytest.mark.parametrize("case", ALL)
def test_same_value_at_every_opset_and_batch(case):
    text, shapes = ALL[case]
    free = {name: ("N", *shape[1:]) for name, shape in shapes.items()}
    models = [loss_model(text, free, opset=opset) for opset in (17, 18, 21, newest_opset())]
    for model in models:
        check(model)
    runs = [runner(model) for model in models]
    for batch in (2, 5):
        feeds = feeds_for(models[0], ordinary(case, batch))
        expected, _ = gradients(models[0], feeds, [])
        assert [run(feeds) for run in runs] == pytest.approx([expected] * 4, rel=2e-5, abs=1e-6)


def test_every_loss_is_here_and_has_a_golden_or_a_formula():
    assert EXAMPLES.keys() == losses.LOSSES.keys()
    proven = kinds() | test_losses_formulas.FORMULAS.keys() | test_losses_custom.KINDS
    assert proven == losses.LOSSES.keys()
