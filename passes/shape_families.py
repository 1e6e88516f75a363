"""Shapes of the operators that graphs are full of: asking ONNX for each node takes much longer."""

from collections.abc import Callable

import onnx_ir as ir

from onnxslim_kd.passes.shape_rules import Known, Shape, broadcast


def _same(found: Known, node: ir.Node) -> Shape | None:
    return found.shape_of(node, 0) if len(node.outputs) == 1 else None


def _broadcast(found: Known, node: ir.Node) -> Shape | None:
    shapes = [found.shape_of(node, index) for index in range(len(node.inputs))]
    result: Shape = ()
    for shape in shapes:
        if shape is None:
            return None
        result = _joint(found, result, shape)
    return result


def _joint(found: Known, one: Shape, two: Shape) -> Shape:
    rank = max(len(one), len(two))
    first, second = ((1,) * (rank - len(shape)) + shape for shape in (one, two))
    return tuple(broadcast(found, a, b) for a, b in zip(first, second, strict=True))


def _transposed(found: Known, node: ir.Node) -> Shape | None:
    source, order = found.shape_of(node, 0), node.attributes.get_ints("perm")
    if source is None or order is None:
        return None
    return tuple(source[axis] for axis in order)


def _multiplied(found: Known, node: ir.Node) -> Shape | None:
    one, two = found.shape_of(node, 0), found.shape_of(node, 1)
    if one is None or two is None or min(len(one), len(two)) < 2:
        return None
    return (*_joint(found, one[:-2], two[:-2]), one[-2], two[-1])


def _gathered(found: Known, node: ir.Node) -> Shape | None:
    source, index = found.shape_of(node, 0), found.shape_of(node, 1)
    axis = node.attributes.get_int("axis", 0)
    if source is None or index is None:
        return None
    axis %= len(source)
    return (*source[:axis], *index, *source[axis + 1 :])


_UNARY = (
    "Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Neg", "Not", "Reciprocal",
    "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
_POINTWISE = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min",
    "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Where", "Xor",
)  # fmt: skip

FAMILIES: dict[str, Callable[[Known, ir.Node], Shape | None]] = {
    **dict.fromkeys(_UNARY, _same),
    **dict.fromkeys(_POINTWISE, _broadcast),
    "Gather": _gathered,
    "MatMul": _multiplied,
    "Transpose": _transposed,
}
"""Operator -> the shape of its output."""
