"""Numbers in the graph that count channels, repaired after a cut: one rule per operator.

A *shape-like* input (Reshape's target, Split's sizes, Slice's bounds) must get the new count where
its axis was cut. Every other reader of a Shape must keep the original number: an attention scale
computed from the width of Q must not change because heads went. Both are decided on folded
numbers: what the arithmetic gives by itself after the cut is compared with what is wanted.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxslim_kd.contrib import MICROSOFT
from onnxslim_kd.passes import fixups_counts as counts
from onnxslim_kd.passes import fixups_shapes as shapes
from onnxslim_kd.passes.repairs import Cut, remove_dead, replace, scaled, to_gather
from onnxslim_kd.shapes import fold


def repair(cut: Cut) -> None:
    """Repair every node of the graph after the weights are cut."""
    restored = _restore_sizes(cut)
    changed = {v: shape for v, shape in cut.shapes.items() if v not in restored}
    cut.numbers = fold(cut.analysis.model, changed, cut.analysis.shapes)
    touched = cut.shapes.keys(), cut.numbers.keys()  # they grow on the way
    for node in list(cut.analysis.model.graph):
        if all(t.isdisjoint(node.inputs) and t.isdisjoint(node.outputs) for t in touched):
            continue
        if node in cut.analysis.channels.shuffles and _shuffle(cut, node):
            continue
        fixup = BY_DOMAIN.get(node.domain, {}).get(node.op_type)
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
        original = scaled(cut, output, f"{node.name}.original", fraction)
        for use in readers:
            use.node.replace_input_with(use.idx, original)
        for sample in samples:
            sample.number[original] = sample.number[output]
            sample.shape[original] = sample.shape[output]
        restored.add(value)
    return restored


def _keep_numbers(cut: Cut, node: ir.Node, handled: set[int]) -> None:
    """Give what is no shape-like input the number that it had before the cut."""
    if not cut.numbers or any(output in cut.analysis.shapes.number for output in node.outputs):
        return  # arithmetic inside of the folded part: its readers decide
    for index, value in enumerate(node.inputs):
        if value is None or index in handled or value in cut.shapes:
            continue  # a tensor that has channels itself follows the cut
        if value in cut.numbers:
            for reader, i in _whole_sources(cut, node, index):
                number = cut.number(reader.inputs[i])
                assert number is not None
                replace(cut, reader, i, number)


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


def _shuffle(cut: Cut, node: ir.Node) -> bool:
    """Turn a channel shuffle whose survivors no longer fill a grid into one Gather."""
    axis, order, path = cut.analysis.channels.shuffles[node]
    source = path[0].inputs[0]  # which may be a Gather by now, in place of another shuffle
    keep = cut.keep(source, axis)
    if keep is None or _fills_grid(cut, node):
        return False
    indices = (np.cumsum(keep) - 1)[order[keep[order]]]
    to_gather(cut, node, source, axis, indices)
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


Fixup = Callable[[Cut, ir.Node], set[int]]

FIXUPS: dict[str, Fixup] = {
    "Reshape": shapes.reshape,
    "Expand": shapes.expand,
    "ConstantOfShape": shapes.constant_of_shape,
    "Resize": shapes.resize,
    "Split": shapes.split,
    "Slice": shapes.slice_,
    "Gather": shapes.gather,
    "Pad": shapes.pad,
    "Conv": counts.group,
    "ConvInteger": counts.group,
    "QLinearConv": counts.group,
    "ConvTranspose": counts.group,
    "GroupNormalization": counts.num_groups,
    "LSTM": counts.hidden_size,
    "GRU": counts.hidden_size,
    "RNN": counts.hidden_size,
    "Attention": counts.attention,
    "RotaryEmbedding": counts.rotary_embedding,
}
"""Each repairs a node and returns the inputs that it answers for."""
CONTRIB: dict[str, Fixup] = {
    "GroupQueryAttention": counts.query_heads,
    "MatMulNBits": counts.rows_and_columns,
}
"""The same for operators of ``com.microsoft``."""
BY_DOMAIN = {"": FIXUPS, "ai.onnx": FIXUPS, MICROSOFT: CONTRIB}
