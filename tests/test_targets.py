"""Searching for a share of MACs, parameters or bytes."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxslim_kd import Amount, Choice, api
from onnxslim_kd import cost as costs
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.ratios import Candidate
from onnxslim_kd.passes.targets import Target, measure
from tests.models import Case, build

DEEP = Case(
    "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2) d = Relu(c)"
    " e = Conv<pads=[1,1,1,1]>(d, w3) f = Relu(e) y = Conv(f, w4)",
    "float[64,3,3,3] w1, float[64,64,3,3] w2, float[64,64,3,3] w3, float[4,64,1,1] w4",
)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("quantity", ["macs", "params", "size"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_share_is_reached(quantity: str, share: float, allocation: str) -> None:
    choice = Choice(
        pattern=".*",
        target=Target(quantity, share),  # type: ignore[arg-type]
        allocation=allocation,  # type: ignore[arg-type]
        amount=Amount(round_to=1),
    )
    result = api.prune(build(DEEP), choice, verify=False)
    key = {"macs": "macs", "params": "parameters", "size": "bytes"}[quantity]
    gone = 1 - getattr(result.after, key) / getattr(result.before, key)
    assert gone == pytest.approx(share, abs=0.015)


def test_an_unreachable_share_ends_with_the_nearest() -> None:
    choice = Choice(pattern="w1", target=Target("macs", 0.9), amount=Amount(round_to=1))
    plan = api.plan(build(DEEP), choice)
    (group,) = plan.groups
    assert group.removed == group.units - 1
    assert "90.0% was asked for and cannot be reached" in plan.notes[0]


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_blocks_that_miss_a_share_are_said(share: float) -> None:
    choice = Choice(pattern="w1", target=Target("macs", share), amount=Amount(round_to=16))
    (note,) = api.plan(build(DEEP), choice).notes
    assert f"of the MACs, the nearest to the {share:.1%} asked for: channels go in whole" in note


def test_rounding_keeps_whole_blocks_of_channels() -> None:
    choice = Choice(pattern=".*", ratio=0.4, amount=Amount(round_to=16))
    widths = {m.after for g in api.plan(build(DEEP), choice).groups for m in g.members if m.kept}
    assert widths == {32}  # 38.4 wanted; 32 and 48 are the multiples beside it


def test_global_spares_the_groups_that_matter() -> None:
    model = build(DEEP)
    weight = model.graph.initializers["w2"]
    array = weight.const_value.numpy().copy()
    array[:32] *= 1e-3  # half of the filters of w2 hardly count
    weight.const_value = ir.Tensor(array, name="w2")
    choice = Choice(pattern=".*", ratio=0.15, allocation="global", amount=Amount(round_to=1))
    removed = {g.asked_by[0]: g.removed for g in api.plan(model, choice).groups}
    assert removed["w2"] > removed["w1"]
    assert removed["w2"] > removed["w3"]


def removed_by(curves: dict[str, list[tuple[float, float]]], share: float) -> dict[str, int]:
    target, amount = Target("macs", share), Amount(round_to=1)
    choice = Choice(pattern=".*", target=target, sensitivity=curves, amount=amount)
    return {g.asked_by[0]: g.removed for g in api.plan(build(DEEP), choice).groups}


def test_with_a_target_what_costs_least_per_mac_goes_first() -> None:
    slight, steep = [(0.4, 0.01), (0.8, 0.02)], [(0.4, 0.1), (0.8, 0.2)]
    assert removed_by({"w1": steep, "w2": slight, "w3": steep}, 0.2) == {"w1": 0, "w2": 13, "w3": 0}
    flat = removed_by({"w1": slight, "w2": slight, "w3": slight}, 0.2)
    assert flat["w1"] == 0  # it saves fewer MACs per channel than the others


def test_no_group_goes_beyond_what_was_measured() -> None:
    curve = [(0.25, 0.0), (0.5, 0.0)]
    removed = removed_by({"w1": curve, "w2": curve}, 0.9)
    assert removed == {"w1": 32, "w2": 32, "w3": 0}


def test_points_above_a_convex_curve_are_spanned() -> None:
    """A loss that saturates: a channel costs less all the way to 0.8 than on that to 0.2."""
    high = [(0.2, 0.5), (0.8, 0.6)]  # 2.5 and then 0.17 per share, 0.75 on the whole
    even = [(0.2, 0.1), (0.8, 0.4)]  # 0.5, for channels that save half as many MACs
    removed = removed_by({"w2": high, "w3": even}, 0.2)
    assert removed["w2"] > removed["w3"] == 0


def test_where_nothing_can_go_sensitivities_decide_nothing() -> None:
    choice = Choice(pattern="w4", target=Target("macs", 0.5), sensitivity={"w1": [(0.5, 0.1)]})
    plan = api.plan(build(DEEP), choice)
    assert (plan.groups, [r.parameter for r in plan.refused]) == ((), ["w4"])


def test_bytes_of_narrow_and_of_text_weights() -> None:
    body = "d = DequantizeLinear(codes, scale) y = MatMul(x, d) i = ArgMax(y) z = Gather(names, i)"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[N,8] x) => (string[1,M] z)'
        f' <float scale = {{0.1}}, string[4] names = {{"a", "b", "c", "d"}}> {{{body}}}'
    )
    codes = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, (8, 4), np.ones(32, np.int8))
    model.graph.initializer.append(codes)
    analysis = api.inspect(model)
    assert measure(analysis, None, "size") == costs.cost(analysis.model).bytes == 16 + 4 + 4
    assert measure(analysis, None, "params") == 33


def test_the_threshold_of_scores_that_are_all_zero() -> None:
    zeros, block = np.zeros(4), (np.arange(4),)
    candidate = Candidate(0, 0.5, (), np.arange(4), zeros, block, 1)
    assert not len(Amount(selector="energy").removed(candidate, 0.5))


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_outside_of_its_range(share: float) -> None:
    with pytest.raises(UserError, match=r"must be in \(0, 1\)"):
        Target("macs", share)
