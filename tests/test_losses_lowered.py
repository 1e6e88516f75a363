"""Losses under the trainer: what trains, and gradients through the lowering to torch."""

import numpy as np
import pytest
import torch
from losses_models import loss_model
from test_losses_golden import FILES, LOOSE, prepared
from test_losses_nasty import ALL, POINTS, feeds_for, ordinary

from onnxslim_kd.training.lowering import lower
from onnxslim_kd.training.weights import statistics_of, trainable_parameters

MIXED = {"s": ("N", 6, 8, 8), "t": ("N", 6, 3, 3)}


def differentiator(model, *, training=False):
    """Return a function from feeds to the loss and all gradients, in float32."""
    parameters = [n for n in model.graph.initializers if n.startswith("loss_")]
    lowered = lower(model, trainable=set(parameters) - statistics_of(model))
    lowered.train(training)

    def run(feeds):
        lowered.zero_grad()
        tensors = {name: torch.tensor(np.asarray(a)) for name, a in feeds.items()}
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if t.is_floating_point()}
        loss = lowered(tensors)[model.graph.outputs[0].name]
        loss.backward()
        leaves |= lowered.parameters_by_name
        return loss.item(), {n: t.grad.numpy() for n, t in leaves.items() if t.grad is not None}

    return run


@pytest.mark.parametrize("stem", FILES)
def test_gradient_of_goldens(stem):
    model, feeds, golden, prefix = prepared(stem)
    loss, found = differentiator(model, training=stem == "clas_afd_train")(feeds)
    tolerance = LOOSE.get(stem, 1e-5)
    assert loss == pytest.approx(float(golden["loss"]), rel=tolerance, abs=1e-6)
    for key in [key for key in golden if key.startswith("grad_")]:
        name = key.removeprefix("grad_").replace("aux_", prefix)
        largest = np.abs(golden[key]).max()
        error = np.abs(found[name] - golden[key]).max()
        assert error <= max(tolerance, 1e-4) * largest + 1e-7, (key, error, largest)


@pytest.mark.parametrize("case", ALL)
def test_finite_at_nasty_points(case):
    text, shapes = ALL[case]
    model = loss_model(text, {name: ("N", *shape[1:]) for name, shape in shapes.items()})
    arrays, run = ordinary(case), differentiator(model)
    for name, point in POINTS.items():
        if case == "dml probabilities" and "1e4" in name:
            continue  # these are no probabilities
        s, t = (a.astype(np.float32) for a in point(arrays["s"], arrays["t"]))
        loss, found = run(feeds_for(model, {"s": s, "t": t}))
        assert np.isfinite(loss), name
        assert found, name
        assert all(np.isfinite(gradient).all() for gradient in found.values()), name


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        *ALL.values(),
        ("l2:s=t,align=pool", MIXED),
        ("l2:t=s,align=pool", MIXED),
        ("l2:s=t,align=resize", MIXED),
        ("afd:s+t=t+s,qk_dim=8", MIXED),
        ("rkd_angle:s=t,target_size=5", MIXED),
    ],
)
def test_no_constant_of_a_loss_looks_like_a_weight(text, shapes):
    model = loss_model(text, shapes)
    weights = [name for name in trainable_parameters(model) if name.startswith("loss/")]
    assert weights == []


@pytest.mark.parametrize("case", ALL)
def test_mixed_precision_changes_little(case):
    text, shapes = ALL[case]
    model = loss_model(text, {name: ("N", *shape[1:]) for name, shape in shapes.items()})
    scale = 1 if case == "dml probabilities" else 300  # whose squares no float16 can hold
    arrays = {n: np.float32(scale) * a.astype(np.float16) for n, a in ordinary(case).items()}
    feeds, run = feeds_for(model, arrays), differentiator(model)
    expected, _ = run(feeds)
    halves = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in feeds.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = run(halves)
    assert loss == pytest.approx(expected, rel=3e-2)
