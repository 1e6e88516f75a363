"""Every distillation loss trains: it goes down, its helpers change, the teacher does not."""

import numpy as np
import pytest
from training_models import classifier, numbers

from onnxslim_kd import roles
from onnxslim_kd.passes.losses import LOSSES
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.training import config as configs
from onnxslim_kd.training import engine

MAPS = ("l1", "l2", "smooth_l1", "cosine", "at", "cwd", "mgd", "overhaul")
LOGITS = ("soft_label", "kl", "js", "dml", "dist", "dkd", "skd", "wsl")
TERMS = {
    **{kind: f"{kind}:c2=c2" for kind in MAPS},
    **{kind: f"{kind}:logits=logits" for kind in LOGITS},
    "ce": "ce:logits",
    "fsp": "fsp:r1+r2=r1+r2",
    "rkd_distance": "rkd_distance:flat=flat",
    "rkd_angle": "rkd_angle:flat=flat",
    "pefd": "pefd:flat=flat",
    "afd": "afd:r1+r2=r1+r2,qk_dim=8",
    "yolov3": "yolov3:c2=c2,anchors=1,classes=11,weight=1",
}


def test_every_loss_of_the_table_is_here():
    assert TERMS.keys() == LOSSES.keys() - {"custom"}  # the user's own graph, tested with merge


@pytest.fixture(scope="module")
def teacher():
    """A classifier that knows digits."""
    settings = {"epochs": 6, "optimizer": {"lr": 0.1}, "batch_size": 32, "threads": 1}
    return engine.train(classifier(8, seed=1), configs.parse(settings)).model


@pytest.mark.parametrize("kind", TERMS)
def test_it_goes_down_and_its_helpers_learn(kind, teacher):
    model = merge(classifier(8), teacher, [TERMS[kind]])
    before = numbers(model)
    events = []
    settings = {
        "epochs": 2,
        "batch_size": 32,
        "optimizer": {"name": "adam", "lr": 0.01},
        "log_steps": 1,
        "threads": 1,
    }
    engine.train(model, configs.parse(settings), events.append)
    losses = [event[kind] for event in events if event["event"] == "step"]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
    after = numbers(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    helpers = set(roles.read(model).loss_parameters)
    assert helpers <= changed, helpers - changed
    assert "conv2_weights" in changed
    assert not any(name.startswith("teacher_") for name in changed)


def test_unlabelled_samples_change_no_loss_on_labels(tmp_path):
    """A batch half of which has no label has the gradient of the labelled half alone."""
    images, labels = np.random.default_rng(0).random((8, 1, 8, 8), np.float32), np.arange(8)
    np.savez(tmp_path / "half.npz", x=images, y=np.where(np.arange(8) % 2, -1, labels))
    np.savez(tmp_path / "labelled.npz", x=images[::2], y=labels[::2])
    found = []
    for name, size in (("half", 8), ("labelled", 4)):
        model = merge(classifier(4), classifier(4, seed=1), ["ce:logits"])
        settings = {
            "data": f"npz:{tmp_path / name}.npz",
            "batch_size": size,
            "epochs": 1,
            "bn": "frozen",
            "optimizer": {"lr": 1.0},
        }
        engine.train(model, configs.parse(settings))
        found.append(numbers(model)["fc_weights"])
    assert np.allclose(*found, atol=1e-6)
    assert not np.allclose(found[0], numbers(classifier(4))["fc_weights"])
