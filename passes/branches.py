"""Inline the branch that an If always takes.

Before: ``y = If(Greater(Size(Shape(x)), 3)) {then: Neg(x), else: x}``, with x of four dimensions
After:  ``y = Neg(x)``

1. A condition counts as known if it is a constant or follows from shapes, whatever the sizes of
   dynamic dimensions are.
2. Names inside of the branch that are taken outside get the name of the If before them.
"""

from collections.abc import Iterable
from typing import TypeAlias

import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd.access import bodies, graphs, rename, unique
from onnxslim_kd.model import constant, infer_shapes, name_of
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.shape_known import branch_taken, known
from onnxslim_kd.passes.shape_rules import Known


def inline_branches(model: ir.Model) -> int:
    """Inline every known branch of ``model``, in place; return how many."""
    if not any(node.op_type == "If" for graph in graphs(model) for node in graph):
        return 0
    done = inline(known(model), model.graph)
    if done:
        common.RemoveUnusedNodesPass()(model)  # what only the other branches needed
        infer_shapes(model)  # of more than was known while there were branches
        done += inline_branches(model)
    return done


def inline(found: Known, graph: ir.Graph) -> int:
    """Inline the branches of ``graph``, and of the bodies inside, that ``found`` says are taken."""
    done = 0
    for node in graph:
        branch = branch_taken(found, node)
        if branch is not None:
            _inline(graph, node, branch)  # its nodes come next in the walk
            done += 1
        else:
            done += sum(inline(found, body) for body in bodies(node))
    return done


def read_claims(model: ir.Model) -> None:
    """Give a value the shape that both branches of an If behind it state, where it has none.

    Nothing follows for what comes out of branches of different ranks. But exporters knew which
    rank it has, and say so where it is used: in ``Unsqueeze(x)`` and, otherwise, ``Identity(x)``.
    """
    for graph in graphs(model):
        for node in graph:
            if node.op_type == "If" and not node.domain:
                for results in zip(*(branch.outputs for branch in bodies(node)), strict=True):
                    _read_claim(*map(_claim, results))


def _read_claim(one: "_Claim | None", two: "_Claim | None") -> None:
    if one is None or two is None or one[0] is not two[0] or one[0].shape is not None:
        return
    if len(one[1]) == len(two[1]):
        pairs = zip(one[1], two[1], strict=True)
        one[0].shape = ir.Shape([a if a == b and isinstance(a, int) else None for a, b in pairs])


def _claim(result: ir.Value) -> "_Claim | None":
    """The value that a branch passes on, and its shape by what is stated of the result."""
    node, stated = result.producer(), dims.read(result)
    source = node.inputs[0] if node is not None and node.inputs else None
    if node is None or source is None or stated is None:
        return None
    if node.op_type == "Identity":
        return source, stated
    axes = constant(node.inputs[1]) if node.op_type == "Unsqueeze" else None
    if axes is None:
        return None
    added = {int(axis) % len(stated) for axis in axes}
    return source, [dim for index, dim in enumerate(stated) if index not in added]


_Claim: TypeAlias = tuple[ir.Value, list[dims.Dim]]


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    for other in bodies(node):
        if other is not branch:
            _let_go(other)
    results, nodes = list(branch.outputs), list(branch)
    weights = list(branch.initializers.values())
    branch.outputs.clear()
    branch.remove(nodes)
    branch.initializers.clear()
    _rename(graph, node, weights, nodes)
    for value in weights:
        graph.register_initializer(value)
    graph.insert_after(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        _hand_over(graph, node, old, new)
    graph.remove(node, safe=True)


def _let_go(body: ir.Graph) -> None:
    """Give up what the nodes of a body read: it would still count as needed."""
    for node in body.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _rename(
    graph: ir.Graph, node: ir.Node, weights: Iterable[ir.Value], nodes: Iterable[ir.Node]
) -> None:
    """Give what comes out of the branch names that are free in ``graph``."""
    values = set(ir.convenience.create_value_mapping(graph))
    names = {other.name for other in graph}
    for value in [*weights, *(v for inner in nodes for v in inner.outputs)]:
        if value.name in values:
            rename(value, unique(f"{node.name}/{value.name}", values))
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
