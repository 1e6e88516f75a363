"""The numbers of PaddleSlim 2.6 (its toy networks), where it prunes; a proof where it cannot.

``cases.json`` and the stored outputs were computed by PaddleSlim 2.6.0 on Paddle 2.6.2.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from onnxslim_kd import Amount, Choice, api
from onnxslim_kd.runtime import Session

GOLDEN = Path(__file__).parent / "golden" / "prune"
CASES = json.loads((GOLDEN / "cases.json").read_text())
CRITERIA = {"l1_norm": "l1", "bn_scale": "bn-scale", "geometry_median": "geometric-median"}
BEYOND = ("toy_concat", "toy_split", "toy_flatten", "toy_dw_mult", "toy_group")
"""What PaddleSlim refuses or breaks: concat, split, flatten before fc, grouped convolutions."""


def prune(case: dict) -> api.Pruned:
    selector = "share" if case["selector"] == "default_idx_selector" else "energy"
    choice = Choice(
        ratios=dict(zip(case["params"], case["ratios"], strict=True)),
        criterion=CRITERIA[case["criterion"]],
        amount=Amount(round_to=1, selector=selector),
    )
    return api.prune(GOLDEN / f"{case['model']}.orig.onnx", choice)


def ident(case: dict) -> str:
    return f"{case['model']}.{case['case']}"


@pytest.mark.parametrize("case", [c for c in CASES if c["kept"] and not c["error"]], ids=ident)
def test_the_same_channels_are_kept(case: dict) -> None:
    result = prune(case)
    kept = {
        (m.parameter, m.axis): list(m.kept)
        for group in result.plan.groups
        for m in group.members
        if m.kept is not None
    }
    compared = 0
    for parameter, axes in case["kept"].items():
        for axis, indices in axes.items():
            if (parameter, int(axis)) in kept:
                assert kept[parameter, int(axis)] == indices
                compared += 1
    assert compared


def handled(case: dict) -> bool:
    return case["io"] and case["groups"] > 0 and case["model"] not in BEYOND


@pytest.mark.parametrize("case", [c for c in CASES if handled(c)], ids=ident)
def test_outputs_equal_the_pruned_paddle_model(case: dict) -> None:
    stored = np.load(GOLDEN / f"{ident(case)}.npz")
    model = prune(case).model
    feeds = {model.graph.inputs[0].name: stored["x"].astype(np.float32)}
    (got,) = Session(model).run(feeds).values()
    np.testing.assert_allclose(got, stored["y_pruned"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c["model"] in BEYOND], ids=ident)
def test_what_paddle_cannot_is_proven(case: dict) -> None:
    result = prune(case)
    assert result.proof is not None
    asked = max(case["ratios"])
    if case["selector"] == "default_idx_selector" and asked >= 0.3:
        assert result.after.parameters < result.before.parameters
    if asked == 0:
        assert result.after == result.before
