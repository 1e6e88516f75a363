"""What a model costs: multiply-accumulates, parameters, bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from onnxslim_kd import contrib
from onnxslim_kd import shapes as shape_sampling
from onnxslim_kd.access import bytes_of, dims, extents_of, graphs
from onnxslim_kd.shapes import Shape, Shapes


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        macs: Multiply-accumulates of convolutions, matrix products and recurrences, for one
            element of a dynamic batch; biases and everything element-wise are not counted.
        parameters: Elements of all floating-point and quantised weights.
        bytes: Bytes of all initializers.
        per_node: MACs by node name.
    """

    macs: int
    parameters: int
    bytes: int
    per_node: Mapping[str, int]


def cost(model: ir.Model, shapes: Shapes | None = None) -> Cost:
    """Count the costs of ``model``.

    Args:
        model: A loaded model.
        shapes: A sample of its shapes; made when not given.
    """
    shapes = shapes or shape_sampling.sample(model)
    per_node = macs(model, shapes.of)
    batch = dynamic_batch(model, shapes)
    held = (v.const_value for g in graphs(model) for v in g.initializers.data.values())
    weights = [tensor for tensor in held if tensor is not None]
    return Cost(
        macs=sum(per_node.values()) // batch,
        parameters=sum(prod(extents_of(w)) for w in weights if is_weight(w)),
        bytes=sum(map(bytes_of, weights)),
        per_node={name: count // batch for name, count in per_node.items()},
    )


def is_weight(tensor: ir.TensorProtocol) -> bool:
    """Tell weights from constants of shape arithmetic, which are 32- and 64-bit integers."""
    integers = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING)
    return tensor.dtype not in integers


def dynamic_batch(model: ir.Model, shapes: Shapes) -> int:
    """Return the batch that the sample chose, 1 where the model fixes it."""
    for value in model.graph.inputs:
        shape = shapes.of(value)
        if value.shape is not None and len(value.shape) > 1 and dims(value)[0] is None and shape:
            return shape[0]
    return 1


def macs(model: ir.Model, shape_of: Callable[[ir.Value], Shape | None]) -> dict[str, int]:
    """Return the MACs of every node that has any, for the shapes that ``shape_of`` gives."""
    found = {}
    for node in model.graph:
        count = BY_DOMAIN.get(node.domain, {}).get(node.op_type)
        if count is None:
            continue
        ins = [shape_of(v) if v is not None else None for v in node.inputs]
        out = shape_of(node.outputs[0]) if node.outputs[0].name else ()
        if out is not None and None not in ins[:2]:
            found[node.name or ""] = count(node, [s or () for s in ins], out)
    return found


def _conv(node: ir.Node, x: list[Shape], out: Shape) -> int:
    weight = x[3] if node.op_type == "QLinearConv" else x[1]
    return prod(out) * prod(weight[1:])


def _conv_transpose(node: ir.Node, x: list[Shape], out: Shape) -> int:
    return prod(x[0]) * prod(x[1][1:])


def _gemm(node: ir.Node, x: list[Shape], out: Shape) -> int:
    return prod(out) * x[0][0 if node.attributes.get_int("transA", 0) else 1]


def _matmul(node: ir.Node, x: list[Shape], out: Shape) -> int:
    return prod(out) * x[0][-1]


def _einsum(node: ir.Node, x: list[Shape], out: Shape) -> int:
    terms = (node.attributes.get_string("equation") or "").replace(" ", "").split("->")[0]
    sizes: dict[object, int] = {}
    for term, shape in zip(terms.split(","), x, strict=True):
        before, _, behind = term.partition("...")
        dotted = range(len(shape) - len(before) - len(behind), 0, -1)  # counted from their end
        for letter, size in zip((*before, *dotted, *behind), shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return prod(sizes.values())


def _recurrent(node: ir.Node, x: list[Shape], out: Shape) -> int:
    steps, batch = x[0][:2]
    return steps * batch * (prod(x[1]) + prod(x[2]))


def _attention(node: ir.Node, x: list[Shape], out: Shape) -> int:
    batch, width = x[0][0], prod(x[0][1:]) // x[0][-2]
    return 2 * batch * x[0][-2] * x[1][-2] * width


Count = Callable[[ir.Node, list[Shape], Shape], int]

MACS: Mapping[str, Count] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
}
BY_DOMAIN: Mapping[str, Mapping[str, Count]] = {
    "": MACS,
    "ai.onnx": MACS,
    contrib.MICROSOFT: contrib.MACS,
}
