"""Every rule on a small model: the proof holds and the counts are right."""

from dataclasses import replace

import numpy as np
import pytest

from onnxslim_kd import Amount, Choice, Reading, api
from onnxslim_kd.cost import cost
from onnxslim_kd.passes import grids, ties
from onnxslim_kd.passes.channels import Channels
from onnxslim_kd.passes.ties import RULES
from onnxslim_kd.proof import structure
from tests.models import MODELS, Case, build

ALL = Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
UPSAMPLE = {"Upsample"}
"""Removed from ONNX in opset 10: raising the opset turns it into Resize."""


def test_every_rule_has_a_model() -> None:
    used = {node.op_type for case in MODELS.values() for node in build(case).graph}
    assert RULES.keys() - used - {"Constant"} - UPSAMPLE == set()


def test_counts_for_all_births_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    for case in MODELS.values():
        analysis = api.inspect(build(case))
        gone = rng.random(len(analysis.components.label)) < 0.5
        each = [int(gone[b.start : b.start + b.size].sum()) for b in analysis.births]
        assert analysis.lost(gone) == each


@pytest.mark.parametrize("name", MODELS)
def test_the_pruned_model_equals_the_silenced_original(name: str) -> None:
    case = MODELS[name]
    result = api.prune(build(case), ALL)
    structure(result.model)
    assert result.plan.approximate == case.approximate
    removable = any(case.units.values())
    assert (result.after.parameters < result.before.parameters) == removable


@pytest.mark.parametrize("name", [n for n, case in MODELS.items() if case.units])
def test_units_are_as_small_as_they_can_be(name: str) -> None:
    """The proof cannot see channels that are tied too widely; counting can."""
    case = MODELS[name]
    analysis = api.inspect(build(case))
    found = {p.name: p for p in analysis.parameters if p.produces}
    for parameter, expected in case.units.items():
        labels = np.unique(analysis.labels(found[parameter].birth))
        free = [x for x in labels.tolist() if x not in analysis.components.pinned]
        assert len(free) == expected, f"{parameter}: {analysis.refusal(found[parameter])}"


@pytest.mark.parametrize(
    "name",
    ["residual", "split", "attention", "attention-behind-groups", "channel-shuffle", "lstm"],
)
def test_a_plan_replays_and_is_idempotent(name: str) -> None:
    model = build(MODELS[name])
    result = api.prune(model, ALL)
    again = api.prune(model, type(result.plan).model_validate_json(result.plan.model_dump_json()))
    assert again.plan == result.plan
    for value, other in zip(
        result.model.graph.initializers.values(),
        again.model.graph.initializers.values(),
        strict=True,
    ):
        assert np.array_equal(value.const_value.numpy(), other.const_value.numpy())
    nothing = api.prune(result.model, Choice(pattern=".*", ratio=0.0))
    assert nothing.after == nothing.before


def test_dims_go_where_heads_are_kept() -> None:
    model = build(MODELS["attention"])
    heads = api.prune(model, ALL)
    dims = api.prune(model, ALL, reading=Reading(attention="dims"))
    assert heads.model.graph.initializers["w1"].shape == [6, 4]
    assert dims.model.graph.initializers["w1"].shape == [6, 4]
    kept = {m.parameter: m.kept for g in heads.plan.groups for m in g.members if m.kept}
    assert kept["w1"] in {
        tuple(range(a, a + 2)) + tuple(range(b, b + 2))
        for a in (0, 2, 4, 6)
        for b in (0, 2, 4, 6)
        if a < b
    }
    kept = {m.parameter: m.kept for g in dims.plan.groups for m in g.members if m.kept}
    assert kept["w1"] in {(0, 2, 4, 6), (1, 3, 5, 7)}


def test_dims_go_where_no_head_can() -> None:
    model = build(MODELS["attention-behind-groups"])
    stays = api.plan(model, ALL, Reading(attention="heads"))
    assert {r.parameter for r in stays.refused} == {"w1", "w2", "w3", "w4"}
    plan = api.plan(model, ALL)
    assert plan.options.attention == "auto"
    assert any("no whole head can go" in note for note in plan.notes)
    assert plan.macs_after == api.plan(model, ALL, Reading(attention="dims")).macs_after


def test_heads_go_where_they_can() -> None:
    model = build(MODELS["attention"])
    heads = api.plan(model, ALL, Reading(attention="heads"))
    auto = api.plan(model, ALL)
    assert auto.groups == heads.groups and not auto.notes


def test_dims_go_as_heads_do_where_no_rule_asks() -> None:
    for case in MODELS.values():
        analysis = api.inspect(build(case), Reading(attention="heads"))
        others = frozenset(set(analysis.model.graph) - analysis.channels.choices)
        again = ties.walk(analysis.model, analysis.shapes, by_dims=others)
        assert np.array_equal(grids.settle(again).label, analysis.components.label)


def test_a_graph_in_which_no_rule_asks_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """YOLO's boxes: a Softmax inside of each of four sides, which are outputs."""
    case = Case(
        "a = Conv(x, w1) to = Constant<value_ints=[0,4,8,-1]>() g = Reshape(a, to)"
        " g1 = Transpose<perm=[0,2,1,3]>(g) g2 = Softmax<axis=1>(g1) y = Conv(g2, w2)",
        "float[32,3,1,1] w1, float[1,8,1,1] w2",
        outputs="float[N,1,4,M] y",
    )
    walks: list[Channels] = []
    walk = ties.walk
    monkeypatch.setattr(ties, "walk", lambda *a, **k: walks.append(walk(*a, **k)) or walks[-1])
    analysis = api.inspect(build(case))
    assert analysis.channels.heads and walks == [analysis.channels]


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("attention-op", {"w1": 2, "w2": 2, "w3": 2}),
        ("attention-op-4d", {"w1": 2, "w2": 2, "w3": 2}),
        ("attention-op-one-key-head", {"w1": 2, "w2": 2, "w3": 2}),
        ("attention-op-cached", {"w1": 0, "w2": 0, "w3": 0}),
        ("rotary-embedding", {"w1": 1, "w2": 1, "w3": 4}),  # pairs meet both orders of pairs
    ],
)
def test_dims_go_inside_of_fused_attention(name: str, units: dict[str, int]) -> None:
    """The scale that the size of a head implied is written down, or the numbers would differ."""
    dims = Reading(attention="dims")
    analysis = api.inspect(build(MODELS[name]), dims)
    for p in analysis.parameters:
        if p.produces and p.name in units:
            labels = set(analysis.labels(p.birth).tolist())
            assert len(labels - analysis.components.pinned.keys()) == units[p.name], p.name
    done = api.prune(build(MODELS[name]), ALL, reading=dims)
    node = next(n for n in done.model.graph if n.op_type == "Attention")
    assert ("scale" in node.attributes) == (units["w1"] > 1)


def test_a_sum_along_an_axis_that_is_not_known_pins() -> None:
    case = Case(
        "a = Conv(x, w1) b = CumSum(a, k) y = Conv(b, w2)",
        "float[8,3,3,3] w1, float[4,8,3,3] w2",
        inputs="float[N,3,8,8] x, int32 k",
    )
    (refusal,) = api.plan(build(case), Choice(pattern="w1")).refused
    assert refusal.reason == "CumSum CumSum_1: its axis is not constant"


def test_the_macs_of_products_with_dots() -> None:
    case = Case(
        'a = Einsum<equation="...ij,...jk->...ik">(x, z) y = Einsum<equation="...ij->...i">(a)',
        "",
        inputs="float[2,3,4,5] x, float[1,3,5,6] z",
        outputs="float[2,3,4] y",
    )
    per_node = cost(build(case)).per_node
    assert list(per_node.values()) == [2 * 3 * 4 * 5 * 6, 2 * 3 * 4 * 6]


def test_weights_that_are_outputs_stay() -> None:
    case = Case(
        "a = Conv(x, w1, w3) b = Relu(a) y = Conv(b, w2)",
        "float[8,3,3,3] w1, float[4,8,3,3] w2, float[8] w3",
        outputs="float[N,4,P,Q] y, float[4,8,3,3] w2, float[8] w3",
    )
    (refusal,) = api.plan(build(case), Choice(pattern="w1")).refused
    assert refusal.reason == "graph output w2"
    free = replace(case, outputs="float[N,4,P,Q] y, float[8] w3")
    result = api.prune(build(free), Choice(pattern="w1", amount=Amount(round_to=1)))
    assert result.model.graph.initializers["w3"].shape == [8]
    assert result.model.graph.initializers["w2"].shape == [4, 4, 3, 3]


def test_a_freed_output_loses_channels() -> None:
    model = build(MODELS["residual"])
    result = api.prune(model, ALL, reading=Reading(free_outputs=("y",)))
    assert result.model.graph.initializers["w2"].shape == [2, 4, 1, 1]
    assert result.model.graph.outputs[0].shape[1] == 2


def test_the_scale_of_attention_keeps_its_number() -> None:
    """1/sqrt(width) is computed from the Shape of the cut axis; the original number must stay."""
    result = api.prune(build(MODELS["scale-from-shape"]), ALL)
    numbers = [v.const_value.numpy() for v in result.model.graph.initializers.values()]
    assert any(n.dtype == np.int64 and n.tolist() == [8] for n in numbers)


def test_vectors_that_exporters_share_are_cloned() -> None:
    case: Case = MODELS["vector-shared-by-layers"]
    result = api.prune(build(case), Choice(ratios={"w1": 0.5}, amount=Amount(round_to=1)))
    lengths = sorted(
        v.const_value.size for v in result.model.graph.initializers.values() if len(v.shape) == 1
    )
    assert lengths == [4, 8]
