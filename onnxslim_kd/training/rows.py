"""Compute only the rows that are read: a class token's, not those of every token behind it.

Classifiers often read one position of a sequence (``norm(x)[:, 0]``). Whatever works on each
position alone may then do so for that one. Where ``pick`` is a Gather of constant positions::

    pick(f(x))       f(pick(x))             f: element by element, or along other axes
    pick(x + y)      pick(x) + pick(y)
    pick(x @ W)      pick(x) @ W

as long as all that reads a value picks the same. A transformer's last block so loses most of its
work, and its gradient's, in the student as in the teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd.runtime import Array


@dataclass(frozen=True)
class Pick:
    """The positions read along an axis."""

    axis: int
    positions: tuple[int, ...]
    drops: bool
    """Whether the axis goes, as it does for a single position without a list."""


def pick_early(model: ir.Model) -> int:
    """Move picks towards the inputs as far as that saves work, in place; return the moves."""
    moves = 0
    todo = [node for node in model.graph if _pick(node) is not None]
    while todo:
        value = todo.pop().inputs[0]  # None: another move took the node out
        pick = _same_pick(value) if value is not None else None
        sources = _sources(value, pick) if value is not None and pick is not None else None
        if value is not None and pick is not None and sources is not None:
            todo += _move(value, pick, sources)
            moves += 1
    return moves


def _pick(node: ir.Node) -> Pick | None:
    """Return what ``node`` picks of its first input, None where it is no such node."""
    if node.op_type != "Gather" or node.domain or not model_io.has_rank(node.inputs[0]):
        return None
    indices = model_io.constant(node.inputs[1])
    if indices is None or indices.ndim > 1 or (indices.ndim and node.outputs[0].is_graph_output()):
        return None
    axis = node.attributes.get_int("axis", 0) % len(model_io.dims(node.inputs[0]))
    positions = tuple(int(index) for index in indices.reshape(-1))
    return Pick(axis, positions, drops=indices.ndim == 0)


def _same_pick(value: ir.Value) -> Pick | None:
    """Return the pick that every reader of ``value`` makes, None where there is no such."""
    if value.is_graph_output():
        return None
    found = {_pick(node) if index == 0 else None for node, index in value.uses()}
    pick = found.pop() if len(found) == 1 else None
    size = model_io.dims(value)[pick.axis] if pick is not None else None
    return pick if pick is not None and size is not None and len(pick.positions) < size else None


def _sources(value: ir.Value, pick: Pick) -> list[int] | None:
    """Return the inputs of the producer to pick from instead, None where it works across rows."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ROW_WISE or len(node.outputs) > 1:
        return None
    if not all(model_io.has_rank(v) for v in node.inputs if v is not None):
        return None
    return ROW_WISE[node.op_type](node, pick.axis, len(model_io.dims(value)))


def _move(value: ir.Value, pick: Pick, sources: list[int]) -> list[ir.Node]:
    """Pick from ``sources`` of the producer, and let the readers have its result as it is."""
    producer, graph = value.producer(), value.graph
    assert producer is not None and isinstance(graph, ir.Graph)
    rank = len(model_io.dims(value))
    indices = np.array(pick.positions, np.int64)
    made = []
    for index in sources:
        source = producer.inputs[index]
        assert source is not None
        axis = pick.axis - rank + len(model_io.dims(source))
        node = _gather(graph, source, indices, axis)
        graph.insert_before(producer, node)
        producer.replace_input_with(index, node.outputs[0])
        made.append(node)
    sides = list(model_io.dims(value))
    sides[pick.axis] = len(pick.positions)
    value.shape = ir.Shape(sides)
    for reader in list(value.consumers()):
        if pick.drops:
            whole = model_io.new_initializer(graph, f"{reader.name}.first", np.array(0, np.int64))
            reader.replace_input_with(1, whole)
        else:
            reader.outputs[0].replace_all_uses_with(value)
            graph.remove(reader, safe=True)
    return made


def _gather(graph: ir.Graph, source: ir.Value, indices: Array, axis: int) -> ir.Node:
    name = f"{source.name}.picked.{len(graph)}"
    held = model_io.new_initializer(graph, f"{name}.positions", indices)
    node = ir.node("Gather", [source, held], attributes={"axis": axis}, name=name)
    output = node.outputs[0]
    output.name, output.type = name, source.type
    sides = list(model_io.dims(source))
    sides[axis] = len(indices)
    output.shape = ir.Shape(sides)
    return node


Rule = Callable[[ir.Node, int, int], list[int] | None]
"""From a node, the axis and the rank of its output: the inputs to pick from."""


def _broadcast(node: ir.Node, axis: int, rank: int) -> list[int] | None:
    """Pick from the inputs that have the axis; one that is broadcast along it stays whole."""
    found = []
    for index, value in enumerate(node.inputs):
        sides = model_io.dims(value)
        own = axis - rank + len(sides)
        if own < 0 or sides[own] == 1:
            continue
        if sides[own] is None or value is None or value.const_value is not None:
            return None  # a weight of its own for each row
        found.append(index)
    return found


def _matrix(node: ir.Node, axis: int, rank: int) -> list[int] | None:
    """A product with a matrix works on each row."""
    return [0] if axis < rank - 1 and len(model_io.dims(node.inputs[1])) == 2 else None


def _layer_norm(node: ir.Node, axis: int, rank: int) -> list[int] | None:
    return [0] if axis < node.attributes.get_int("axis", -1) % rank else None


def _along(node: ir.Node, axis: int, rank: int) -> list[int] | None:
    return [0] if axis != node.attributes.get_int("axis", -1) % rank else None


ROW_WISE: dict[str, Rule] = {
    **dict.fromkeys(("Add", "Div", "Mul", "Pow", "Sub"), _broadcast),
    **dict.fromkeys(("Cast", "Erf", "Gelu", "Identity", "Relu", "Sigmoid"), _broadcast),
    **dict.fromkeys(("Sqrt", "Tanh"), _broadcast),
    "LayerNormalization": _layer_norm,
    "MatMul": _matrix,
    "Softmax": _along,
}
"""Operators that give each row from the same row of their inputs."""
