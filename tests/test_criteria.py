"""Criteria without data: Torch-Pruning's numbers, and who competes with whom."""

import re

import numpy as np
import onnx_ir as ir
import pytest

from onnxslim_kd import Amount, Choice, api
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import criteria
from onnxslim_kd.passes.matching import find
from onnxslim_kd.prune_config import PruneConfig
from tests.models import Case, build

RESIDUAL = Case(
    "a = Conv<pads=[1,1,1,1]>(x, w1) b = BatchNormalization(a, w2, w3, w4, wpos5) c = Relu(b)"
    " d = Conv<pads=[1,1,1,1]>(c, w6, w7) e = Add(c, d) f = Relu(e) y = Conv(f, w8)",
    "float[6,3,3,3] w1, float[6] w2, float[6] w3, float[6] w4, float[6] wpos5,"
    " float[6,6,3,3] w6, float[6] w7, float[4,6,1,1] w8",
)
# Torch-Pruning 1.6.1, GroupMagnitudeImportance on the same weights: normalizer="mean", and
# normalizer="lamp", group_reduction="first"
TORCH_PRUNING_L2 = [0.895389, 0.876438, 1.542187, 0.586877, 0.746705, 1.352404]
TORCH_PRUNING_LAMP = [0.127087, 0.298167, 1.0, 0.216039, 0.167068, 0.479073]


def scores(name: str, parameter: str) -> np.ndarray:
    analysis = api.inspect(build(RESIDUAL))
    return criteria.criterion(name)(analysis, find(analysis, parameter))


def test_group_norms_are_torch_prunings() -> None:
    squares = np.square(scores("group-l2", "w1"))
    np.testing.assert_allclose(squares / squares.mean(), TORCH_PRUNING_L2, rtol=1e-5)
    np.testing.assert_array_equal(scores("group-l2", "w6"), scores("group-l2", "w1"))


def test_lamp_is_torch_prunings() -> None:
    np.testing.assert_allclose(scores("lamp", "w1"), TORCH_PRUNING_LAMP, rtol=1e-5)


TWO_KINDS = Case(
    "a = Conv<pads=[1,1,1,1]>(x, w0) a1 = Relu(a)"
    " b = Conv(a1, w1) b1 = Relu(b) c = Conv(b1, w2) c1 = Relu(c)"
    " d = Conv(c1, w3) d1 = Relu(d) e = Conv(d1, w4) e1 = Relu(e)"
    " f = Conv<pads=[1,1,1,1]>(e1, w5) f1 = Relu(f) y = Conv<pads=[1,1,1,1]>(f1, w6)",
    "float[8,3,1,1] w0, float[16,8,1,1] w1, float[8,16,1,1] w2, float[16,8,1,1] w3,"
    " float[8,16,1,1] w4, float[16,8,3,3] w5, float[4,16,3,3] w6",
)


def scaled(scale: dict[str, float]) -> ir.Model:
    model = build(TWO_KINDS)
    for name, factor in scale.items():
        weight = model.graph.initializers[name]
        assert weight.const_value is not None
        weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(factor), name=name)
    return model


def removed(model: ir.Model, allocation: str, criterion: str = "l1") -> dict[str, int]:
    choice = Choice(
        pattern="w[135]",
        allocation=allocation,  # type: ignore[arg-type]
        criterion=criterion,
        amount=Amount(round_to=1),
    )
    return {g.asked_by[0]: g.removed for g in api.plan(model, choice).groups}


def test_only_groups_of_one_kind_compete() -> None:
    """w1 and w3 are alike: the smaller one loses all that the pair must; w5 is a kind by itself."""
    found = removed(scaled({"w3": 0.01, "w5": 1e-4}), "isomorphic")
    assert found == {"w1": 0, "w3": 15, "w5": 8}


def test_lamp_competes_without_a_scale() -> None:
    """LAMP is blind to a layer's scale, and must not be divided by the mean of the layer."""
    assert removed(scaled({"w3": 0.01}), "global", "lamp") == removed(scaled({}), "global", "lamp")


def test_the_help_names_every_criterion() -> None:
    text = re.split(r"[\s,;.]+", PruneConfig.model_fields["criterion"].description or "")
    assert set(criteria.NAMES) <= set(text)


def test_an_unknown_criterion_lists_all() -> None:
    with pytest.raises(UserError, match=r"criterion 'l3' is not one of l1, l2, lamp, .*group-l2"):
        Choice(pattern=".*", criterion="l3")
