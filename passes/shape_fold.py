"""Write what is known of shapes into the graph, so that it need not be computed.

1. A number that no dynamic dimension enters becomes a constant.
2. ``Reshape(x, computed)`` becomes ``Reshape(x, [0, -1, 64])``, and Expand in the same way.
3. Reshape, Expand and Slice that give what they take are gone.
4. Numbers that are equal for all inputs are computed once, where they come first.
5. The branch that an If always takes is inlined.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import bodies
from onnxslim_kd.model import name_of, new_initializer
from onnxslim_kd.passes.branches import inline
from onnxslim_kd.passes.shape_known import known
from onnxslim_kd.passes.shape_rules import Known, Shape
from onnxslim_kd.passes.symbolic import Number


def fold_known(model: ir.Model) -> int:
    """Fold what is known of shapes; return how many values changed."""
    found = known(model)
    return inline(found, model.graph) + _fold_graph(found, model.graph, {})


def _fold_graph(found: Known, graph: ir.Graph, first: dict[tuple[object, ...], ir.Value]) -> int:
    changed = 0
    for node in list(graph):
        for body in bodies(node):
            changed += _fold_graph(found, body, dict(first))
        if node.domain or not node.outputs:
            continue
        changed += _skip(found, node) or _set_target(found, graph, node)
        changed += _replace(found, graph, node, first)
    _write_shapes(graph, found)
    return changed


def _skip(found: Known, node: ir.Node) -> bool:
    """Remove a node that gives what it takes."""
    output = node.outputs[0]
    source = node.inputs[0] if node.op_type in ("Reshape", "Expand", "Slice") else None
    if source is None or output.is_graph_output() or found.shape.get(source) is None:
        return False
    if found.shape[source] != found.shape.get(output) or not output.uses():
        return False
    if node.op_type == "Slice" and len(node.inputs) > 4 and node.inputs[4] is not None:
        steps = found.number.get(node.inputs[4])
        if steps is None or any(step != 1 for step in steps):
            return False
    output.replace_all_uses_with(source)
    return True


def _set_target(found: Known, graph: ir.Graph, node: ir.Node) -> bool:
    """Give Reshape or Expand a constant target where its meaning does not depend on numbers."""
    if node.op_type not in ("Reshape", "Expand") or node.attributes.get_int("allowzero", 0) == 1:
        return False
    target = node.inputs[1]
    source, after = found.shape_of(node, 0), found.shape.get(node.outputs[0])
    if target is None or target.producer() is None or source is None or after is None:
        return False
    make = _reshape_target if node.op_type == "Reshape" else _expand_target
    numbers = make(source, after)
    if numbers is None:
        return False
    array = np.array(numbers, np.int64)
    node.replace_input_with(1, new_initializer(graph, f"{node.name}.target", array))
    return True


def _reshape_target(source: Shape, after: Shape) -> list[int] | None:
    """Plain numbers, 0 for "as before", and -1 once."""
    target = [
        n if isinstance(n, int) else 0 if i < len(source) and source[i] == n else -1
        for i, n in enumerate(after)
    ]
    return None if target.count(-1) > 1 or 0 in after else target


def _expand_target(source: Shape, after: Shape) -> list[int] | None:
    before = (1,) * (len(after) - len(source)) + source
    target = [1 if a == b else b for a, b in zip(before, after, strict=True)]
    plain = [n for n in target if isinstance(n, int)]
    return plain if len(plain) == len(target) else None


def _replace(
    found: Known, graph: ir.Graph, node: ir.Node, first: dict[tuple[object, ...], ir.Value]
) -> bool:
    """Use a constant, or the first value with the same numbers, instead of the node's output."""
    output = node.outputs[0]
    numbers = found.number.get(output)
    if numbers is None or output.is_graph_output() or not output.uses() or output.dtype is None:
        return False
    flat: Sequence[Number] = numbers.reshape(-1).tolist()
    if all(isinstance(n, int) for n in flat):
        array, name = numbers.astype(output.dtype.numpy()), name_of(output)
        output.name = f"{name}.computed"
        output.replace_all_uses_with(new_initializer(graph, name, array))
        return True
    twin = first.setdefault((output.dtype, numbers.shape, *flat), output)
    if twin is not output:
        output.replace_all_uses_with(twin)
    return twin is not output


def _write_shapes(graph: ir.Graph, found: Known) -> None:
    """Note the plain numbers in shapes, where ONNX's own inference did not see them."""
    for node in graph:
        for value in node.outputs:
            shape = found.shape.get(value)
            if shape is None or value.is_graph_output() or value.dtype is None:
                continue
            before = value.shape
            if before is None or len(before) != len(shape):
                before = ir.Shape([None] * len(shape))
            pairs = list(zip(shape, before, strict=True))
            if any(isinstance(number, int) and number != dim for number, dim in pairs):
                value.shape = ir.Shape([n if isinstance(n, int) else dim for n, dim in pairs])
