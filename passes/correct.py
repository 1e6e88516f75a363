"""Correct a cut: let the layers that lost inputs make up for them, from a few unlabelled samples.

Before: ``y = W x``,  after the cut: ``y' = W[:, kept] x'``
After:  ``y' = W' x' + b'`` with W' and b' so that y' is as near to y as it can be

1. Layer by layer in the order of the graph: x' is what the pruned network, corrected so far, gives
   the layer; y is the original's output.
2. Ridge regression towards the weights that are there; its strength, and whether it helps at all,
   is decided on samples held out. A layer that it does not help stays as it is.
3. Convolutions are fitted on patches at random positions.

How one layer is fitted is in `correct_layer`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import name_of
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.correct_layer import Corrected, can_be_fitted, rows_of, update
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.runtime import Array, Session
from onnxslim_kd.samples import Samples


@dataclass(frozen=True)
class Layer:
    """A layer that loses inputs."""

    node: str
    kept: Ids
    """Which of its output channels the pruned model still has."""


def layers(analysis: Analysis, removed: Ids) -> list[Layer]:
    """Return the layers that lose inputs and can be corrected, in the order of the graph.

    To be called before the cut: convolutions without groups, Gemm and MatMul with a weight of
    their own.

    Args:
        analysis: Of the original.
        removed: The mask over its components.
    """
    gone = removed[analysis.components.label].astype(bool)
    lose = _losing(analysis, gone)
    found = []
    for node in analysis.model.graph:
        if node in lose and can_be_fitted(node):
            output = node.outputs[0]
            axis = 1 if node.op_type == "Conv" else len(analysis.shapes.shape[output]) - 1
            keep = np.ones(analysis.shapes.shape[output][axis], bool)
            for block in analysis.channels.layout.get(output, ()):
                if block.axes == (axis,):
                    keep = ~gone[block.ids]
            found.append(Layer(node.name or "", np.flatnonzero(keep)))
    return found


def left_out(analysis: Analysis, removed: Ids) -> list[str]:
    """Return the names of layers that lose inputs and cannot be corrected (grouped, LSTM, ...)."""
    gone = removed[analysis.components.label].astype(bool)
    weighted = [
        n for n in _losing(analysis, gone) if any(v and v.is_initializer() for v in n.inputs)
    ]
    return sorted(node.name or "" for node in weighted if not can_be_fitted(node))


def _losing(analysis: Analysis, gone: Array) -> set[ir.Node]:
    """The nodes that sum over channels of which some are removed."""
    return {
        consumption.node
        for consumption in analysis.channels.consumed
        for index, axis in consumption.axes
        if index == 0
        and consumption.out_axis is None
        and (value := consumption.node.inputs[0]) is not None
        and _lost(analysis, value, axis, gone)
    }


def _lost(analysis: Analysis, value: ir.Value, axis: int, gone: Array) -> bool:
    axis %= max(len(analysis.shapes.shape.get(value, ())), 1)
    blocks = analysis.channels.layout.get(value, ())
    return any(b.axes == (axis,) and bool(gone[b.ids].any()) for b in blocks)


def correct(
    original: ir.Model, pruned: ir.Model, found: Sequence[Layer], samples: Samples
) -> list[Corrected]:
    """Update the weights of ``pruned`` in place, layer by layer.

    Args:
        original: The model before the cut.
        pruned: The model after it.
        found: What `layers` found before the cut.
        samples: Inputs of both models.

    Raises:
        UserError: There are too few samples.
    """
    if sum(len(next(iter(feeds.values()))) for feeds in samples.feeds) < 2:
        raise UserError("--correct needs two samples or more: one fits, another decides")
    nodes = {node.name: node for node in pruned.graph}
    done = []
    for layer in found:
        node = nodes.get(layer.node)
        if node is not None:
            wanted = _values(original, name_of(node.outputs[0]), samples)
            given = _values(pruned, name_of(node.inputs[0]), samples)
            rows = rows_of(node, layer.kept, list(zip(given, wanted, strict=True)))
            if rows.fit < len(rows.inputs):  # not of a single row, which cannot be judged
                done.append(update(node, rows))
    return done


def _values(model: ir.Model, name: str, samples: Samples) -> Iterator[Array]:
    """Give one value of a model for every batch; nothing behind it is computed."""
    value = ir.convenience.create_value_mapping(model.graph)[name]
    outputs = list(model.graph.outputs)
    model.graph.outputs[:] = [value]
    try:
        session = Session(model)
    finally:
        model.graph.outputs[:] = outputs
    return (session.run(feeds)[name] for feeds in samples.feeds)
