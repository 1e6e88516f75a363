"""Inline the branch that an If always takes.

Before: ``y = If(Greater(Size(Shape(x)), 3)) {then: Neg(x), else: x}``, with x of four dimensions
After:  ``y = Neg(x)``

1. A condition counts as known if it is a constant or follows from shapes, whatever the sizes of
   dynamic dimensions are.
2. Names inside of the branch that are taken outside get the name of the If before them.
"""

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd.access import unique
from onnxslim_kd.model import infer_shapes, name_of
from onnxslim_kd.passes.shape_fold import known


def inline_branches(model: ir.Model) -> int:
    """Inline every known branch of the main graph of ``model``, in place; return how many."""
    done = 0
    while taken := _taken(model):
        for node, branch in taken:
            _inline(model.graph, node, branch)
        done += len(taken)
        common.RemoveUnusedNodesPass()(model)  # what only the other branches needed
        infer_shapes(model)  # a branch may hold another If, or decide about one behind it
    return done


def _taken(model: ir.Model) -> list[tuple[ir.Node, ir.Graph]]:
    nodes = [node for node in model.graph if node.op_type == "If" and not node.domain]
    if not nodes:
        return []
    numbers = known(model).number
    return [
        (node, node.attributes["then_branch" if numbers[condition].item() else "else_branch"].value)
        for node in nodes
        if (condition := node.inputs[0]) in numbers and isinstance(numbers[condition].item(), int)
    ]


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    results, nodes = list(branch.outputs), list(branch)
    weights = list(branch.initializers.values())
    branch.outputs.clear()
    branch.remove(nodes)
    branch.initializers.clear()
    _rename(graph, node, weights, nodes)
    for value in weights:
        graph.register_initializer(value)
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        _hand_over(graph, node, old, new)
    graph.remove(node, safe=True)


def _rename(
    graph: ir.Graph, node: ir.Node, weights: Iterable[ir.Value], nodes: Iterable[ir.Node]
) -> None:
    """Give what comes out of the branch names that are free in ``graph``."""
    values = set(ir.convenience.create_value_mapping(graph))
    names = {other.name for other in graph}
    for value in [*weights, *(v for inner in nodes for v in inner.outputs)]:
        if value.name in values:
            value.name = unique(f"{node.name}/{value.name}", values)
        values.add(value.name or "")
    for inner in nodes:
        if inner.name in names:
            inner.name = unique(f"{node.name}/{inner.name}", names)
        names.add(inner.name)


def _hand_over(graph: ir.Graph, node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let the users of the If's output ``old`` read the branch's result ``new``."""
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    name = name_of(old)
    copy = ir.node("Identity", [new], name=f"{node.name}/{name}")
    passed = copy.outputs[0]
    passed.type, passed.shape = old.type, old.shape  # as they were promised
    graph.insert_before(node, copy)
    old.replace_all_uses_with(passed, replace_graph_outputs=True)
    old.name, passed.name = None, name
