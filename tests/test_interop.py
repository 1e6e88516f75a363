import importlib.util
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx_ir.passes import common

from onnxslim_kd import interop
from onnxslim_kd import model as model_io
from onnxslim_kd.errors import ModelError, NotFoundError, PassError
from onnxslim_kd.runtime import Session

HERE = "test_interop"
NET = """
<ir_version: 8, opset_import: ["": 17]>
net (float[N, 4] x) => (float[N, 4] y)
<float[4] w = {1, 2, 3, 4}, float[4] spare = {9, 9, 9, 9}>
{
  [first] a = Mul (x, w)
  [second] b = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (a)
  [third] y = Mul (a, b)
}
"""
BRANCHES = """
<ir_version: 8, opset_import: ["": 17]>
net (float[N, 4] x, bool c) => (float[N, 4] y)
<float[4] w = {1, 2, 3, 4}>
{
  y = If (c) <
    then_branch = yes () => (float[N, 4] p) { p = Mul (x, w) },
    else_branch = no () => (float[N, 4] q) <float[1] own = {5}> { r = Add (x, w) q = Mul(r, own) }
  >
}
"""


@pytest.fixture(autouse=True)
def _own_passes_importable(monkeypatch, request) -> None:
    monkeypatch.syspath_prepend(request.path.parent)


def net(text: str = NET) -> ir.Model:
    return model_io.load(onnx.parser.parse_model(text))


def canonical(model: ir.Model) -> onnx.ModelProto:
    """The proto in an order that does not depend on where value_info was written."""
    proto = ir.to_proto(model)
    _sort_value_info(proto.graph)
    return proto


def _sort_value_info(graph: onnx.GraphProto) -> None:
    infos = sorted(graph.value_info, key=lambda info: info.name)
    del graph.value_info[:]
    graph.value_info.extend(infos)
    for node in graph.node:
        for attribute in node.attribute:
            attribute.t.ClearField("name")
            if attribute.type == onnx.AttributeProto.GRAPH:
                _sort_value_info(attribute.g)


# -------------------------------------------------------------------- users' passes


def fuse_hard_swish(graph: gs.Graph) -> gs.Graph:
    """x * HardSigmoid(x) -> HardSwish(x), as a user writes it."""
    for gate in [node for node in graph.nodes if node.op == "HardSigmoid"]:
        sixth = abs(gate.attrs.get("alpha", 0.2) - 1 / 6) < 1e-6
        users = gate.outputs[0].outputs
        if not sixth or len(users) != 1 or users[0].op != "Mul":
            continue
        x, product = gate.inputs[0], users[0]
        if x in product.inputs:
            product.op, product.attrs, product.inputs = "HardSwish", {}, [x]
    return graph.cleanup().toposort()


def multiply_instead_of_pow(graph: gs.Graph) -> None:
    """Pow(x, 2) -> Mul(x, x), inside of branches, too; in place."""
    for part in [graph, *graph.subgraphs(recursive=True)]:
        for node in part.nodes:
            exponent = node.inputs[1] if node.op == "Pow" else None
            if isinstance(exponent, gs.Constant) and float(exponent.values.squeeze()) == 2:
                node.op, node.inputs = "Mul", [node.inputs[0], node.inputs[0]]


def double_weights(graph: gs.Graph) -> None:
    for part in [graph, *graph.subgraphs(recursive=True)]:
        for tensor in part.tensors().values():
            if isinstance(tensor, gs.Constant) and tensor.name == "w":
                tensor.values = 2 * tensor.values
                return


def gate_is_an_output(graph: gs.Graph) -> None:
    graph.outputs.append(graph.tensors()["b"])


def declared(graph: gs.Graph) -> None:
    gate_is_an_output(graph)


declared.changes_interface = True  # type: ignore[attr-defined]


def returns_a_number(graph: gs.Graph) -> int:
    return 3


def raises(graph: gs.Graph) -> None:
    raise KeyError("boom")


def unknown_operator(graph: gs.Graph) -> None:
    graph.nodes[0].op = "Muul"


def cycle(graph: gs.Graph) -> None:
    graph.nodes[0].inputs[0] = graph.outputs[0]


def unsorted(graph: gs.Graph) -> None:
    graph.nodes.reverse()


def two_weights_of_one_name(graph: gs.Graph) -> None:
    (branch, _) = graph.subgraphs()
    branch.nodes[0].inputs[1] = gs.Constant("w", np.zeros(4, np.float32))
    graph.nodes.append(
        gs.Node("Add", "new", inputs=[graph.inputs[0], _weight()], outputs=[gs.Variable("z")])
    )


def _weight() -> gs.Constant:
    return gs.Constant("w", np.ones(4, np.float32))


# ---------------------------------------------------------------------------- tests


def test_what_graphsurgeon_drops_is_put_back() -> None:
    model = net()
    model.doc_string, model.domain, model.model_version = "doc", "org.example", 7
    model.metadata_props["author"] = "me"
    model.graph.doc_string = "graph doc"
    model.graph.metadata_props["g"] = "1"
    for index, node in enumerate(model.graph):
        node.doc_string, node.metadata_props["scope"] = f"node {index}", f"layer{index}"
        node.outputs[0].doc_string = f"value {index}"
        node.outputs[0].metadata_props["v"] = str(index)
    weight = model.graph.initializers["w"]
    weight.doc_string, weight.metadata_props["kind"] = "weight doc", "PARAMETER"
    model.graph[0].outputs[0].meta["quant_parameter_tensor_names"] = {"SCALE_TENSOR": "w"}
    model.graph.inputs[0].shape.set_denotation(0, "DATA_BATCH")
    expected = canonical(model)

    plain = gs.export_onnx(interop.to_gs(model))
    assert not plain.metadata_props and not plain.graph.quantization_annotation  # it does drop
    back = interop.from_gs(interop.to_gs(model), model)
    assert canonical(back) == expected
    assert back.graph.initializers["w"].const_value is weight.const_value  # shared, not copied


def test_captured_weights_stay_shared_and_branches_keep_their_own() -> None:
    model = net(BRANCHES)
    assert canonical(interop.from_gs(interop.to_gs(model), model)) == canonical(model)
    changed = interop.apply(model, f"{HERE}:double_weights")
    assert list(changed.graph.initializers) == ["w"]
    assert changed.graph.initializers["w"].const_value.numpy().tolist() == [2, 4, 6, 8]
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [1, 2, 3, 4]
    x = np.ones((1, 4), np.float32)
    for condition, expected in ((True, [2, 4, 6, 8]), (False, [15, 25, 35, 45])):
        y = Session(changed).run({"x": x, "c": np.array(condition)})["y"]
        assert y.tolist() == [expected]


def test_a_users_pass_fuses() -> None:
    model = net()
    model.graph[2].metadata_props["scope"] = "third"
    fused = interop.apply(model, f"{HERE}:fuse_hard_swish")
    assert [node.op_type for node in fused.graph] == ["Mul", "HardSwish"]
    assert not fused.graph[1].metadata_props  # it is another node now
    assert "spare" in fused.graph.initializers
    x = np.linspace(-4, 4, 8, dtype=np.float32).reshape(2, 4)
    before, after = (Session(m).run({"x": x})["y"] for m in (model, fused))
    np.testing.assert_allclose(after, before, atol=1e-6)
    again = interop.apply(fused, f"{HERE}:fuse_hard_swish")
    assert canonical(again) == canonical(fused)


def test_a_pass_may_leave_nodes_unsorted() -> None:
    sorted_again = interop.apply(net(), f"{HERE}:unsorted")
    assert [node.name for node in sorted_again.graph] == ["first", "second", "third"]


def test_a_declared_change_of_the_interface() -> None:
    outputs = interop.apply(net(), f"{HERE}:declared").graph.outputs
    assert [value.name for value in outputs] == ["y", "b"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "gate_is_an_output",
            NET,
            "changes the outputs to y (FLOAT), b (FLOAT); if it means to, set",
        ),
        ("returns_a_number", NET, "returns a int, not a graphsurgeon Graph or None"),
        ("raises", NET, "raises fails: KeyError: 'boom'"),
        ("unknown_operator", NET, "the result is no valid model: No Op registered for Muul"),
        ("cycle", NET, "the graph has a cycle"),
        (
            "two_weights_of_one_name",
            BRANCHES,
            "two weights are named w; name one of them otherwise",
        ),
    ],
)
def test_a_wrong_pass_is_named(name, text, says) -> None:
    with pytest.raises(PassError, match=re.escape(says)) as caught:
        interop.apply(net(text), f"{HERE}:{name}")
    assert str(caught.value).startswith(f"{HERE}:{name}")


def test_an_unknown_pass() -> None:
    with pytest.raises(NotFoundError, match="near misses: fuse_hard_swish"):
        interop.apply(net(), f"{HERE}:fuse_hard_swich")


def model_with(*, attribute: ir.Attr | None = None, dtype: int | None = None) -> ir.Model:
    node = helper.make_node("Custom", ["x", "w"], ["y"], "node", domain="org.example")
    w = helper.make_tensor("w", dtype or TensorProto.FLOAT, [2], [1, 1])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("org.example", 1)]
    graph = helper.make_graph([node], "net", [x], [y], [w])
    model = model_io.load(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    if attribute is not None:
        model.graph[0].attributes[attribute.name] = attribute
    return model


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": TensorProto.INT4}, "weight w has type INT4, which graphsurgeon corrupts"),
        ({"dtype": TensorProto.FLOAT8E4M3FNUZ}, "weight w has type FLOAT8E4M3FNUZ, which"),
        ({"attribute": ir.AttrInt64s("k", [])}, "attribute k of node node is an empty list"),
        (
            {"attribute": ir.Attr("k", ir.AttributeType.STRING, b"\xff\x00")},
            "attribute k of node node holds bytes that are no text",
        ),
    ],
)
def test_what_graphsurgeon_corrupts_is_refused(options, says) -> None:
    with pytest.raises(ModelError, match=re.escape(says)):
        interop.to_gs(model_with(**options))


@pytest.mark.parametrize(
    "dtype",
    [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.BOOL],
)
def test_rare_types_survive(dtype) -> None:
    model = model_with(dtype=dtype)
    assert canonical(interop.from_gs(interop.to_gs(model), model)) == canonical(model)


def test_attributes_that_graphsurgeon_skips_are_put_back() -> None:
    value = ir.TypeAndShape(ir.TensorType(ir.DataType.FLOAT), ir.Shape([3]))
    model = model_with(attribute=ir.AttrTypeProto("kind", value))
    back = interop.from_gs(interop.to_gs(model), model)
    assert back.graph[0].attributes["kind"].type == ir.AttributeType.TYPE_PROTO


def test_a_broken_graph_is_no_traceback() -> None:
    graph = interop.to_gs(net())
    graph.outputs[0].dtype = None
    with pytest.raises(PassError, match="graphsurgeon cannot write the graph"):
        interop.from_gs(graph, net())


# ---------------------------------------------------------------- models that packages ship

SHIPPED = {
    "rapidocr_onnxruntime": "models/*.onnx",
    "silero_vad": "data/*.onnx",
    "onnx": "backend/test/data/light/light_s*.onnx",
}


def shipped() -> list[Path]:
    found = []
    for package, pattern in SHIPPED.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, f"install {package}"
        found += sorted(Path(spec.origin).parent.glob(pattern))
    return found


@pytest.mark.real
@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
@pytest.mark.parametrize("normalise", [True, False])
def test_real_models_survive_the_round_trip(path, normalise) -> None:
    model = model_io.load(path, normalise=normalise)
    back = interop.from_gs(interop.to_gs(model), model)
    if model.ir_version < 4:  # weights had to be inputs, which graphsurgeon undoes
        common.RemoveInitializersFromInputsPass()(model)
        model.ir_version = 4
    assert canonical(back) == canonical(model)


@pytest.mark.real
def test_fusing_in_a_real_model() -> None:
    path = next(path for path in shipped() if "rec_infer" in path.name)
    model = model_io.load(path)
    fused = interop.apply(model, f"{HERE}:decomposed_hard_swish")
    count = sum(node.op_type == "HardSwish" for node in fused.graph)
    assert count >= 10
    assert len(fused.graph) == len(model.graph) - 3 * count
    x = np.random.default_rng(0).standard_normal((1, 3, 48, 320), np.float32)
    (before,), (after,) = (Session(m).run({"x": x}).values() for m in (model, fused))
    np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_half"])
def test_a_pass_inside_the_branches_of_a_real_model(name) -> None:
    model = model_io.load(next(path for path in shipped() if path.stem == name))
    changed = interop.apply(model, f"{HERE}:multiply_instead_of_pow")
    powers = [node for node in model.graph.all_nodes() if node.op_type == "Pow"]
    assert powers
    assert not [node for node in changed.graph.all_nodes() if node.op_type == "Pow"]
    assert model_io.weight_bytes(changed) <= model_io.weight_bytes(model)
    feeds = {
        "input": np.random.default_rng(0).standard_normal((1, 512), np.float32),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    feeds = {value.name: feeds[value.name] for value in model.graph.inputs}
    before, after = (Session(m).run(feeds) for m in (model, changed))
    for output, array in before.items():
        np.testing.assert_allclose(after[output], array, atol=1e-5)


def decomposed_hard_swish(graph: gs.Graph) -> gs.Graph:
    """x * Clip(x + 3, 0, 6) / 6 -> HardSwish(x)."""
    for divide in [node for node in graph.nodes if node.op == "Div"]:
        product = _producer(divide.inputs[0], "Mul")
        clip = _producer(product.inputs[1], "Clip") if product else None
        shift = _producer(clip.inputs[0], "Add") if clip else None
        if shift is None or product.inputs[0] is not shift.inputs[0]:
            continue
        numbers = [shift.inputs[1], *clip.inputs[1:], divide.inputs[1]]
        if [float(number.values.squeeze()) for number in numbers] == [3, 0, 6, 6]:
            divide.op, divide.inputs = "HardSwish", [product.inputs[0]]
    return graph.cleanup()


def _producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None
