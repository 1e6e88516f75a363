"""Shapes of the operators that graphs are full of: asking ONNX for each node takes much longer."""

from collections.abc import Callable

import onnx_ir as ir

from onnxslim_kd.passes.shape_rules import SHAPES, Reader, Shape, broadcast
from onnxslim_kd.passes.symbolic import Number


def _same(found: Reader, node: ir.Node) -> Shape | None:
    return found.shape_of(node, 0) if len(node.outputs) == 1 else None


def _broadcast(found: Reader, node: ir.Node) -> Shape | None:
    shapes = [found.shape_of(node, index) for index in range(len(node.inputs))]
    result: Shape = ()
    for shape in shapes:
        if shape is None:
            return None
        result = _joint(found, result, shape)
    return result


def _joint(found: Reader, one: Shape, two: Shape) -> Shape:
    rank = max(len(one), len(two))
    first, second = ((1,) * (rank - len(shape)) + shape for shape in (one, two))
    return tuple(broadcast(found, a, b) for a, b in zip(first, second, strict=True))


def _transposed(found: Reader, node: ir.Node) -> Shape | None:
    source, order = found.shape_of(node, 0), node.attributes.get_ints("perm")
    if source is None or order is None:
        return None
    return tuple(source[axis] for axis in order)


def _multiplied(found: Reader, node: ir.Node) -> Shape | None:
    one, two = found.shape_of(node, 0), found.shape_of(node, 1)
    if one is None or two is None or min(len(one), len(two)) < 2:
        return None
    return (*_joint(found, one[:-2], two[:-2]), one[-2], two[-1])


def _gathered(found: Reader, node: ir.Node) -> Shape | None:
    source, index = found.shape_of(node, 0), found.shape_of(node, 1)
    axis = node.attributes.get_int("axis", 0)
    if source is None or index is None:
        return None
    axis %= len(source)
    return (*source[:axis], *index, *source[axis + 1 :])


def _unsqueezed(found: Reader, node: ir.Node) -> Shape | None:
    source, axes = found.shape_of(node, 0), found.numbers_of(node, 1)
    if source is None or axes is None:
        return None
    shape = list(source)
    rank = len(source) + len(axes)
    for axis in sorted(int(a) % rank for a in axes if isinstance(a, int)):
        shape.insert(axis, 1)
    return tuple(shape) if len(shape) == rank else None


def _windows(found: Reader, node: ir.Node) -> Shape | None:
    """Conv and pools: from (N, C, ...) to (N, O, ...), where a window of the kernel's size fits."""
    source = found.shape_of(node, 0)
    weight = found.shape_of(node, 1) if node.op_type == "Conv" else None
    kernel = weight[2:] if weight is not None else node.attributes.get_ints("kernel_shape")
    padded = node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    if source is None or kernel is None or padded or len(node.outputs) > 1:
        return None
    if node.attributes.get_int("ceil_mode", 0):
        return None
    sides = source[2:]
    ones = [1] * len(sides)
    strides, dilations = (node.attributes.get_ints(a) or ones for a in ("strides", "dilations"))
    pads = node.attributes.get_ints("pads") or [0] * 2 * len(sides)
    padding = [a + b for a, b in zip(pads, pads[len(sides) :], strict=False)]
    ways = zip(sides, kernel, strides, dilations, padding, strict=True)
    return (
        *source[:1],
        source[1] if weight is None else weight[0],
        *(_fit(found, *w) for w in ways),
    )


def _fit(
    found: Reader, side: Number, kernel: Number, stride: int, dilation: int, padding: int
) -> Number:
    """How many windows fit along a side."""
    if not isinstance(kernel, int):
        return found.new()
    free = padding - dilation * (kernel - 1) - 1
    if isinstance(side, int) and side + free >= 0:
        return (side + free) // stride + 1
    return side if (free, stride) == (-1, 1) else found.new()


def _pooled(found: Reader, node: ir.Node) -> Shape | None:
    source = found.shape_of(node, 0)
    return None if source is None else (*source[:2], *(1 for _ in source[2:]))


def _general(found: Reader, node: ir.Node) -> Shape | None:
    one, two = found.shape_of(node, 0), found.shape_of(node, 1)
    if one is None or two is None:
        return None
    transposed = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
    return (one[1 if transposed[0] else 0], two[0 if transposed[1] else 1])


_UNARY = (
    "Abs", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor",
    "Gelu", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu", "Log",
    "LogSoftmax", "Neg", "Not", "Reciprocal", "Relu", "Round", "ScatterND", "Sigmoid", "Sign",
    "Sin", "Softmax", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
_POINTWISE = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min",
    "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Where", "Xor",
)  # fmt: skip

RULES: dict[str, Callable[[Reader, ir.Node], Shape | None]] = {
    **SHAPES,
    **dict.fromkeys(_UNARY, _same),
    **dict.fromkeys(_POINTWISE, _broadcast),
    **dict.fromkeys(("AveragePool", "Conv", "MaxPool"), _windows),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _pooled),
    "Gather": _gathered,
    "Gemm": _general,
    "MatMul": _multiplied,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}
"""Operator -> the shape of its output."""
