"""Losses and options without an upstream number, against their papers' formulas in numpy."""

import numpy as np
import pytest
import torch
from losses_models import loss_model, value
from onnx_torch import gradients
from scipy.special import log_softmax, rel_entr, softmax

from onnxslim_kd.errors import UserError

RNG = np.random.default_rng(11)
S2, T2 = (RNG.standard_normal((5, 7)).astype(np.float32) * 3 for _ in range(2))
S3, T3 = (RNG.standard_normal((2, 4, 7)).astype(np.float32) for _ in range(2))
S4, T4 = (RNG.standard_normal((3, 6, 4, 5)).astype(np.float32) for _ in range(2))


def js(s, t):
    p, q = softmax(s, 1), softmax(t, 1)
    m = (p + q) / 2
    return (rel_entr(p, m) + rel_entr(q, m)).sum(1).mean() / 2


def cosine(s, t, axis=-1):
    sizes = np.linalg.norm(s, axis=axis) * np.linalg.norm(t, axis=axis)
    return (1 - (s * t).sum(axis) / sizes).mean()


def at(s, t, p=2):
    rows = [(np.abs(x) ** p).mean(1).reshape(len(x), -1) for x in (s, t)]
    ours, theirs = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows)
    return ((ours - theirs) ** 2).mean()


def cwd(s, t, temperature=4.0):
    n, c = s.shape[:2]
    p, q = (softmax(x.reshape(n, c, -1) / temperature, 2) for x in (t, s))
    return temperature**2 / (n * c) * rel_entr(p, q).sum()


def overhaul(s, t, weight, margin=None):
    """With an identity BatchNormalization: scale 1, bias 0, statistics 0 and 1."""
    ours = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], s) / np.sqrt(1 + 1e-5)
    if margin is None:
        low = np.array([x[x < 0].mean() for x in t.swapaxes(0, 1)])[None, :, None, None]
    else:
        low = margin
    theirs = np.maximum(t, low)
    counts = ~((ours <= theirs) & (theirs <= 0))
    return (counts * (theirs - ours) ** 2).mean()


FORMULAS = {"js": js, "cosine": cosine, "at": at, "cwd": cwd, "overhaul": overhaul}


def run(text, **arrays):
    shapes = {n: ("N", *a.shape[1:]) for n, a in arrays.items() if not n.startswith("label")}
    model = loss_model(text, shapes)
    feeds = {k: arrays[k] for k in (v.name for v in model.graph.inputs)}
    found = value(model, feeds)
    assert found == pytest.approx(gradients(model, feeds, [])[0], rel=1e-5, abs=1e-6)
    return found


def test_js():
    assert run("js:s=t", s=S2, t=T2) == pytest.approx(js(S2, T2), rel=1e-5)
    assert run("js:s=t,temperature=3", s=S2, t=T2) == pytest.approx(
        9 * js(S2 / 3, T2 / 3), rel=1e-5
    )
    assert run("js:s=t", s=S2, t=S2) == pytest.approx(0, abs=1e-6)
    far = 1e4 * np.eye(5, 7, dtype=np.float32)
    assert run("js:s=t", s=far, t=np.roll(far, 1, 1)) == pytest.approx(np.log(2), rel=1e-6)


def test_cosine():
    assert run("cosine:s=t", s=S2, t=T2) == pytest.approx(cosine(S2, T2), rel=1e-5)
    assert run("cosine:s=t", s=S3, t=T3) == pytest.approx(cosine(S3, T3), rel=1e-5)
    assert run("cosine:s=t", s=S4, t=T4) == pytest.approx(cosine(S4, T4, 1), rel=1e-5)
    assert run("cosine:s=t,axis=3", s=S4, t=T4) == pytest.approx(cosine(S4, T4, 3), rel=1e-5)


def test_at():
    wide = np.concatenate([T4, T4 * 2], 1)
    assert run("at:s=t", s=S4, t=wide) == pytest.approx(at(S4, wide), rel=1e-5)
    assert run("at:s=t,p=3", s=S4, t=T4) == pytest.approx(at(S4, T4, 3), rel=1e-5)


def test_cwd():
    assert run("cwd:s=t", s=S4, t=T4) == pytest.approx(cwd(S4, T4), rel=1e-5)
    assert run("cwd:s=t,temperature=1", s=S4, t=T4) == pytest.approx(cwd(S4, T4, 1), rel=1e-5)


@pytest.mark.parametrize("margin", [None, -0.2])
def test_overhaul(margin):
    wide = np.concatenate([T4, T4 * 2], 1)
    model = loss_model(f"overhaul:s=t,margin={margin}", {"s": ("N", 6, 4, 5), "t": ("N", 12, 4, 5)})
    weight = model.graph.initializers["loss_overhaul_connector.conv.weight"].const_value.numpy()
    expected = overhaul(S4, wide, weight, margin)
    assert value(model, {"s": S4, "t": wide}) == pytest.approx(expected, rel=1e-5)


LABEL = np.array([2, -1, 6, 255, 0])
KNOWN = np.array([0, 2, 4])


def test_ground_truth_counts_only_labels_that_are_classes():
    logs = log_softmax(S2, 1)
    expected = -logs[KNOWN, LABEL[KNOWN]].mean()
    assert run("ce:s", s=S2, label=LABEL) == pytest.approx(expected, rel=1e-5)
    smooth = 0.9 * expected - 0.1 * logs[KNOWN].mean()
    assert run("ce:s,epsilon=0.1", s=S2, label=LABEL) == pytest.approx(smooth, rel=1e-5)
    without = -logs[[2, 4], LABEL[[2, 4]]].mean()
    assert run("ce:s,ignore_index=2", s=S2, label=LABEL) == pytest.approx(without, rel=1e-5)
    assert run("ce:s", s=S2, label=0 * LABEL - 1) == 0


@pytest.mark.parametrize("kind", ["dkd", "wsl", "skd"])
def test_unlabelled_samples_change_nothing(kind):
    text = f"{kind}:s=t" + (",alpha=0" if kind == "skd" else "")
    some = run(text, s=S2, t=T2, label=LABEL)
    assert some == pytest.approx(run(text, s=S2[KNOWN], t=T2[KNOWN], label=LABEL[KNOWN]), rel=1e-5)
    assert run(text, s=S2, t=T2, label=0 * LABEL - 1) == 0


def test_maps_and_sequences_have_a_label_per_position():
    label = RNG.integers(0, 6, (3, 4, 5))
    flat = np.moveaxis(S4, 1, -1).reshape(-1, 6)
    expected = -log_softmax(flat, 1)[np.arange(60), label.ravel()].mean()
    assert run("ce:s", s=S4, label=label) == pytest.approx(expected, rel=1e-5)
    label = RNG.integers(0, 7, (2, 4))
    expected = -log_softmax(S3, 2).reshape(-1, 7)[np.arange(8), label.ravel()].mean()
    assert run("ce:s", s=S3, label=label) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "js", "dkd", "wsl", "ce"])
def test_maps_are_as_many_samples_as_positions(kind):
    text = f"{kind}:s" + ("" if kind == "ce" else "=t")
    label = RNG.integers(-1, 6, (3, 4, 5))
    rows = [np.moveaxis(x, 1, -1).reshape(-1, 6) for x in (S4, T4)]
    whole = run(text, s=S4, t=T4, label=label)
    assert whole == pytest.approx(run(text, s=rows[0], t=rows[1], label=label.ravel()), rel=1e-5)


def test_soft_labels():
    soft = softmax(T2, 1)
    soft[1] = 0  # no label
    keep = [0, 2, 3, 4]
    expected = -(soft * log_softmax(S2, 1))[keep].sum(1).mean()
    assert run("ce:s,soft=true", s=S2, label_soft=soft) == pytest.approx(expected, rel=1e-5)


def test_pairs_are_summed():
    both = run("l2:a+b=c+d", a=S2, b=S4, c=T2, d=T4)
    assert both == pytest.approx(((S2 - T2) ** 2).mean() + ((S4 - T4) ** 2).mean(), rel=1e-5)
    assert run("fsp:a+b+a+b=c+d+c+d", a=S4, b=S4, c=T4, d=T4) == pytest.approx(
        2 * run("fsp:a+b=c+d", a=S4, b=S4, c=T4, d=T4), rel=1e-5
    )


def test_fsp_pools_the_larger_map():
    big = RNG.standard_normal((3, 6, 8, 10)).astype(np.float32)
    small = big.reshape(3, 6, 4, 2, 5, 2).max((3, 5))
    expected = run("fsp:a+b=c+d", a=small, b=S4, c=T4, d=T4)
    assert run("fsp:a+b=c+d", a=big, b=S4, c=T4, d=T4) == pytest.approx(expected, rel=1e-5)
    odd = RNG.standard_normal((3, 6, 5, 10)).astype(np.float32)
    with pytest.raises(
        UserError, match=r"the map of 'a', \[5, 10\], is no multiple of that of 'b'"
    ):
        run("fsp:a+b=c+d", a=odd, b=S4, c=T4, d=T4)


@pytest.mark.parametrize("size", [(2, 5), (3, 3), (8, 4), (1, 1), (4, 5)])
def test_align_pool_is_adaptive_pooling(size):
    big = RNG.standard_normal((3, 6, *size)).astype(np.float32)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(S4), size).numpy()
    expected = ((pooled - big) ** 2).mean()
    assert run("l2:s=t,align=pool", s=S4, t=big) == pytest.approx(expected, rel=1e-5)


def test_align_resize_follows_a_dynamic_teacher():
    model = loss_model("l2:s=t,align=resize", {"s": ("N", 6, "h", "w"), "t": ("N", 6, "H", "W")})
    for size in [(8, 10), (3, 7)]:
        t = RNG.standard_normal((3, 6, *size)).astype(np.float32)
        resized = torch.nn.functional.interpolate(torch.tensor(S4), size, mode="bilinear").numpy()
        assert value(model, {"s": S4, "t": t}) == pytest.approx(
            ((resized - t) ** 2).mean(), rel=1e-5
        )


@pytest.mark.parametrize(("how", "s", "t"), [("conv", S4, (3, 9, 4, 5)), ("linear", S3, (2, 4, 5))])
def test_align_trains_a_projection(how, s, t):
    t = RNG.standard_normal(t).astype(np.float32)
    shapes = {"s": ("N", *s.shape[1:]), "t": ("N", *t.shape[1:])}
    model = loss_model(f"l2:s=t,align={how}", shapes)
    weight = model.graph.initializers["loss_l2_align.weight"].const_value.numpy()
    rule = "oi,nihw->nohw" if how == "conv" else "io,nli->nlo"
    ours = np.einsum(rule, weight.reshape(weight.shape[:2]), s)
    assert value(model, {"s": s, "t": t}) == pytest.approx(((ours - t) ** 2).mean(), rel=1e-5)
    _, found = gradients(model, {"s": s, "t": t}, ["loss_l2_align.weight", "loss_l2_align.bias"])
    assert all(np.abs(g).max() > 0 for g in found.values())


def test_align_of_channels_and_size_together():
    t = RNG.standard_normal((3, 9, 2, 2)).astype(np.float32)
    assert run("l2:s=t,align=conv+pool", s=S4, t=t) > 0
    assert run("l2:s=t,align=pool+conv", s=S4, t=t) > 0


def test_wsl_weight_is_constant_to_the_gradient():
    model = loss_model("wsl:s=t", {"s": ("N", 7), "t": ("N", 7)})
    feeds = {"s": S2, "t": T2, "label": np.arange(5)}
    _, found = gradients(model, feeds, ["s"])
    ours, theirs = torch.tensor(S2, dtype=torch.float64, requires_grad=True), torch.tensor(T2)
    label = torch.arange(5)
    hard = [torch.nn.functional.cross_entropy(x, label, reduction="none") for x in (ours, theirs)]
    weight = (1 - torch.exp(-hard[0] / (hard[1] + 1e-7))).detach()
    soft = -(torch.softmax(theirs / 2, 1) * torch.log_softmax(ours / 2, 1)).sum(1)
    (4 * (weight * soft).mean()).backward()
    np.testing.assert_allclose(found["s"], ours.grad.numpy(), rtol=1e-5, atol=1e-8)
