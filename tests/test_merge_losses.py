"""Every loss in a merged graph: valid, runs at two batch sizes, and changes neither network."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from merge_models import net, run

from onnxslim_kd import roles
from onnxslim_kd.errors import NotFoundError, UserError
from onnxslim_kd.passes.losses import LOSSES
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.verify_merge import verify_merge

# net() has maps r1 [N, 12, 8, 8] and r2 [N, 12, 4, 4], and logits y [N, 5]
TERMS = {
    **{kind: f"{kind}:y=y" for kind in LOSSES},
    **{kind: f"{kind}:r2=r2" for kind in ("at", "cwd", "mgd", "overhaul")},
    **{kind: f"{kind}:r1+r2=r1+r2" for kind in ("fsp", "afd")},
    "ce": "ce:y",
    "yolov3": "yolov3:r2=r2,anchors=2,classes=1",
    "custom": "custom:y=y,function=test_merge_losses:squared",
}


def squared(scope, students, teachers):
    """The mean of the squared differences, as a user would write it."""
    return scope.mean(scope.square(scope.op("Sub", students[0], teachers[0])))


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss(kind):
    student, teacher = net(width=12), net(width=12, batch="M", seed=1)
    merged = merge(student, teacher, [TERMS[kind], f"{TERMS[kind]},name=again,weight=2"])
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    proof = verify_merge(merged, student, teacher)
    assert [size["x"][0] for size in proof.sizes] == [2, 3]
    terms = roles.read(merged).terms
    assert [(term.name, term.kind) for term in terms] == [(kind, kind), ("again", kind)]
    total = sum(term.weight * proof.losses[term.output] for term in terms)
    assert proof.losses["loss"] == pytest.approx(total, rel=1e-5)


def test_a_loss_on_labels_may_stand_on_a_teacher():
    """For mutual learning: each network has its own cross-entropy."""
    merged = merge(net(), net(seed=1), ["ce:y", "ce:teacher_y,name=theirs", "dml:y=y"])
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((4, 3, 8, 8), dtype=np.float32), "label": np.arange(4) % 5}
    got = run(merged, feeds)
    for name, seed in (("ce", 0), ("theirs", 1)):
        value = run(net(seed=seed), {"x": feeds["x"]})["y"]
        shifted = value - value.max(1, keepdims=True)
        log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        np.testing.assert_allclose(got[name], -log[range(4), feeds["label"]].mean(), rtol=1e-5)
    with pytest.raises(NotFoundError, match="teacher_yy"):
        merge(net(), net(seed=1), ["ce:teacher_yy"])


def test_without_a_teacher_losses_on_labels_are_all_there_is():
    merged = merge(net(), {}, ["ce:y"])
    assert [value.name for value in merged.graph.outputs] == ["y", "loss", "ce"]
    with pytest.raises(UserError, match="reads the teacher's value 'y', and there is no teacher"):
        merge(net(), {}, ["l2:y=y"])
