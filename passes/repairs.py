"""What a cut means for the values of a graph, and how to give a node another number.

A number that counts channels is a constant, or computed from the shapes of other values. A
constant is replaced; what is computed keeps being computed where that gives what is wanted.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import PassError
from onnxslim_kd.model import name_of, new_initializer
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.shapes import Shape

Array = np.ndarray[Any, Any]


@dataclass
class Cut:
    """What a repair needs to know of a cut."""

    analysis: Analysis
    gone: Array
    """Whether each id is removed."""
    shapes: dict[ir.Value, Shape]
    """The shapes that change."""
    numbers: dict[ir.Value, Array] = field(default_factory=dict)
    """What shape arithmetic gives by itself after the cut, where it differs."""
    orphans: list[ir.Value] = field(default_factory=list)
    """Values that lost a reader; what only they needed is removed at the end."""

    def old(self, value: ir.Value | None) -> Shape:
        """Return the shape before the cut."""
        assert value is not None
        return self.analysis.shapes.shape[value]

    def new(self, value: ir.Value | None) -> Shape:
        """Return the shape after the cut."""
        assert value is not None
        return self.shapes.get(value) or self.old(value)

    def keep(self, value: ir.Value | None, axis: int) -> Array | None:
        """Return which positions along ``axis`` are kept; None for all."""
        assert value is not None
        layout = self.analysis.channels.layout.get(value)
        if layout is None:
            layout = self.analysis.channels.born(value)
        for block in layout:
            if axis in block.axes:
                mask = ~self.gone[block.ids]
                others = tuple(i for i, a in enumerate(block.axes) if a != axis)
                kept: Array = np.any(mask, axis=others)
                return None if kept.all() else kept
        return None

    def number(self, value: ir.Value | None) -> Array | None:
        """Return a number as it was before the cut."""
        return None if value is None else self.analysis.shapes.number.get(value)


def replace(cut: Cut, node: ir.Node, index: int, number: Array) -> None:
    """Give input ``index`` of ``node`` a constant."""
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None:
        cut.orphans.append(old)
        _check_static(cut, old, number)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    name = f"{node.name}.{('' if old is None else old.name) or index}"
    graph = cut.analysis.model.graph
    node.replace_input_with(index, new_initializer(graph, name, number))


def _check_static(cut: Cut, value: ir.Value, number: Array) -> None:
    """Refuse to freeze a number that depends on a dynamic dimension."""
    if value.is_initializer():
        return
    other = cut.analysis.other_sample.number.get(value)
    base = cut.number(value)
    if base is not None and other is not None and not np.array_equal(base, other):
        raise PassError(
            f"{value.name} depends on a dynamic dimension and on a cut axis at once;"
            f" fix the input's shape or leave these channels out with --ignore"
        )


def set_shape(cut: Cut, node: ir.Node, index: int, wanted: Array) -> None:
    """Let a shape-like input hold ``wanted`` on the axes that were cut.

    A constant is replaced. A computed one that comes out right by itself is left alone; one whose
    other elements depend on dynamic dimensions keeps them and has only the cut ones replaced; an
    element that is a dynamic dimension times a cut one (batch * heads) is scaled.
    """
    value = node.inputs[index]
    assert value is not None
    before = cut.number(value)
    natural = cut.numbers.get(value, before)
    assert before is not None and natural is not None
    if np.array_equal(natural, wanted):
        return
    other = cut.analysis.other_sample.number.get(value)
    if value.is_initializer() or (other is not None and np.array_equal(before, other)):
        replace(cut, node, index, wanted)
        return
    wrong = natural != wanted
    if other is not None and np.array_equal(other[wrong], before[wrong]):
        _patch(cut, node, index, wrong, wanted)
        return
    if other is not None and not (other[wrong] * wanted[wrong] % natural[wrong]).any():
        fraction = np.where(wrong, wanted, 1), np.where(wrong, natural, 1)
        node.replace_input_with(index, scaled(cut, value, f"{node.name}.{value.name}", fraction))
        return
    raise PassError(
        f"{node.op_type} {node.name}: its input {value.name} mixes a dynamic dimension with a cut"
        f" one; fix the input's shape or leave these channels out with --ignore"
    )


def _patch(cut: Cut, node: ir.Node, index: int, wrong: Array, wanted: Array) -> None:
    """Replace some elements of a computed shape: a Concat's own inputs, or else with Where."""
    value = node.inputs[index]
    assert value is not None
    concat = value.producer()
    if concat is not None and concat.op_type == "Concat" and len(value.uses()) == 1:
        start, parts = 0, []
        for i, part in enumerate(concat.inputs):
            size = cut.old(part)[0]
            if wrong[start : start + size].any():
                parts.append((i, start, size))
            start += size
        if all(wrong[s : s + n].all() for _, s, n in parts):
            for i, s, n in parts:
                replace(cut, concat, i, wanted[s : s + n])
            return
    graph = cut.analysis.model.graph
    mask = new_initializer(graph, f"{node.name}.cut", wrong)
    fixed = new_initializer(graph, f"{node.name}.fixed", wanted)
    where = ir.node("Where", [mask, fixed, value], name=f"{node.name}.shape")
    where.outputs[0].name = f"{value.name}.{node.name}"
    where.outputs[0].type, where.outputs[0].shape = value.type, value.shape
    graph.insert_before(node, where)
    node.replace_input_with(index, where.outputs[0])


def scaled(cut: Cut, value: ir.Value, name: str, fraction: tuple[Array, Array]) -> ir.Value:
    """Return a computed shape times a fraction per element, which is exact in whole numbers."""
    graph, common = cut.analysis.model.graph, np.gcd(*fraction)
    for op_type, factor in zip(("Mul", "Div"), fraction, strict=True):
        full = f"{name}.{op_type.lower()}"
        maker, by = value.producer(), new_initializer(graph, f"{full}.by", factor // common)
        assert maker is not None
        node = ir.node(op_type, [value, by], name=full)
        output = node.outputs[0]
        output.name, output.type, output.shape = full, value.type, value.shape
        graph.insert_after(maker, node)
        value = output
    return value


def to_gather(cut: Cut, node: ir.Node, source: ir.Value | None, axis: int, indices: Array) -> None:
    """Let a Gather of ``source`` take the place of a node that moves data."""
    graph, output = cut.analysis.model.graph, node.outputs[0]
    constant = new_initializer(graph, f"{node.name}.indices", indices.astype(np.int64))
    gather = ir.node("Gather", [source, constant], {"axis": axis}, name=f"{node.name}.gather")
    gather.outputs[0].type, gather.outputs[0].shape = output.type, output.shape
    graph.insert_after(node, gather)
    output.replace_all_uses_with(gather.outputs[0], replace_graph_outputs=True)
    cut.orphans += [value for value in node.inputs if value is not None]
    name = output.name
    graph.remove(node, safe=True)
    output.name, gather.outputs[0].name = None, name
    layout = cut.analysis.channels.layout
    if output in layout:
        layout[gather.outputs[0]] = layout.pop(output)
    for table in (cut.shapes, cut.analysis.shapes.shape):
        if output in table:
            table[gather.outputs[0]] = table[output]


def remove_dead(graph: ir.Graph, values: list[ir.Value]) -> None:
    """Remove what only fed ``values`` that nobody reads any more."""
    while values:
        value = values.pop()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        node = value.producer()
        if node is None:
            if graph.initializers.get(name_of(value)) is value:
                del graph.initializers[name_of(value)]
        elif node.graph is graph and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            values += [v for v in node.inputs if v is not None]
            graph.remove(node, safe=True)
