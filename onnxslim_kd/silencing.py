"""The original in which the channels that a cut removes are silent where they are consumed.

It is built on the original's own graph: weights that sum over removed channels are zeroed, and an
operator that reduces, normalises or contracts over them gets the survivors alone and its result is
spread out again (compress, compute, expand).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import decisions
from onnxslim_kd.decisions import Decisions
from onnxslim_kd.model import name_of, new_initializer
from onnxslim_kd.passes.channels import Consumption, Ids
from onnxslim_kd.passes.fixups_counts import explicit_scale
from onnxslim_kd.passes.groups import Analysis

Array = np.ndarray[Any, Any]
TAPS = 32
"""Inner values compared, beside the outputs."""


@dataclass(frozen=True)
class Silenced:
    """The original with the removed channels silent, and where to look."""

    model: ir.Model
    names: dict[str, str]
    """The value of the pruned model for every output."""
    outputs: int
    given: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Input shapes that the user gave."""
    decisions: Decisions = field(default_factory=Decisions)


def silence(analysis: Analysis, removed: Ids) -> Silenced:
    """Copy the analysed model and silence the removed channels in the copy.

    Args:
        analysis: Of the model before the cut.
        removed: Mask over its components.
    """
    model = analysis.model.clone()
    mapping = ir.convenience.create_value_mapping(model.graph)
    nodes = {node.name: node for node in model.graph}
    work = _Silencer(analysis, removed[analysis.components.label].astype(bool), model.graph)
    for consumption in analysis.channels.consumed:
        work.consume(consumption, nodes[consumption.node.name])
    names = {name_of(v): name_of(v) for v in model.graph.outputs}
    for index, value in enumerate(model.graph.outputs):
        gathered = work.gathered(mapping[name_of(value)], name_of(value), f"kept.{index}")
        if gathered is not None:
            names[name_of(gathered)] = names.pop(name_of(value))
            model.graph.outputs[index] = gathered
    outputs = len(names)
    for index, value in enumerate(_taps(analysis, work.gone)):
        inner = mapping.get(name_of(value))
        gathered = inner and work.gathered(inner, name_of(value), f"inner.{index}")
        if gathered is not None:
            model.graph.outputs.append(gathered)
            names[name_of(gathered)] = name_of(value)
    found = decisions.find(analysis.model.graph, lambda value: not work.loses(value))
    return Silenced(model, names, outputs, analysis.given, found)


def _taps(analysis: Analysis, gone: Array) -> list[ir.Value]:
    """Outputs of layers that lose channels, evenly spread over the depth of the network."""
    cut = [
        node.outputs[0]
        for node, ids in analysis.channels.producers
        if gone[ids].any() and node.outputs[0] in analysis.channels.layout
    ]
    return cut[:: max(1, -(-len(cut) // TAPS))]


@dataclass
class _Silencer:
    analysis: Analysis
    gone: Array
    graph: ir.Graph
    """Of the copy."""

    def keep(self, name_value: ir.Value, axis: int) -> Array | None:
        """Positions kept along an axis of a value of the analysed model; None for all."""
        channels = self.analysis.channels
        layout = channels.layout.get(name_value) or channels.born(name_value)
        for block in layout:
            if block.axes == (axis,) and self.gone[block.ids].any():
                return np.flatnonzero(~self.gone[block.ids])
        return None

    def loses(self, value: ir.Value) -> bool:
        """Tell whether some of a value's channels are removed."""
        blocks = self.analysis.channels.layout.get(value, ())
        return any(self.gone[block.ids].any() for block in blocks)

    def consume(self, consumption: Consumption, copy: ir.Node) -> None:
        """Silence the removed channels where ``copy`` computes over them."""
        places = []
        for index, axis in consumption.axes:
            value = consumption.node.inputs[index]
            if value is not None and value in self.analysis.shapes.shape:
                places.append((index, axis % len(self.analysis.shapes.shape[value]), value))
        keeps = [self.keep(value, axis) for _, axis, value in places]
        found = [k for k in keeps if k is not None]
        if not found:
            return
        if copy.op_type == "Attention":
            explicit_scale(copy, self.analysis.shapes.shape[places[0][2]])
        for (index, axis, value), keep in zip(places, keeps, strict=True):
            if consumption.out_axis is not None:
                break
            is_float = value.dtype is not None and value.dtype.is_floating_point()
            if value.is_initializer() and is_float and keep is not None:
                self._zero(copy.inputs[index], axis, keep)
                return  # a zero weight silences the channel, whatever the other operand holds
        for (index, axis, _), keep in zip(places, keeps, strict=True):
            source = copy.inputs[index]
            assert source is not None
            taken = self._take(source, axis, found[0] if keep is None else keep, copy)
            copy.replace_input_with(index, taken)
        if consumption.out_axis is not None:
            size = self.analysis.shapes.shape[places[0][2]][places[0][1]]
            rank = len(self.analysis.shapes.shape[consumption.node.outputs[0]])
            self._expand(copy, consumption.out_axis % rank, found[0], (size, rank))

    def _zero(self, value: ir.Value | None, axis: int, keep: Ids) -> None:
        assert value is not None and value.const_value is not None
        array = value.const_value.numpy().copy()
        drop = np.ones(array.shape[axis], bool)
        drop[keep] = False
        array[(slice(None),) * axis + (drop,)] = 0
        value.const_value = ir.Tensor(array, name=value.name)

    def _take(self, value: ir.Value, axis: int, keep: Ids, before: ir.Node) -> ir.Value:
        indices = new_initializer(self.graph, f"{value.name}.keep", keep)
        node = ir.node("Gather", [value, indices], {"axis": axis})
        self.graph.insert_before(before, node)
        return _named(node, f"{value.name}.taken.{before.name}.{axis}")

    def _expand(self, node: ir.Node, axis: int, keep: Ids, extent: tuple[int, int]) -> None:
        """Spread the survivors' results out again; zeros stand for what was removed."""
        output, (size, rank) = node.outputs[0], extent
        readers = list(output.uses())
        amounts = np.zeros(2 * rank, np.int64)
        amounts[rank + axis] = 1
        pads = new_initializer(self.graph, f"{node.name}.pads", amounts)
        index = np.full(size, len(keep), np.int64)
        index[keep] = np.arange(len(keep))
        spread = new_initializer(self.graph, f"{node.name}.spread", index)
        pad = ir.node("Pad", [output, pads])
        gather = ir.node("Gather", [_named(pad, f"{node.name}.padded"), spread], {"axis": axis})
        self.graph.insert_after(node, [pad, gather])
        wide = _named(gather, f"{node.name}.expanded.{axis}")
        wide.type = output.type
        for use in readers:
            use.node.replace_input_with(use.idx, wide)

    def gathered(self, value: ir.Value, original: str, name: str) -> ir.Value | None:
        """The kept channels of ``value`` as a new value; None where nothing is removed."""
        source = self.analysis.values[original]
        last, taken = value, False
        for block in self.analysis.channels.layout.get(source, ()):
            if len(block.axes) > 1 and self.gone[block.ids].any():
                return None  # a grid of a channel shuffle: its ends are compared
            if self.gone[block.ids].any():
                keep = np.flatnonzero(~self.gone[block.ids])
                indices = new_initializer(self.graph, f"{name}.keep", keep)
                node = ir.node("Gather", [last, indices], {"axis": block.axes[0]})
                self.graph.append(node)
                last, taken = _named(node, f"{name}.{block.axes[0]}"), True
        last.type = value.type
        return last if taken else None


def _named(node: ir.Node, name: str) -> ir.Value:
    node.name = name
    node.outputs[0].name = name
    return node.outputs[0]
