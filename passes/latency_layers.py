"""What a model's latency depends on: one `Layer` per node whose width a group can change.

The time at full width is the node's own in a trace of the whole model. How it falls with the
width is measured for layers that multiply (see `onnxslim_kd.staircase`), one axis after the other
with the rest whole, and the shares are multiplied; everything else is taken to cost what it
writes, and is in proportion to that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import cost
from onnxslim_kd.passes.channels import Birth, Ids
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.latency_path import Menu
from onnxslim_kd.shapes import Shape, Shapes
from onnxslim_kd.staircase import Probe, Table

Array = np.ndarray[Any, Any]
KNOTS = 9
"""Widths at which one axis of a layer is measured; between them time is taken as straight."""
PLAIN = (
    ir.AttributeType.INT,
    ir.AttributeType.INTS,
    ir.AttributeType.FLOAT,
    ir.AttributeType.STRING,
)
"""Attributes that a layer to measure may have."""
WHOLE = ""
"""The name of the time of a whole model, where a trace does not tell that of its nodes."""
RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Width:
    """How many channels an axis has, for every level of the groups that cut it."""

    full: int
    gone: Mapping[int, tuple[int, ...]]
    """Per group: how many of its channels are gone, by level."""

    def at(self, levels: Sequence[int]) -> int:
        """Return the channels left at the levels of all groups."""
        return self.full - sum(gone[levels[group]] for group, gone in self.gone.items())


@dataclass(frozen=True)
class Layer:
    """What one node costs."""

    name: str
    seconds: float
    """At full width."""
    widths: tuple[Width, ...]
    shares: tuple[Array, ...]
    """Per width: the share of the time left, by channels left."""

    @cached_property
    def groups(self) -> frozenset[int]:
        """The groups that it depends on."""
        return frozenset(group for width in self.widths for group in width.gone)

    def at(self, levels: Sequence[int]) -> float:
        """Return its seconds at the levels of all groups."""
        seconds = self.seconds
        for width, share in zip(self.widths, self.shares, strict=True):
            seconds *= share[width.at(levels)]
        return seconds


@dataclass(frozen=True)
class Operand:
    """An input of a node: its shape, and the axes of it that can be cut."""

    kind: str
    shape: Shape
    constant: bool
    widths: Mapping[int, Width]

    def at(self, levels: Sequence[int]) -> tuple[str, Shape, bool]:
        """Return element type, shape and whether it is a weight, at the levels of all groups."""
        shape = tuple(
            self.widths[axis].at(levels) if axis in self.widths else size
            for axis, size in enumerate(self.shape)
        )
        return self.kind, shape, self.constant


@dataclass(frozen=True)
class Survey:
    """Reads off a solved model which axes the levels of a menu cut."""

    analysis: Analysis
    menus: Sequence[Menu]
    shapes: Shapes
    """At which the model is timed."""

    @cached_property
    def _cuts(self) -> tuple[Ids, Ids]:
        """Per component: the group that owns it, and the first level at which it is gone."""
        owner = np.full(self.analysis.components.count, -1)
        level = np.full(self.analysis.components.count, np.iinfo(np.int64).max)
        for group, menu in enumerate(self.menus):
            for index in reversed(range(len(menu.removed))):
                owner[menu.removed[index]] = group
                level[menu.removed[index]] = index
        return owner, level

    @cached_property
    def _weights(self) -> dict[tuple[object, int], Birth]:
        """Births by (weight, axis); those of vectors, which every use has for itself, by use."""
        found: dict[tuple[object, int], Birth] = {}
        for birth in self.analysis.births:
            if birth.operand is not None and len(self.analysis.shapes.shape[birth.value]) == 1:
                found[birth.node, birth.operand] = birth
            elif birth.operand is not None:
                found[birth.value, birth.axis] = birth
        return found

    def width(self, labels: Ids) -> Width | None:
        """Return the width of an axis with these components; None where nothing cuts it."""
        owner, level = (which[labels] for which in self._cuts)
        gone = {}
        for group in np.unique(owner[owner >= 0]).tolist():
            count = np.bincount(level[owner == group], minlength=len(self.menus[group].removed))
            gone[group] = tuple(np.cumsum(count).tolist())
        return Width(len(labels), gone) if gone else None

    def value_widths(self, value: ir.Value) -> dict[int, Width]:
        """Return the widths of a computed value, by axis."""
        found = {}
        for block in self.analysis.channels.layout.get(value, ()):
            label = self.analysis.components.label[block.ids]
            for position, axis in enumerate(block.axes):
                slices = np.moveaxis(label, position, 0).reshape(label.shape[position], -1)
                if (width := self.width(self._last(slices))) is not None:
                    found[axis] = width
        return found

    def _last(self, slices: Ids) -> Ids:
        """The component of each slice of a grid that goes last, and the slice with it."""
        level = self._cuts[1][slices]
        return np.asarray(slices[np.arange(len(slices)), level.argmax(axis=1)])

    def operand(self, node: ir.Node, index: int) -> Operand | None:
        """Return input ``index`` of ``node``; None where there is none.

        Raises:
            LookupError: Its shape or type is not known.
        """
        value = node.inputs[index]
        if value is None:
            return None
        shape = self.shapes.of(value)
        if shape is None or value.dtype is None:
            raise LookupError(value.name)
        constant = value.is_initializer() and not value.is_graph_input()
        if not constant:
            return Operand(value.dtype.name, shape, constant, self.value_widths(value))
        if len(shape) == 1:
            births = {0: self._weights.get((node, index))}
        else:
            births = {axis: self._weights.get((value, axis)) for axis in range(len(shape))}
        widths = {
            axis: width
            for axis, birth in births.items()
            if birth is not None and (width := self.width(self.analysis.labels(birth))) is not None
        }
        return Operand(value.dtype.name, shape, constant, widths)

    def layers(self, seconds: Mapping[str, float], table: Table) -> list[Layer]:
        """Return what every node costs that depends on a group.

        Args:
            seconds: The time of every node in the whole model; fused ones are not in it. Or that
                of the `WHOLE` alone: then the time of a layer is what it takes by itself.
            table: The times of single layers.
        """
        found = []
        for node in self.analysis.model.graph:
            spent = seconds.get(node.name or "")
            operands = self._operands(node) if node.op_type in cost.MACS else None
            if operands is not None and (spent is not None or WHOLE in seconds):
                axes = [w for o in operands if o is not None for w in o.widths.values()]
                if axes:
                    found.append(self._measured(node, spent, operands, axes, table))
            elif spent is not None and (axes := list(self.value_widths(node.outputs[0]).values())):
                linear = tuple(np.arange(w.full + 1) / w.full for w in axes)
                found.append(Layer(node.name or "", spent, tuple(axes), linear))
        return found

    def _operands(self, node: ir.Node) -> list[Operand | None] | None:
        """The inputs of a node that can be measured alone; None for others."""
        attributes = node.attributes.values()
        known = all(a.type in PLAIN for a in attributes)
        if not known or node.outputs[0].dtype is None:
            return None
        try:
            return [self.operand(node, index) for index in range(len(node.inputs))]
        except LookupError:
            return None

    def _measured(
        self,
        node: ir.Node,
        seconds: float | None,
        operands: Sequence[Operand | None],
        axes: Sequence[Width],
        table: Table,
    ) -> Layer:
        """Measure a layer along each of its independent widths, the others whole."""
        whole = [0] * len(self.menus)
        widths, scans = [], []
        for width, groups in independent(axes):
            widths.append(width)
            scans.append(list(self._knots(groups)))
        points = [whole, *(levels for scan in scans for levels in scan)]
        times = iter(table.seconds([self._probe(node, operands, levels) for levels in points]))
        full = next(times)
        shares = []
        for width, scan in zip(widths, scans, strict=True):
            known = {width.full: 1.0} | {width.at(levels): next(times) / full for levels in scan}
            at = sorted(known)
            shares.append(np.interp(np.arange(width.full + 1), at, [known[x] for x in at]))
        spent = full if seconds is None else seconds
        return Layer(node.name or "", spent, tuple(widths), tuple(shares))

    def _knots(self, groups: frozenset[int]) -> Iterator[list[int]]:
        """Levels at which to measure: all levels of one group, a few common shares of several."""
        most = max(len(self.menus[group].removed) - 1 for group in groups)
        steps = min(most, KNOTS - 1) if len(groups) == 1 else KNOTS - 1
        for step in range(1, steps + 1):
            levels = [0] * len(self.menus)
            for group in groups:
                levels[group] = round(step / steps * (len(self.menus[group].removed) - 1))
            yield levels

    def _probe(
        self, node: ir.Node, operands: Sequence[Operand | None], levels: Sequence[int]
    ) -> Probe:
        given = tuple(o.at(levels) if o is not None else None for o in operands)
        attributes = {
            name: tuple(a.value) if a.type == ir.AttributeType.INTS else a.value
            for name, a in node.attributes.items()
        }
        _follow(node, attributes, operands, given)
        kind = node.outputs[0].dtype
        assert kind is not None
        opset = self.analysis.model.graph.opset_imports[""]
        return Probe(node.op_type, opset, tuple(sorted(attributes.items())), given, kind.name)


def _follow(
    node: ir.Node,
    attributes: dict[str, Any],
    operands: Sequence[Operand | None],
    given: Sequence[tuple[str, Shape, bool] | None],
) -> None:
    """Let the attributes that count channels follow the shapes."""
    x = operands[0]
    if x is None or given[0] is None:
        return
    group = attributes.get("group", 1)
    if group > 1 and group == x.shape[1]:
        attributes["group"] = given[0][1][1]
    if node.op_type in RECURRENT and "hidden_size" in attributes and given[2] is not None:
        attributes["hidden_size"] = given[2][1][-1]


def independent(axes: Sequence[Width]) -> list[tuple[Width, frozenset[int]]]:
    """Merge axes that share groups; return the widest of each set, and its groups."""
    sets: list[tuple[list[Width], frozenset[int]]] = []
    for width in axes:
        members, groups = [width], frozenset(width.gone)
        for other in [s for s in sets if s[1] & groups]:
            sets.remove(other)
            members, groups = other[0] + members, groups | other[1]
        sets.append((members, groups))
    return [(max(members, key=lambda w: w.full), groups) for members, groups in sets]
