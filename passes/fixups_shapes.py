"""Repairs of shape-like inputs: targets, sizes, bounds and indices get what is left of an axis."""

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.repairs import Array, Cut, replace, set_shape, to_gather
from onnxslim_kd.shapes import slice_index


def reshape(cut: Cut, node: ir.Node) -> set[int]:
    """Reshape: the target's element of a cut axis; 0 copies and -1 is computed, as before."""
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
    set_shape(cut, node, 1, wanted)
    return {1}


def expand(cut: Cut, node: ir.Node) -> set[int]:
    """Expand: the target's element of a cut axis."""
    target = cut.number(node.inputs[1])
    if target is None:
        return {1}
    out = cut.new(node.outputs[0])
    shift = len(out) - len(target)
    wanted = np.array([1 if t == 1 else out[a + shift] for a, t in enumerate(target)], np.int64)
    set_shape(cut, node, 1, wanted)
    return {1}


def constant_of_shape(cut: Cut, node: ir.Node) -> set[int]:
    """ConstantOfShape: the shape to fill."""
    if cut.number(node.inputs[0]) is not None:
        set_shape(cut, node, 0, np.array(cut.new(node.outputs[0]), np.int64))
    return {0}


def resize(cut: Cut, node: ir.Node) -> set[int]:
    """Resize: sizes, which name the axes that keep theirs, too."""
    sizes = cut.number(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is not None:
        axes = node.attributes.get_ints("axes")
        out = cut.new(node.outputs[0])
        set_shape(cut, node, 3, np.array([out[a] for a in axes] if axes else out, np.int64))
    return {3}


def split(cut: Cut, node: ir.Node) -> set[int]:
    """Split: the sizes of the parts."""
    axis = node.attributes.get_int("axis", 0) % len(cut.old(node.inputs[0]))
    keep = cut.keep(node.inputs[0], axis)
    if keep is not None:
        node.attributes.pop("num_outputs", None)
        sizes = np.array([cut.new(v)[axis] for v in node.outputs], np.int64)
        if len(node.inputs) < 2 or node.inputs[1] is None:
            replace(cut, node, 1, sizes)
        else:
            set_shape(cut, node, 1, sizes)
    return {1}


def slice_(cut: Cut, node: ir.Node) -> set[int]:
    """Slice: bounds count what is kept before them; with steps it becomes a Gather."""
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
    set_shape(cut, node, 1, new_starts)
    set_shape(cut, node, 2, new_ends)
    return {1, 2}


def _slice_to_gather(cut: Cut, node: ir.Node, axis: int, keep: Array, picked: Array) -> None:
    """A Slice with steps over an axis whose survivors are no longer evenly spaced."""
    indices = (np.cumsum(keep) - 1)[picked[keep[picked]]]
    to_gather(cut, node, node.inputs[0], axis, indices)


def gather(cut: Cut, node: ir.Node) -> set[int]:
    """Gather: indices along a cut axis, without those that went."""
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
    replace(cut, node, 1, new.astype(indices.dtype))
    return {1}


def pad(cut: Cut, node: ir.Node) -> set[int]:
    """Pad: how much of the padding is kept."""
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
    set_shape(cut, node, 1, wanted)
    return {1}
