"""Fold what a graph computes from sizes that are known, however the batch may vary.

Exports compute Reshape targets, Slice ends and attention scales from Shape nodes. Where a side is
fixed, the number is known now; then whole patterns can be recognised (`fuse`), and no run computes
it again. A vector of sizes may be known in part: Shape of ``[N, 50, 192]`` is ``[?, 50, 192]``, and
its element 1 is 50.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd import model as model_io
from onnxslim_kd.folding import FOLDS, folded
from onnxslim_kd.runtime import Array

UNKNOWN = np.int64(-(2**62) - 1)
"""Stands for a side that is not known; no size is negative."""
SMALL = 64
"""Elements up to which a constant joins in."""
ROUNDS = 8
"""Every round makes more shapes known; real exports take two."""


def fold_sizes(model: ir.Model, keep: Collection[str] = ()) -> int:
    """Make initializers of the sizes that are known, in place; return how many.

    Args:
        model: Its inferred shapes are made better on the way.
        keep: Initializers that no result may depend on, for they will change.
    """
    total = 0
    if not any(node.op_type == "Shape" for node in model.graph):
        return total
    for _ in range(ROUNDS):
        found = _numbers(model.graph, keep)
        for value, number in found.items():
            value.replace_all_uses_with(_initializer(model.graph, value, number))
        total += len(found)
        if not found:
            break
        common.RemoveUnusedNodesPass()(model)
        model_io.infer_shapes(model)
    return total


def _initializer(graph: ir.Graph, value: ir.Value, number: Array) -> ir.Value:
    return model_io.new_initializer(graph, f"{value.name}.known", number)


def _numbers(graph: ir.Graph, keep: Collection[str]) -> dict[ir.Value, Array]:
    """Return the values wholly known, of those computed from sizes that others still read.

    A Reshape to a shape with one unknown side gets a constant shape on the way: -1 stands there.
    """
    known: dict[ir.Value, Array] = {}
    for node in graph:
        for output, number in zip(node.outputs, _computed(node, known, keep), strict=False):
            known[output] = number
        if node.op_type == "Reshape" and node.inputs[1] in known:
            target = known[node.inputs[1]]
            unknown = target == UNKNOWN
            if unknown.sum() == 1 and (target[~unknown] > 0).all():
                shape = _initializer(graph, node.inputs[1], np.where(unknown, -1, target))
                node.replace_input_with(1, shape)
    return {
        value: number
        for value, number in known.items()
        if _is_whole(number) and value.uses() and not value.is_graph_output()
    }


def _computed(
    node: ir.Node, known: dict[ir.Value, Array], keep: Collection[str]
) -> Sequence[Array]:
    if node.domain or node.op_type not in FOLDS:
        return ()
    if node.op_type == "Shape":
        value = node.inputs[0]
        if not model_io.has_rank(value):
            return ()
        sides = [UNKNOWN if side is None else side for side in model_io.dims(value)]
        return folded(node, [np.array(sides, np.int64)])
    inputs = list(_inputs(node, known, keep))
    if len(inputs) != len(node.inputs):
        return ()
    if not any(value in known for value in node.inputs) and not _are_integers(inputs):
        return ()  # not from sizes: weights stay as they are
    if not all(map(_is_whole, inputs)) and not _only_moves(node, inputs):
        return ()
    return folded(node, inputs)


def _inputs(node: ir.Node, known: dict[ir.Value, Array], keep: Collection[str]) -> Iterator[Array]:
    for value in node.inputs:
        if value in known:
            yield known[value]
        elif value is not None and value.name not in keep and not value.is_graph_input():
            tensor = value.const_value
            if tensor is not None and tensor.size <= SMALL:
                yield tensor.numpy()


def _is_whole(number: Array) -> bool:
    return not (number.dtype == np.int64 and (number == UNKNOWN).any())


def _are_integers(inputs: Sequence[Array]) -> bool:
    """Tell whether all are: sides that stand in the file beside those that are computed."""
    return bool(inputs) and all(number.dtype.kind == "i" for number in inputs)


def _only_moves(node: ir.Node, inputs: Sequence[Array]) -> bool:
    """Tell whether unknown sides just pass through ``node``: they are data, not parameters."""
    data = inputs if node.op_type == "Concat" else inputs[1:]
    return node.op_type in MOVES and (node.op_type == "Concat" or all(map(_is_whole, data)))


MOVES = frozenset(("Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"))
