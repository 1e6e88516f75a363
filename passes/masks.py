"""Masks as graph inputs: silence channels without building another model.

Before: ``h -> Conv(w2)``
After:  ``h -> Mul(mask.h.1) -> Conv(w2)``, with ``mask.h.1`` a graph input of shape [C, 1, 1]

1. A mask stands where channels are consumed: at the computed operand of a layer that sums over
   them, or of a norm or softmax; at the weight where there is none, as in the recurrence of an
   LSTM. Two layers that read the same value share its mask.
2. Zero in a mask is what removal is, except for norms and softmax, which also count the zeros.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import is_float
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.groups import Analysis


@dataclass(frozen=True)
class Masked:
    """A copy of a model whose channels can be silenced by its inputs."""

    model: ir.Model
    sites: dict[str, tuple[Ids, tuple[int, ...], np.dtype[Any]]]
    """For every mask input: the ids it silences, its shape, its type."""

    def feeds(self, gone: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Return the masks for ``gone``, a mask over ids that is True for silent ones."""
        return {
            name: (~gone[ids]).reshape(shape).astype(dtype)
            for name, (ids, shape, dtype) in self.sites.items()
        }


def with_masks(analysis: Analysis) -> Masked:
    """Copy the analysed model and give every consumed channel a mask."""
    model = analysis.model.clone()
    nodes = {node.name: node for node in model.graph}
    masked = Masked(model, {})
    muls: dict[str, ir.Value] = {}
    for consumption in analysis.channels.consumed:
        computed_first = sorted(
            consumption.axes, key=lambda place: _is_weight(consumption.node.inputs[place[0]])
        )
        for index, axis in computed_first:
            value = consumption.node.inputs[index]
            ids = None if value is None else _ids(analysis, value, axis)
            if value is None or ids is None:
                continue
            copy = nodes[consumption.node.name]
            source = copy.inputs[index]
            assert source is not None
            rank = len(analysis.shapes.shape[value])
            name = f"mask.{value.name}.{axis % rank}"
            if name not in muls:
                shape = (len(ids),) + (1,) * (rank - 1 - axis % rank)
                dtype = np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()
                muls[name] = _multiplied(model, source, copy, (name, shape))
                masked.sites[name] = (ids, shape, dtype)
            copy.replace_input_with(index, muls[name])
            break  # one silent operand silences the product
    return masked


def _is_weight(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer()


def _ids(analysis: Analysis, value: ir.Value, axis: int) -> Ids | None:
    """The ids along an axis of a floating-point value, or None."""
    if not is_float(value):
        return None
    axis %= len(analysis.shapes.shape[value])
    channels = analysis.channels
    for block in channels.layout.get(value) or channels.born(value):
        if block.axes == (axis,):
            return block.ids
    return None


def _multiplied(
    model: ir.Model, value: ir.Value, reader: ir.Node, mask: tuple[str, tuple[int, ...]]
) -> ir.Value:
    name, shape = mask
    given = ir.Value(name=name, shape=ir.Shape(shape), type=value.type)
    model.graph.inputs.append(given)
    node = ir.node("Mul", [value, given], name=f"{name}.apply")
    node.outputs[0].name = f"{name}.out"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    model.graph.insert_before(reader, node)
    return node.outputs[0]
