"""Two nodes in a row that one node can do.

1. ``Reshape(Reshape(x, s), t)`` is ``Reshape(x, t)``; also behind Flatten, Squeeze and Unsqueeze.
2. ``Unsqueeze(Unsqueeze(x, a), b)`` is one Unsqueeze, ``Squeeze(Unsqueeze(x, a), a)`` is ``x``.
3. ``Concat(Concat(x, y), z)`` along one axis is ``Concat(x, y, z)``.
4. ``Relu(Relu(x))`` is ``Relu(x)``.
5. ``Mul(Mul(x, a), b)`` with constants is ``Mul(x, a * b)``; so is Add.
6. ``Transpose(Transpose(x))`` is one Transpose or none; so is one behind a sum of such.

Only where nothing else reads the value between them.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import graphs
from onnxslim_kd.model import constant, dims, has_rank, new_initializer
from onnxslim_kd.passes.patterns import before, skip
from onnxslim_kd.runtime import Array


def join_chains(model: ir.Model) -> int:
    """Write chains as one node; return how many nodes that saved."""
    joined = 0
    for graph in graphs(model):
        for node in list(graph):
            join = _JOIN.get(node.op_type) if not node.domain else None
            while join is not None and node.graph is graph and join(node):
                joined += 1
    return joined


def _reshape(node: ir.Node) -> bool:
    first = before(node, 0, "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    target = constant(node.inputs[1])
    if first is None or target is None or node.attributes.get_int("allowzero", 0) == 1:
        return False
    copied = np.flatnonzero(target == 0)
    if copied.size:  # of what first gives: as it says itself
        given = constant(first.inputs[1]) if first.op_type == "Reshape" else None
        if given is None or len(given) <= copied.max() or not isinstance(node.graph, ir.Graph):
            return False
        joined = np.where(target == 0, np.resize(given, len(target)), target)
        if first.attributes.get_int("allowzero", 0) == 1 or np.count_nonzero(joined == -1) > 1:
            return False
        node.replace_input_with(1, new_initializer(node.graph, f"{node.name}.target", joined))
    return skip(node, first)


def _unsqueeze(node: ir.Node) -> bool:
    first = before(node, 0, "Unsqueeze")
    if first is None or not has_rank(first.inputs[0]) or not isinstance(node.graph, ir.Graph):
        return False
    one, two = constant(first.inputs[1]), constant(node.inputs[1])
    if one is None or two is None:
        return False
    old = [True] * len(dims(first.inputs[0]))
    for axes in (one.reshape(-1), two.reshape(-1)):
        for axis in sorted(int(a) % (len(old) + len(axes)) for a in axes):
            old.insert(axis, False)
    new = np.array([i for i, was in enumerate(old) if not was], np.int64)
    node.replace_input_with(1, new_initializer(node.graph, f"{node.name}.axes", new))
    return skip(node, first)


def _squeeze(node: ir.Node) -> bool:
    first = before(node, 0, "Unsqueeze")
    if first is None or len(node.inputs) < 2 or node.outputs[0].is_graph_output():
        return False
    one, two = constant(first.inputs[1]), constant(node.inputs[1])
    if one is None or two is None or (one < 0).any() or set(one.tolist()) != set(two.tolist()):
        return False
    source, graph = first.inputs[0], node.graph
    assert source is not None and graph is not None
    node.outputs[0].replace_all_uses_with(source)
    graph.remove([node, first], safe=True)
    return True


def _concat(node: ir.Node) -> bool:
    for index in range(len(node.inputs)):
        first = before(node, index, "Concat")
        if first is None or first.attributes.get_int("axis") != node.attributes.get_int("axis"):
            continue
        values = [*node.inputs[:index], *first.inputs, *node.inputs[index + 1 :]]
        node.resize_inputs(len(values))
        for place, value in enumerate(values):
            node.replace_input_with(place, value)
        assert first.graph is not None
        first.graph.remove(first, safe=True)
        return True
    return False


def _relu(node: ir.Node) -> bool:
    first = before(node, 0, "Relu")
    return first is not None and skip(node, first)


def _arithmetic(node: ir.Node) -> bool:
    first = before(node, 0, node.op_type) or before(node, 1, node.op_type)
    if first is None or not isinstance(node.graph, ir.Graph):
        return False
    inner, outer = _constant_input(first), _constant_input(node)
    if inner is None or outer is None:
        return False
    (source, a), b = inner, outer[1]
    number = _joined(node.op_type, a, b)
    if number is None or number.size > max(a.size, b.size):
        return False
    node.replace_input_with(0, source)
    node.replace_input_with(1, new_initializer(node.graph, f"{node.name}.constant", number))
    node.graph.remove(first, safe=True)
    return True


def _transpose(node: ir.Node) -> bool:
    first = before(node, 0, "Transpose")
    if first is None:
        return _transpose_of_sum(node)
    inner, outer = _order(first), _order(node)
    if inner is None or outer is None:
        return False
    order = [inner[axis] for axis in outer]
    source, output = first.inputs[0], node.outputs[0]
    if order != sorted(order) or output.is_graph_output() or source is None:
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
        return skip(node, first)
    output.replace_all_uses_with(source)
    assert first.graph is not None
    first.graph.remove([node, first], safe=True)
    return True


def _transpose_of_sum(node: ir.Node) -> bool:
    """``T(T'(x) + T'(y))`` is ``x + y`` where T undoes T' and one of those is gone by it."""
    total, output = before(node, 0, "Add", "Mul"), node.outputs[0]
    outer = _order(node)
    if total is None or outer is None or output.is_graph_output():
        return False
    parts = [value.producer() if value is not None else None for value in total.inputs]
    for part in parts:
        inner = _order(part) if part is not None and part.op_type == "Transpose" else None
        if inner is None or [inner[axis] for axis in outer] != sorted(outer):
            return False
    gone = [part for index, part in enumerate(parts) if part is before(total, index, "Transpose")]
    if not any(gone):
        return False
    for index, part in enumerate(parts):
        assert part is not None
        total.replace_input_with(index, part.inputs[0])
    total.outputs[0].shape = output.shape
    output.replace_all_uses_with(total.outputs[0])
    assert node.graph is not None
    node.graph.remove([node, *filter(None, gone)], safe=True)
    return True


def _order(transpose: ir.Node | None) -> list[int] | None:
    order = transpose.attributes.get_ints("perm") if transpose is not None else None
    return None if order is None else list(order)


def _joined(operator: str, a: Array, b: Array) -> Array | None:
    """Two constants as one, None where the one is too large or too small for its type."""
    if a.dtype.kind != "f":
        return None
    wide = (a.astype(np.float64), b.astype(np.float64))
    exact = np.multiply(*wide) if operator == "Mul" else np.add(*wide)
    with np.errstate(over="ignore"):
        number = exact.astype(a.dtype)
    return number if np.allclose(number, exact, rtol=1e-2, atol=0) else None


def _constant_input(node: ir.Node) -> tuple[ir.Value | None, Array] | None:
    """The input that is computed, and the other one, which is constant."""
    one, two = node.inputs
    for value, other in ((one, two), (two, one)):
        number = constant(other)
        if number is not None and constant(value) is None:
            return value, number
    return None


_JOIN: dict[str, Callable[[ir.Node], bool]] = {
    "Add": _arithmetic,
    "Mul": _arithmetic,
    "Concat": _concat,
    "Relu": _relu,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""By the operator of the second node."""
