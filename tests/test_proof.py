"""The proof of a cut must hold for the right model, and refuse every other one."""

from dataclasses import replace

import onnx_ir as ir
import pytest

from onnxslim_kd import Amount, Choice, api
from onnxslim_kd.compare import TOLERANCE
from onnxslim_kd.errors import ProofError
from tests.models import Case, build

HALF = Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
PLAIN = Case("h = Conv(x, w1) r = Relu(h) y = Conv(r, w2)", "float[8,3,1,1] w1, float[4,8,1,1] w2")
FLAT = Case(
    "big = Constant<value_float=3000.0>() b = Add(x, big) h = Conv(b, w1) g = Conv(h, w2)"
    " y = InstanceNormalization(g, wscale, wshift)",
    "float[96,3,1,1] w1, float[4,96,3,3] w2, float[4] wscale, float[4] wshift",
)
"""A norm over what is nearly the same everywhere blows its rounding up."""

RANKED = Case(
    "big = Constant<value_float=3000.0>() b = Add(x, big) h = Conv(b, w1) g = Conv(h, w2)"
    " flat = Constant<value_ints=[0,-1]>() score = Reshape(g, flat)"
    " k = Constant<value_ints=[1936]>() best, which = TopK(score, k)"
    " f = Conv(x, w3) feature = Reshape(f, flat) y = GatherElements<axis=1>(feature, which)",
    "float[96,3,1,1] w1, float[4,96,3,3] w2, float[4,3,3,3] w3",
    inputs="float[N,3,24,24] x",
    outputs="float[N,1936] y",
)
"""Scores so close to each other that rounding decides their order, and an output in that order."""


def cut(case: Case, seed: int = 0) -> tuple[ir.Model, api.Pruned]:
    model = build(case, seed)
    return model, api.prune(model, HALF)


def shifted(model: ir.Model, weight: str, by: float) -> ir.Model:
    """``model`` with one number of a weight changed."""
    copy = model.clone()
    value = copy.graph.initializers[weight]
    array = value.const_value.numpy().copy()
    array.flat[0] += by
    value.const_value = ir.Tensor(array, name=weight)
    return copy


def test_it_holds_for_the_pruned_model() -> None:
    model, result = cut(PLAIN)
    proof = api.verify(model, result.plan, result.model)
    assert proof.error < 1e-6 and proof.rounding == 0 and proof.inner_values == 1
    assert "rounding" not in str(proof)


@pytest.mark.parametrize("weight", ["w1", "w2"])
def test_one_wrong_number_in_one_channel_is_found(weight: str) -> None:
    model, result = cut(PLAIN)
    with pytest.raises(ProofError, match="not the silenced original: they differ by"):
        api.verify(model, result.plan, shifted(result.model, weight, 1e-2))


def test_the_channels_of_another_plan_are_found() -> None:
    model, result = cut(PLAIN)
    other = api.prune(model, Choice(pattern=".*", ratio=0.5, criterion="random"))
    kept = [{m.kept for g in r.plan.groups for m in g.members} for r in (result, other)]
    assert kept[0] != kept[1]
    with pytest.raises(ProofError):
        api.verify(model, result.plan, other.model)


def test_what_rounding_alone_does_is_no_difference() -> None:
    model, result = cut(FLAT)
    proof = api.verify(model, result.plan, result.model)
    assert TOLERANCE < proof.error < proof.tolerance < 5e-2
    assert f"rounding alone moves the original by {proof.rounding:.0e}" in str(proof)


def test_a_wrong_number_is_found_in_spite_of_rounding() -> None:
    model, result = cut(FLAT)
    with pytest.raises(ProofError, match="not the silenced original"):
        api.verify(model, result.plan, shifted(result.model, "wshift", 0.3))


def test_what_rounding_decides_is_decided_once() -> None:
    model, result = cut(RANKED)
    proof = api.verify(model, result.plan, result.model)
    assert proof.same_decisions and proof.error < TOLERANCE == proof.tolerance
    assert str(proof).endswith("given its decisions (TopK, comparisons)")
    assert [value.name for value in result.model.graph.inputs] == ["x"]
    assert [value.name for value in result.model.graph.outputs] == ["y"]


def test_a_decision_about_a_decision_is_one_as_well() -> None:
    again = RANKED.body.replace(
        "y = GatherElements<axis=1>(feature, which)",
        "zero = Constant<value_int=0>() first = Greater(which, zero)"
        " at = Where(first, which, zero) y = GatherElements<axis=1>(feature, at)",
    )
    model, result = cut(replace(RANKED, body=again))
    assert api.verify(model, result.plan, result.model).same_decisions


@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
def test_a_wrong_number_before_and_after_a_decision_is_found(weight: str) -> None:
    model, result = cut(RANKED)
    with pytest.raises(ProofError, match="not the silenced original"):
        api.verify(model, result.plan, shifted(result.model, weight, 0.3))
