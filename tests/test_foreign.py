"""Operators that ONNX Runtime does not have: pinned, and proven up to them."""

import onnx
import onnx_ir as ir
import pytest

from onnxslim_kd import Amount, Choice, api
from onnxslim_kd.errors import ProofError
from tests.models import Case, proto

ALL = Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
WEIGHTS = "float[8,3,3,3] w1, float[8,8,1,1] w2, float[6,8,1,1] w3, float[4,6,1,1] w4"
W5 = "float[64,64] w5"
HEAD = "a = Conv(x, w1) b = Conv(a, w2) "


def model(body: str, weights: str = WEIGHTS, **more: str) -> onnx.ModelProto:
    """A case in which ``Foreign`` is somebody's own operator."""
    made = proto(Case(HEAD + body.replace("Foreign", "Relu"), weights, **more))
    for node, text in zip(made.graph.node, (HEAD + body).split(" = ")[1:], strict=True):
        if text.startswith("Foreign"):
            node.op_type, node.domain = "Foreign", "my.own"
    made.opset_import.add(domain="my.own", version=1)
    return made


def left(done: api.Pruned) -> dict[str, tuple[int, ...]]:
    held = done.model.graph.initializers.values()
    return {v.name or "": tuple(v.const_value.shape) for v in held if v.const_value is not None}


def test_behind_its_unknown_result_all_stays() -> None:
    done = api.prune(
        model("c = Foreign(b, w5) d = Conv(c, w3) y = Conv(d, w4)", f"{WEIGHTS}, {W5}"), ALL
    )
    assert left(done) == {
        "w1": (4, 3, 3, 3),
        "w2": (8, 4, 1, 1),
        "w5": (64, 64),
        "w3": (6, 8, 1, 1),
        "w4": (4, 6, 1, 1),
    }
    reasons = {r.parameter: r.reason for r in done.plan.refused}
    assert reasons["w2"] == "no rule for my.own.Foreign Foreign_2"
    assert "the shape of an input is not known" in reasons["w3"]
    assert done.proof is not None and done.proof.outputs == 0
    assert str(done.proof).endswith(", up to what ONNX Runtime does not have: my.own.Foreign")


@pytest.mark.parametrize("batch", ["N", "2"])
def test_behind_a_known_result_pruning_goes_on(batch: str) -> None:
    shape = {"inputs": f"float[{batch},3,8,8] x", "outputs": f"float[{batch},4,6,6] y"}
    body = "c = Foreign(b) d = Conv(c, w3) e = Add(d, d) y = Conv(e, w4)"
    done = api.prune(model(body, f"{WEIGHTS}, float[{batch},8,6,6] c", **shape), ALL)
    assert left(done)["w1"][0] == 4 and left(done)["w3"][0] == 3
    assert done.proof is not None and done.proof.outputs == 1
    assert {value.name for value in done.model.graph.inputs} == {"x"}
    assert [node.op_type for node in done.model.graph].count("Foreign") == 1


def test_a_wrong_cut_beside_it_is_found() -> None:
    given = model("c = Foreign(b) d = Conv(a, w3) y = Add(c, d)", WEIGHTS)
    plan = api.plan(given, ALL)
    pruned = api.cut(given, plan)
    weight = pruned.graph.initializers["w2"]
    assert weight.const_value is not None
    wrong = weight.const_value.numpy().copy()
    wrong[:, 0] += 1
    weight.const_value = ir.Tensor(wrong)
    with pytest.raises(ProofError, match="is not the silenced original"):
        api.verify(given, plan, pruned)


def test_nothing_left_to_compare_is_said() -> None:
    made = model("y = Foreign(b)")
    del made.graph.node[:2]
    made.graph.node[0].input[:] = ["x", "w1"]
    with pytest.raises(ProofError, match=r"nothing can be compared without my\.own\.Foreign"):
        api.prune(made, ALL)
