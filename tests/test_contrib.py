"""Operators of com.microsoft that stay as they are: what goes, and that the kernels agree."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxslim_kd import Amount, Choice, Plan, api
from onnxslim_kd.contrib import dequantised
from onnxslim_kd.model import load
from onnxslim_kd.passes.ties import CONTRIB

HALF = Choice(pattern="^(gate|up|down|q|k|v|qkv|out)", ratio=0.5, amount=Amount(round_to=1))
KEPT = "keys and values are kept in a cache"


class Net:
    """Nodes of com.microsoft between ``x`` and the last value, with seeded weights."""

    def __init__(self, width: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)
        self.width = width
        self.inputs = [onnx.helper.make_tensor_value_info("x", 1, [1, 3, width])]
        self.outputs: list[onnx.ValueInfoProto] = []

    def op(self, op_type: str, inputs: list[str], outputs: list[str], **attributes: object) -> str:
        domain = "com.microsoft" if op_type in CONTRIB else ""
        node = onnx.helper.make_node(
            op_type, inputs, outputs, name=outputs[0], domain=domain, **attributes
        )
        self.nodes.append(node)
        return outputs[0]

    def array(self, name: str, array: np.ndarray) -> str:
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def nbits(self, x: str, name: str, rows: int, columns: int, form: "Form") -> str:
        size, bits, blocks = form.block, form.bits, columns // form.block
        codes = self.random.integers(0, 256, (rows, blocks, size * bits // 8), np.uint8)
        scales = self.random.uniform(0.01, 0.1, (rows, blocks)).astype(np.float32)
        per_byte = 8 // bits
        zeros = self.random.integers(0, 256, (rows, -(-blocks // per_byte)), np.uint8)
        if form.flat:
            scales, zeros = scales.ravel(), zeros.ravel()
        inputs = [x, self.array(name, codes), self.array(f"{name}.scales", scales)]
        if form.zeros:
            inputs.append(self.array(f"{name}.zeros", zeros))
        return self.op(
            "MatMulNBits", inputs, [f"{name}.y"], N=rows, K=columns, bits=bits, block_size=size
        )

    def matmul(self, x: str, name: str, rows: int, columns: int) -> str:
        array = self.random.standard_normal((columns, rows)).astype(np.float32) / columns**0.5
        return self.op("MatMul", [x, self.array(name, array)], [f"{name}.y"])

    def build(self, last: str) -> ir.Model:
        outputs = [onnx.helper.make_tensor_value_info(last, 1, [1, 3, self.width])]
        graph = onnx.helper.make_graph(
            self.nodes, "g", self.inputs, [*outputs, *self.outputs], self.weights
        )
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        return load(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


class Form:
    """How a weight is quantised."""

    def __init__(self, bits: int = 4, *, zeros: bool = False, flat: bool = False) -> None:
        self.bits, self.zeros, self.flat, self.block = bits, zeros, flat, 16


def feed_forward(form: Form) -> ir.Model:
    """The gated layer of a language model, 64 units wide."""
    net = Net(32)
    gate, up = (net.nbits("x", name, 64, 32, form) for name in ("gate", "up"))
    gate = net.op("Sigmoid", [gate], ["s"])
    both = net.op("Mul", [gate, up], ["m"])
    return net.build(net.nbits(both, "down", 32, 64, form))


def attention(heads: int, groups: int, *, packed: bool, form: Form | None = None) -> ir.Model:
    """Grouped queries with caches and rotation, heads of 16."""
    net = Net(32)

    def layer(x: str, name: str, rows: int, columns: int) -> str:
        more = () if form is None else (form,)
        return (net.matmul if form is None else net.nbits)(x, name, rows, columns, *more)

    wide, narrow = 16 * heads, 16 * groups
    if packed:
        qkv = [layer("x", "qkv", wide + 2 * narrow, 32), "", ""]
    else:
        qkv = [layer("x", "q", wide, 32), layer("x", "k", narrow, 32), layer("x", "v", narrow, 32)]
    for side in ("key", "value"):
        cache = [1, groups, "past", 16]
        net.inputs.append(onnx.helper.make_tensor_value_info(f"past_{side}", 1, cache))
        cache = [1, groups, "total", 16]
        net.outputs.append(onnx.helper.make_tensor_value_info(f"present_{side}", 1, cache))
    total = net.op("Shape", ["past_key"], ["length"], start=2, end=3)
    total = net.op("Add", [total, net.array("tokens", np.array([3]))], ["longer"])
    total = net.op("Cast", [total], ["total"], to=onnx.TensorProto.INT32)
    ends = net.op("Sub", [total, net.array("one", np.array([1], np.int32))], ["ends"])
    angles = [net.array(n, net.random.random((64, 8)).astype(np.float32)) for n in ("cos", "sin")]
    inputs = [*qkv, "past_key", "past_value", ends, total, *angles]
    outputs = ["attended", "present_key", "present_value"]
    net.op(
        "GroupQueryAttention", inputs, outputs, num_heads=heads, kv_num_heads=groups, do_rotary=1
    )
    return net.build(layer("attended", "out", 32, wide))


def kept(plan: Plan, name: str) -> list[int]:
    members = (m for group in plan.groups for m in group.members if m.parameter == name)
    return next(list(m.kept) for m in members if m.kept is not None)


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


@pytest.mark.parametrize(
    "form",
    [Form(), Form(zeros=True), Form(8, zeros=True), Form(flat=True), Form(zeros=True, flat=True)],
)
def test_columns_go_in_blocks_and_rows_with_them(form: Form) -> None:
    model = feed_forward(form)
    done = api.prune(model, HALF)
    whole = api.inspect(model).model
    rows = kept(done.plan, "gate")
    together = 32 if form.zeros and form.bits == 4 else 16  # zero points of two blocks in a byte
    assert len(rows) == 32 and all(rows[i] % together == 0 for i in range(0, 32, together))
    for name, axis, ids in (("gate", 0, rows), ("down", 1, sorted({r // 16 for r in rows}))):
        before = dequantised(node_of(whole, f"{name}.y"))
        after = dequantised(node_of(done.model, f"{name}.y"))
        assert np.array_equal(np.take(before, ids, axis), after)
    down = node_of(done.model, "down.y").attributes
    assert (down["K"].value, down["N"].value) == (32, 32)
    assert done.after.macs * 2 == done.before.macs


def test_the_least_block_is_the_one_of_small_weights() -> None:
    """The bytes of a quantised weight say nothing about its size: the scales do."""
    model = feed_forward(Form())
    for name in ("gate", "up"):
        value = model.graph.initializers[f"{name}.scales"]
        scales = np.ones((64, 2), np.float32)
        scales[16:48] = 1e-3
        value.const_value = ir.Tensor(scales, name=value.name)
    assert kept(api.plan(model, HALF), "gate") == [*range(16), *range(48, 64)]


def test_one_block_of_columns_stays() -> None:
    net = Net(16)
    model = net.build(net.nbits(net.nbits("x", "up", 16, 16, Form()), "down", 16, 16, Form()))
    reasons = {r.parameter: r.reason for r in api.plan(model, HALF).refused}
    assert reasons["up"] == "one block of 16 weights shares a scale"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("form", [None, Form()])
def test_queries_go_for_every_key_alike(packed: bool, form: Form | None) -> None:
    model = attention(8, 2, packed=packed, form=form)
    done = api.prune(model, HALF)
    node = node_of(done.model, "attended")
    assert node.attributes["num_heads"].value == 4
    assert node.attributes["kv_num_heads"].value == 2
    heads = {i // 16 for i in kept(done.plan, "qkv" if packed else "q")}
    queries = sorted(h for h in heads if h < 8)
    assert [h - 4 for h in queries if h >= 4] == [h for h in queries if h < 4]
    assert heads - set(queries) == ({8, 9, 10, 11} if packed else set())
    if not packed:
        reasons = {r.parameter: r.reason for r in done.plan.refused}
        assert reasons["k"] == reasons["v"] == KEPT


def test_heads_with_keys_of_their_own_stay() -> None:
    refused = api.plan(attention(2, 2, packed=False), HALF).refused
    reasons = {r.parameter: r.reason for r in refused}
    assert reasons["q"] == "every head has a key and a value of its own in a cache"


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("kind", [onnx.TensorProto.INT4, onnx.TensorProto.UINT8])
def test_blocks_of_dequantize_linear_go_as_a_whole(kind: int, zeros: bool) -> None:
    net = Net(32)

    def layer(x: str, name: str, rows: int, columns: int) -> str:
        dtype, shape = onnx.helper.tensor_dtype_to_np_dtype(kind), (columns // 16, rows)
        codes = net.random.integers(0, 8, (columns, rows)).astype(dtype)
        scales = net.random.uniform(0.01, 0.1, shape).astype(np.float32)
        inputs = [net.array(name, codes), net.array(f"{name}.scales", scales)]
        if zeros:
            middle = net.random.integers(0, 8, shape).astype(dtype)
            inputs.append(net.array(f"{name}.zeros", middle))
        weight = net.op("DequantizeLinear", inputs, [f"{name}.w"], axis=0, block_size=16)
        return net.op("MatMul", [x, weight], [f"{name}.y"])

    model = net.build(layer(net.op("Relu", [layer("x", "up", 64, 32)], ["h"]), "down", 32, 64))
    done = api.prune(model, HALF)
    columns = kept(done.plan, "up")
    assert len(columns) == 32 and all(columns[i] % 16 == 0 for i in (0, 16))
    before, after = (m.graph.initializers for m in (model, done.model))
    for name, axis in (("up", 1), ("down", 0)):
        whole, cut = (side[name].const_value.numpy() for side in (before, after))
        assert np.array_equal(np.take(whole, columns, axis), cut)
    blocks = [i // 16 for i in columns[::16]]
    whole, cut = (side["down.scales"].const_value.numpy() for side in (before, after))
    assert np.array_equal(whole[blocks], cut)


def tied() -> ir.Model:
    """A table of 4 bits that makes embeddings and, turned around, scores."""
    net = Net(64)
    net.inputs = [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, 3])]
    scores = net.nbits("e", "table", 64, 64, Form())
    target = net.array("rows", np.array([64, 32], np.int64))
    flat = net.op("Reshape", ["table", target], ["flat"])
    picked = [flat, "ids", "table.scales"]
    net.op(
        "GatherBlockQuantized",
        picked,
        ["p"],
        bits=4,
        block_size=16,
        gather_axis=0,
        quantize_axis=1,
    )
    net.op("Relu", ["p"], ["e"])
    net.nodes = [*net.nodes[1:], net.nodes[0]]
    return net.build(scores)


def test_a_table_that_is_read_twice_loses_the_same_blocks() -> None:
    done = api.prune(tied(), Choice(pattern="table", ratio=0.5, amount=Amount(round_to=1)))
    assert done.model.graph.initializers["table"].shape == [64, 2, 8]
    assert done.model.graph.initializers["table.scales"].shape == [64, 2]
    shapes = {v.name: v.shape for node in done.model.graph for v in node.outputs}
    assert shapes["p"] == [1, 3, 32] and shapes["table.y"] == [1, 3, 64]


def test_caches_are_as_wide_as_the_heads() -> None:
    """The exporter leaves the width of a head open, and only one number runs."""
    model = attention(8, 2, packed=True)
    for value in model.graph.inputs[1:3]:
        value.shape = ir.Shape([1, 2, "past", "width"])
    for value in model.graph.outputs[1:]:
        value.shape = ir.Shape([1, 2, "total", "width"])
    done = api.prune(model, HALF)
    assert all(shape["past_key"][3] == 16 for shape in done.proof.shapes)
