"""Rules for operators that pick by index: gathers and scatters."""

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.channels import Block, Channels, Operand, Unsupported
from onnxslim_kd.passes.ties_movement import agree
from onnxslim_kd.passes.ties_pointwise import join


def gather(t: Channels, node: ir.Node) -> None:
    """Gather: an embedding's features pass; constant indices pick ids along the axis."""
    x = t.need(0)
    indices = t.shapes.of(node.inputs[1]) if node.inputs[1] is not None else None
    if indices is None:
        raise Unsupported("the shape of its indices is not known")
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    picked = t.shapes.number.get(node.inputs[1])  # type: ignore[arg-type]
    shift = len(indices) - 1
    kept, out = [], []
    for block in x.layout:
        if axis not in block.axes:
            kept.append(block)
        elif picked is None:
            if not x.constant:
                t.freeze([block], "its indices are not constant")
        elif (b := _picked(t, block, axis, picked)) is not None:
            out.append(b)
            t.pieces.append(b.ids.ravel())
    moved = [Block(tuple(a + shift if a > axis else a for a in b.axes), b.ids) for b in kept]
    t.set(0, [*moved, *out])
    if x.constant and (picked is None or picked.ndim > 1):  # an embedding, or a table of biases
        for block in moved:
            t.produce(block.ids if len(block.axes) == 1 else None)


def _picked(t: Channels, block: Block, axis: int, picked: Any) -> Block | None:
    """The block after indexing ``axis`` with the array ``picked``."""
    position = block.axes.index(axis)
    size = block.ids.shape[position]
    if picked.size and (picked.max() >= size or picked.min() < -size):
        raise Unsupported("its indices are out of range for these input shapes")
    ids = np.take(block.ids, picked, axis=position)
    shift = picked.ndim - 1
    axes = tuple(a + shift if a > axis else a for a in block.axes)
    if picked.ndim == 1:
        return Block(axes, ids)
    if picked.ndim == 0 and ids.ndim:
        return Block(tuple(a for i, a in enumerate(axes) if i != position), ids)
    t.freeze([Block((0,), np.atleast_1d(ids).ravel())], "one channel is picked by its index")
    return None


def gather_elements(t: Channels, node: ir.Node) -> None:
    """GatherElements: data and indices agree beside the axis, along which any index may come."""
    x, indices = t.need(0), t.need(1)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    if any(
        a != b for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)) if i != axis
    ):
        raise Unsupported("its indices cover a part of the data")
    t.freeze([b for b in x.layout if axis in b.axes], "its indices are not constant")
    along = [b for b in indices.layout if axis in b.axes]
    t.set(0, [*along, *agree(t, [x, indices], axis)])


def gather_nd(t: Channels, node: ir.Node) -> None:
    """GatherND: the axes that the indices do not reach pass."""
    x, indices = t.need(0), t.need(1)
    reached = node.attributes.get_int("batch_dims", 0) + indices.shape[-1]
    inside = [b for b in x.layout if min(b.axes) < reached]
    t.freeze([] if x.constant else inside, "its indices are not constant")
    shift = len(indices.shape) - 1 - reached
    passing = [b for b in x.layout if min(b.axes) >= reached]
    moved = [Block(tuple(a + shift for a in b.axes), b.ids) for b in passing]
    t.set(0, moved)
    for block in moved if x.constant else ():
        t.produce(block.ids if len(block.axes) == 1 else None)


def scatter_nd(t: Channels, node: ir.Node) -> None:
    """ScatterND: data and updates agree on the axes that the indices do not reach."""
    x, indices, updates = t.need(0), t.need(1), t.need(2)
    reached, rows = indices.shape[-1], len(indices.shape) - 1
    views = []
    for operand, lead in ((x, reached), (updates, rows)):
        t.freeze([b for b in operand.layout if min(b.axes) < lead], "its indices are not constant")
        passing = [b for b in operand.layout if min(b.axes) >= lead]
        layout = tuple(Block(tuple(a - lead for a in b.axes), b.ids) for b in passing)
        views.append(Operand(operand.value, layout, operand.shape[lead:], operand.constant))
    joined = join(t, views, x.shape[reached:])
    t.set(0, [Block(tuple(a + reached for a in b.axes), b.ids) for b in joined])
