"""Numbers in the graph that count channels, repaired after a cut: one rule per operator.

A *shape-like* input (Reshape's target, Split's sizes, Slice's bounds) must get the new count where
its axis was cut. Every other reader of a Shape must keep the original number: an attention scale
computed from the width of Q must not change because heads went. Both are decided on folded
numbers: what the arithmetic gives by itself after the cut is compared with what is wanted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import PassError
from onnxslim_kd.model import name_of, new_initializer
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.shapes import Shape, fold, slice_index

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


def repair(cut: Cut) -> None:
    """Repair every node of the graph after the weights are cut."""
    restored = _restore_sizes(cut)
    shapes = {v: shape for v, shape in cut.shapes.items() if v not in restored}
    cut.numbers = fold(cut.analysis.model, shapes, cut.analysis.shapes)
    for node in list(cut.analysis.model.graph):
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        if not any(v in cut.shapes or v in cut.numbers for v in values):
            continue
        if node in cut.analysis.channels.shuffles and _shuffle(cut, node):
            continue
        fixup = FIXUPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        handled = fixup(cut, node) if fixup is not None else set()
        _keep_numbers(cut, node, handled)
    remove_dead(cut.analysis.model.graph, cut.orphans)


def _restore_sizes(cut: Cut) -> set[ir.Value]:
    """Let a Shape that reads a dynamic dimension times a cut one give the original product.

    From ``batch * heads`` graphs compute the batch as a quotient of the original number of heads.

    Returns:
        The values whose sizes read as before the cut.
    """
    restored = set()
    samples = cut.analysis.shapes, cut.analysis.other_sample
    for node in list(cut.analysis.model.graph):
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value not in cut.shapes or value not in samples[1].shape:
            continue
        old, new, other = cut.old(value), cut.new(value), samples[1].shape[value]
        if not any(a != b and a != c for a, b, c in zip(old, new, other, strict=True)):
            continue
        part = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(old)))
        fraction = np.array(old[part], np.int64), np.array(new[part], np.int64)
        output, readers = node.outputs[0], list(node.outputs[0].uses())
        original = _scaled(cut, output, f"{node.name}.original", fraction)
        for use in readers:
            use.node.replace_input_with(use.idx, original)
        for sample in samples:
            sample.number[original] = sample.number[output]
            sample.shape[original] = sample.shape[output]
        restored.add(value)
    return restored


def _keep_numbers(cut: Cut, node: ir.Node, handled: set[int]) -> None:
    """Give what is no shape-like input the number that it had before the cut."""
    if any(output in cut.analysis.shapes.number for output in node.outputs):
        return  # arithmetic inside of the folded part: its readers decide
    for index, value in enumerate(node.inputs):
        if value is None or index in handled or value in cut.shapes:
            continue  # a tensor that has channels itself follows the cut
        if value in cut.numbers:
            for reader, i in _whole_sources(cut, node, index):
                number = cut.number(reader.inputs[i])
                assert number is not None
                _replace(cut, reader, i, number)


def _whole_sources(cut: Cut, node: ir.Node, index: int) -> list[tuple[ir.Node, int]]:
    """Where to put the original number: at the whole numbers it is computed from, if only for it.

    A scale such as ``1 / sqrt(width)`` then keeps being computed, to the last bit, by the graph.
    """
    value = node.inputs[index]
    assert value is not None
    maker = value.producer()
    if cut.analysis.shapes.number[value].dtype.kind != "f" or maker is None:
        return [(node, index)]
    if len(value.uses()) > 1:
        return [(node, index)]
    changed = [i for i, v in enumerate(maker.inputs) if v is not None and v in cut.numbers]
    return [place for i in changed for place in _whole_sources(cut, maker, i)]


def _replace(cut: Cut, node: ir.Node, index: int, number: Array) -> None:
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


# -------------------------------------------------------------------- shape-like inputs


def _reshape(cut: Cut, node: ir.Node) -> set[int]:
    target = cut.number(node.inputs[1])
    if target is None:
        return {1}
    old, new = cut.old(node.outputs[0]), cut.new(node.outputs[0])
    source = cut.new(node.inputs[0])
    zero_copies = not node.attributes.get_int("allowzero", 0)
    wanted = target.copy()
    for axis, t in enumerate(target.tolist()):
        copied = t == 0 and zero_copies
        if copied and source[axis] == new[axis]:
            continue
        if t != -1 and (old[axis] != new[axis] or copied):
            wanted[axis] = new[axis]
    _set_shape(cut, node, 1, wanted)
    return {1}


def _set_shape(cut: Cut, node: ir.Node, index: int, wanted: Array) -> None:
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
        _replace(cut, node, index, wanted)
        return
    wrong = natural != wanted
    if other is not None and np.array_equal(other[wrong], before[wrong]):
        _patch(cut, node, index, wrong, wanted)
        return
    if other is not None and not (other[wrong] * wanted[wrong] % natural[wrong]).any():
        fraction = np.where(wrong, wanted, 1), np.where(wrong, natural, 1)
        node.replace_input_with(index, _scaled(cut, value, f"{node.name}.{value.name}", fraction))
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
                _replace(cut, concat, i, wanted[s : s + n])
            return
    graph = cut.analysis.model.graph
    mask = new_initializer(graph, f"{node.name}.cut", wrong)
    fixed = new_initializer(graph, f"{node.name}.fixed", wanted)
    where = ir.node("Where", [mask, fixed, value], name=f"{node.name}.shape")
    where.outputs[0].name = f"{value.name}.{node.name}"
    where.outputs[0].type, where.outputs[0].shape = value.type, value.shape
    graph.insert_before(node, where)
    node.replace_input_with(index, where.outputs[0])


def _scaled(cut: Cut, value: ir.Value, name: str, fraction: tuple[Array, Array]) -> ir.Value:
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


def _expand(cut: Cut, node: ir.Node) -> set[int]:
    target = cut.number(node.inputs[1])
    if target is None:
        return {1}
    out = cut.new(node.outputs[0])
    shift = len(out) - len(target)
    wanted = np.array([1 if t == 1 else out[a + shift] for a, t in enumerate(target)], np.int64)
    _set_shape(cut, node, 1, wanted)
    return {1}


def _constant_of_shape(cut: Cut, node: ir.Node) -> set[int]:
    if cut.number(node.inputs[0]) is not None:
        _set_shape(cut, node, 0, np.array(cut.new(node.outputs[0]), np.int64))
    return {0}


def _resize(cut: Cut, node: ir.Node) -> set[int]:
    sizes = cut.number(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is not None:
        axes = node.attributes.get_ints("axes")
        out = cut.new(node.outputs[0])
        _set_shape(cut, node, 3, np.array([out[a] for a in axes] if axes else out, np.int64))
    return {3}


def _split(cut: Cut, node: ir.Node) -> set[int]:
    axis = node.attributes.get_int("axis", 0) % len(cut.old(node.inputs[0]))
    keep = cut.keep(node.inputs[0], axis)
    if keep is not None:
        node.attributes.pop("num_outputs", None)
        sizes = np.array([cut.new(v)[axis] for v in node.outputs], np.int64)
        if len(node.inputs) < 2 or node.inputs[1] is None:
            _replace(cut, node, 1, sizes)
        else:
            _set_shape(cut, node, 1, sizes)
    return {1}


def _slice(cut: Cut, node: ir.Node) -> set[int]:
    x = node.inputs[0]
    starts, ends = cut.number(node.inputs[1]), cut.number(node.inputs[2])
    if starts is None or ends is None:
        return {1, 2}
    axes, steps = (cut.number(node.inputs[i]) if len(node.inputs) > i else None for i in (3, 4))
    rank = len(cut.old(x))
    which = range(len(starts)) if axes is None else [int(a) % rank for a in axes]
    index = slice_index(rank, [starts, ends, axes, steps])
    new_starts, new_ends = starts.copy(), ends.copy()
    for i, axis in enumerate(which):
        keep = cut.keep(x, axis)
        if keep is None:
            continue
        picked = np.arange(len(keep))[index[axis]]
        if steps is not None and steps[i] != 1:
            _slice_to_gather(cut, node, axis, keep, picked)
            return {1, 2, 3, 4}
        new_starts[i] = keep[: picked[0]].sum() if len(picked) else 0
        new_ends[i] = new_starts[i] + keep[picked].sum()
    _set_shape(cut, node, 1, new_starts)
    _set_shape(cut, node, 2, new_ends)
    return {1, 2}


def _slice_to_gather(cut: Cut, node: ir.Node, axis: int, keep: Array, picked: Array) -> None:
    """A Slice with steps over an axis whose survivors are no longer evenly spaced."""
    indices = (np.cumsum(keep) - 1)[picked[keep[picked]]]
    _to_gather(cut, node, node.inputs[0], axis, indices)


def _to_gather(cut: Cut, node: ir.Node, source: ir.Value | None, axis: int, indices: Array) -> None:
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


def _gather(cut: Cut, node: ir.Node) -> set[int]:
    x, indices = node.inputs[0], cut.number(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(cut.old(x))
    keep = cut.keep(x, axis)
    if keep is None:
        return {1} if indices is None else set()
    assert indices is not None
    rank = np.cumsum(keep) - 1
    positions = np.where(indices < 0, indices + len(keep), indices)
    new = rank[positions]
    if indices.ndim == 1:
        new = new[keep[positions]]
    _replace(cut, node, 1, new.astype(indices.dtype))
    return {1}


def _pad(cut: Cut, node: ir.Node) -> set[int]:
    amounts = cut.number(node.inputs[1])
    out = node.outputs[0]
    made = [
        b
        for b in cut.analysis.births
        if b.node is node and cut.gone[b.start : b.start + b.size].any()
    ]
    if amounts is None or not made:
        return {1}
    rank = len(cut.old(node.inputs[0]))
    axes = cut.number(node.inputs[3]) if len(node.inputs) > 3 else None
    which = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    wanted = amounts.copy()
    for birth in made:
        i = which.index(birth.axis)
        keep = cut.keep(out, birth.axis)
        assert keep is not None
        before = int(amounts[i])
        wanted[i] = keep[:before].sum()
        wanted[i + len(which)] = keep[len(keep) - int(amounts[i + len(which)]) :].sum()
    _set_shape(cut, node, 1, wanted)
    return {1}


def _shuffle(cut: Cut, node: ir.Node) -> bool:
    """Turn a channel shuffle whose survivors no longer fill a grid into one Gather."""
    source, axis, order, _ = cut.analysis.channels.shuffles[node]
    if cut.keep(source, axis) is None or _fills_grid(cut, node):
        return False
    keep = cut.keep(source, axis)
    assert keep is not None
    indices = (np.cumsum(keep) - 1)[order[keep[order]]]
    _to_gather(cut, node, source, axis, indices)
    return True


def _fills_grid(cut: Cut, node: ir.Node) -> bool:
    grid = node.inputs[0]
    assert grid is not None
    for block in cut.analysis.channels.layout.get(grid, ()):
        mask = ~cut.gone[block.ids]
        full = np.ones(mask.shape, bool)
        for axis in range(mask.ndim):
            others = tuple(a for a in range(mask.ndim) if a != axis)
            full &= mask.any(axis=others, keepdims=True)
        if not np.array_equal(full, mask):
            return False
    return True


# ------------------------------------------------------------------------- attributes


def _group(cut: Cut, node: ir.Node) -> set[int]:
    """Conv, ConvTranspose: the number of groups, where whole groups went."""
    groups = node.attributes.get_int("group", 1)
    if groups > 1:
        channels = cut.new(node.inputs[0])[1]
        weight = cut.new(node.inputs[3 if node.op_type == "QLinearConv" else 1])
        if node.op_type == "ConvTranspose":
            whole = cut.old(node.inputs[1])[0] == groups
            left = channels if whole else groups
        else:
            left = channels // weight[1]
        node.attributes["group"] = ir.AttrInt64("group", left)
    return set()


def _hidden_size(cut: Cut, node: ir.Node) -> set[int]:
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", cut.new(node.inputs[2])[2])
    return set()


def explicit_scale(node: ir.Node, queries: Shape) -> None:
    """Write down the scale that Attention derives from the size of a head."""
    if "scale" not in node.attributes:
        heads = 1 if len(queries) == 4 else node.attributes.get_int("q_num_heads") or 1
        scale = (queries[-1] // heads) ** -0.5
        node.attributes["scale"] = ir.AttrFloat32("scale", scale)


def _attention(cut: Cut, node: ir.Node) -> set[int]:
    """Attention: fewer heads, or the scale that heads of the old size had."""
    queries, keys = node.inputs[0], node.inputs[1]
    old, new = cut.old(queries), cut.new(queries)
    heads = node.attributes.get_int("q_num_heads") or 1
    if len(old) == 3 and cut.analysis.channels.attention == "heads" and heads > 1:
        _fewer_heads(cut, node, "q_num_heads", queries)
        _fewer_heads(cut, node, "kv_num_heads", keys)
    elif old[-1] != new[-1]:
        explicit_scale(node, old)
    return set()


def _rotary_embedding(cut: Cut, node: ir.Node) -> set[int]:
    heads = node.attributes.get_int("num_heads") or 1
    by_heads = cut.analysis.channels.attention == "heads" and heads > 1
    if by_heads and len(cut.old(node.inputs[0])) == 3:
        _fewer_heads(cut, node, "num_heads", node.inputs[0])
    return set()


def _fewer_heads(cut: Cut, node: ir.Node, attribute: str, value: ir.Value | None) -> None:
    heads = node.attributes.get_int(attribute) or 1
    left = cut.new(value)[2] * heads // cut.old(value)[2]
    node.attributes[attribute] = ir.AttrInt64(attribute, left)


FIXUPS: dict[str, Callable[[Cut, ir.Node], set[int]]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Resize": _resize,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Conv": _group,
    "ConvInteger": _group,
    "QLinearConv": _group,
    "ConvTranspose": _group,
    "LSTM": _hidden_size,
    "GRU": _hidden_size,
    "RNN": _hidden_size,
    "Attention": _attention,
    "RotaryEmbedding": _rotary_embedding,
}
"""Each repairs a node and returns the inputs that it answers for."""


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
