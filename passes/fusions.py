"""Several nodes that one operator of the model's own opset can do.

1. ``MatMul(x, W) + b`` of matrices is ``Gemm(x, W, b)``; so is one between two Reshapes.
2. ``x * (1 / y)`` is ``x / y``.
3. ``Where(Not(c), a, b)`` is ``Where(c, b, a)``.
4. ``Clip(Relu(x), 0 or more, high)`` is ``Clip(x, ...)``.
5. ``Conv(Pad(x, zeros))`` is a Conv that pads.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import graphs, is_float
from onnxslim_kd.model import constant, dims, has_rank, new_initializer
from onnxslim_kd.passes.norms import fuse_activation, fuse_norm
from onnxslim_kd.passes.patterns import before, replace, skip
from onnxslim_kd.runtime import Array


def fuse(model: ir.Model) -> int:
    """Write patterns as one node, again while one makes another; return how many."""
    fused = sum(_fuse_once(graph) for graph in graphs(model))
    return fused + fuse(model) if fused else 0


def _fuse_once(graph: ir.Graph) -> int:
    fused = 0
    for node in list(graph):
        rule = FUSIONS.get(node.op_type) if not node.domain else None
        fused += rule is not None and node.graph is graph and rule(node)
    return fused


# ------------------------------------------------------------------------------ Gemm


def _gemm(add: ir.Node) -> bool:
    for index in (0, 1):
        matmul, summand = before(add, index, "MatMul"), add.inputs[1 - index]
        weight = constant(matmul.inputs[1]) if matmul is not None else None
        bias = constant(summand)
        if matmul is None or weight is None or bias is None or weight.ndim != 2:
            continue
        if weight.dtype.kind != "f" or bias.size not in (1, weight.shape[1]) or bias.ndim > 1:
            continue
        if not (_is_matrix(matmul.inputs[0]) or _between_reshapes(matmul, add)):
            continue
        gemm = ir.node("Gemm", [*matmul.inputs, summand], name=matmul.name)
        return replace([add, matmul], gemm)
    return False


def _is_matrix(value: ir.Value | None) -> bool:
    return has_rank(value) and len(dims(value)) == 2


def _between_reshapes(matmul: ir.Node, add: ir.Node) -> bool:
    """Let the Reshapes before and behind make and take matrices, where there are two such."""
    output = add.outputs[0]
    first = before(matmul, 0, "Reshape")
    behind = [node for node in output.consumers() if node.op_type == "Reshape"]
    if first is None or len(output.uses()) != 1 or not behind or output.is_graph_output():
        return False
    target = _without_copies(behind[0], output)
    weight = constant(matmul.inputs[1])
    copies = first.attributes.get_int("allowzero", 0) == 0
    if target is None or weight is None or constant(first.inputs[1]) is None or not copies:
        return False
    _set_target(first, np.array([-1, weight.shape[0]], np.int64))
    _set_target(behind[0], target)
    columns = weight.shape[1]
    output.shape = ir.Shape([None, columns])
    return True


def _without_copies(reshape: ir.Node, source: ir.Value) -> Array | None:
    """The target of ``reshape`` without 0, which means "as in the source", or None."""
    target = constant(reshape.inputs[1])
    if target is None or reshape.attributes.get_int("allowzero", 0) == 1 or not has_rank(source):
        return None
    numbers, given = target.tolist(), dims(source)
    for axis, number in enumerate(numbers):
        if number == 0:
            known = given[axis] if axis < len(given) else None
            numbers[axis] = -1 if known is None else known
    return np.array(numbers, np.int64) if numbers.count(-1) <= 1 and 0 not in numbers else None


def _set_target(reshape: ir.Node, target: Array) -> None:
    graph = reshape.graph
    assert isinstance(graph, ir.Graph)
    reshape.replace_input_with(1, new_initializer(graph, f"{reshape.name}.target", target))


# ------------------------------------------------------------------- small arithmetic


def _quotient(mul: ir.Node) -> bool:
    for index in (0, 1):
        inverse, other = before(mul, index, "Div", "Reciprocal"), mul.inputs[1 - index]
        if inverse is None or (inverse.op_type == "Div" and not _is_one(inverse.inputs[0])):
            continue
        if other is None or not is_float(other):
            continue
        quotient = ir.node("Div", [other, inverse.inputs[-1]], name=mul.name)
        return replace([mul, inverse], quotient)
    return False


def _is_one(value: ir.Value | None) -> bool:
    number = constant(value)
    return number is not None and number.ndim == 0 and number.item() == 1


def _where(node: ir.Node) -> bool:
    negated = before(node, 0, "Not")
    if negated is None:
        return False
    _, a, b = node.inputs
    node.replace_input_with(1, b)
    node.replace_input_with(2, a)
    return skip(node, negated)


def _clip(node: ir.Node) -> bool:
    relu = before(node, 0, "Relu")
    low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if relu is None or low is None or not (low >= 0).all():
        return False
    return skip(node, relu)


def _padded(conv: ir.Node) -> bool:
    pad = before(conv, 0, "Pad")
    if pad is None or conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    amounts, filled = constant(pad.inputs[1]), _filled_with(pad)
    kind = pad.attributes.get_string("mode", "constant")
    along = len(pad.inputs) > 3 and pad.inputs[3] is not None
    if amounts is None or filled != 0 or kind != "constant" or along or (amounts < 0).any():
        return False
    begin, end = np.split(amounts, 2)
    if begin[:2].any() or end[:2].any():
        return False
    own = np.array(conv.attributes.get_ints("pads") or [0] * 2 * len(begin[2:]))
    pads = own + np.concatenate([begin[2:], end[2:]])
    conv.attributes.pop("auto_pad", None)
    conv.attributes["pads"] = ir.AttrInt64s("pads", pads.tolist())
    return skip(conv, pad)


def _filled_with(pad: ir.Node) -> float | None:
    """The number that a Pad puts in, None where it is computed."""
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return 0.0
    number = constant(pad.inputs[2])
    return None if number is None else float(number.item())


FUSIONS: dict[str, Callable[[ir.Node], bool]] = {
    "Add": _gemm,
    "Clip": _clip,
    "Conv": _padded,
    "Div": fuse_norm,
    "Mul": lambda node: fuse_activation(node) or _quotient(node),
    "Where": _where,
}
"""By the last operator of the pattern."""
