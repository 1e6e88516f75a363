"""Rules for operators that move data along axes: joins, parts, repetitions, padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.blocks import index_layout
from onnxslim_kd.passes.channels import Block, Channels, Ids, Operand, Unsupported
from onnxslim_kd.passes.ties_pointwise import join
from onnxslim_kd.shapes import slice_index


def number(t: Channels, node: ir.Node, index: int) -> Any:
    """Return the constant number of input ``index``, None when absent.

    Raises:
        Unsupported: It is there but not constant.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if value not in t.shapes.number:
        raise Unsupported(f"its input {value.name} is not constant")
    return t.shapes.number[value]


def concat(t: Channels, node: ir.Node) -> None:
    """Concat: ids are joined along the axis; the other axes must agree."""
    operands = [t.need(i) for i in range(len(node.inputs))]
    axis = (node.attributes.get_int("axis") or 0) % len(operands[0].shape)
    grid = _common_grid(operands, axis)
    if grid is None and _share_heads(t, operands, axis):
        for operand in operands:
            t.ids_inside(operand, axis)
    others = agree(t, operands, axis)
    if grid is not None:  # join it along the axis, as RoPE does
        parts = [next(b.ids for b in o.layout if b.axes == grid) for o in operands]
        t.set(0, [Block(grid, np.concatenate(parts, axis=grid.index(axis))), *others])
    elif any(axis in b.axes for o in operands for b in o.layout):
        ids = np.concatenate([_part(t, operand, axis) for operand in operands])
        t.set(0, [Block((axis,), ids), *others])
    else:
        t.set(0, others)


def _common_grid(operands: list[Operand], axis: int) -> tuple[int, ...] | None:
    """The axes of a grid that every operand has along ``axis``, or None."""
    found = {b.axes for o in operands for b in o.layout if axis in b.axes}
    grid = found.pop() if len(found) == 1 else ()
    whole = len(grid) > 1 and all(grid in {b.axes for b in o.layout} for o in operands)
    return grid if whole else None


def _share_heads(t: Channels, operands: list[Operand], axis: int) -> bool:
    """Tell whether parts of heads are joined: some rotated, some not, all with the same heads."""
    grids = [b.axes for o in operands for b in o.layout if axis in b.axes and len(b.axes) > 1]
    if not grids:
        return False
    side = min(grids[0]) if t.heads_go() else max(grids[0])
    return all(any(side in b.axes for b in o.layout) for o in operands)


def _part(t: Channels, operand: Operand, axis: int) -> Ids:
    ids = t.ids(operand, axis)
    if ids is None:
        reason = f"stands beside {operand.name}, which has no channels to remove"
        ids = np.full(operand.shape[axis], t.pin(reason))
    return ids


def agree(t: Channels, operands: list[Operand], axis: int) -> list[Block]:
    """Tie the axes beside ``axis``, as for an elementwise operator."""
    views = []
    for o in operands:
        rest = tuple(b for b in o.layout if axis not in b.axes)
        shape = tuple(1 if a == axis else d for a, d in enumerate(o.shape))
        views.append(Operand(o.value, rest, shape, o.constant))
    return list(join(t, views, views[0].shape))


def split(t: Channels, node: ir.Node) -> None:
    """Split: each output takes its part."""
    x = t.need(0)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    start = 0
    for index in range(len(node.outputs)):
        size = t.out_shape(index)[axis]
        part = [slice(None)] * len(x.shape)
        part[axis] = slice(start, start + size)
        _take_out(t, x, part, index)
        start += size


def _take_out(t: Channels, x: Operand, index: Sequence[slice], output: int = 0) -> None:
    """Set an output to a part of ``x``; a part of no width still has its other axes."""
    empty = {a for a, d in enumerate(x.shape) if d and not range(d)[index[a]]}
    for block in x.layout:
        if len(block.axes) > 1 and (gone := empty & set(block.axes)):
            t.ids_inside(x, min(gone))
    layout = index_layout(x.layout, index)
    t.pieces += [block.ids.ravel() for block in layout]
    t.set(output, layout)


def slice_(t: Channels, node: ir.Node) -> None:
    """Slice with constant bounds wherever it cuts an axis that has ids."""
    x = t.need(0)
    out = t.out_shape()
    if all(x.shape[a] == out[a] for b in x.layout for a in b.axes) and not _reverses(t, node):
        t.set(0, x.layout)  # only axes without ids are cut: the bounds do not matter
        return
    parameters = [number(t, node, i) for i in range(1, 5)]
    _take_out(t, x, slice_index(len(x.shape), parameters))


def _reverses(t: Channels, node: ir.Node) -> bool:
    steps = number(t, node, 4)
    return steps is not None and bool((steps < 0).any())


def expand(t: Channels, node: ir.Node) -> None:
    """Expand: new extents repeat the data, so that any of them can go."""
    x, out = t.need(0), t.out_shape()
    shift = len(out) - len(x.shape)
    blocks = join(t, [x], out)
    spanned = {a + shift for a, d in enumerate(x.shape) if d > 1}
    made = [
        Block((a,), t.made_up(node.outputs[0], a, d))
        for a, d in enumerate(out)
        if d > 1 and a not in spanned
    ]
    t.set(0, [*blocks, *made])


def constant_of_shape(t: Channels, node: ir.Node) -> None:
    """ConstantOfShape: any part of it can go."""
    out = t.out_shape()
    t.set(0, [Block((a,), t.made_up(node.outputs[0], a, d)) for a, d in enumerate(out) if d > 1])


def tile(t: Channels, node: ir.Node) -> None:
    """Tile: ids repeat along the axis."""
    x, repeats = t.need(0), number(t, node, 1)
    blocks = []
    for block in x.layout:
        times = [int(repeats[a]) for a in block.axes]
        blocks.append(Block(block.axes, np.tile(block.ids, times)))
    t.set(0, blocks)


def pad(t: Channels, node: ir.Node) -> None:
    """Pad: constant padding is made up, and can go; reflected or repeated channels cannot."""
    x, out = t.need(0), t.out_shape()
    blocks: list[Block] = []
    before, after = pads(t, node, len(x.shape))
    for block in x.layout:
        if not any(before[a] or after[a] for a in block.axes):
            blocks.append(block)
        elif node.attributes.get_string("mode", "constant") != "constant":
            t.freeze([block], "the axis is padded")
        elif len(block.axes) > 1:
            blocks.append(_padded_grid(t, block, before, after))
        else:
            axis = block.axes[0]
            made = t.made_up(node.outputs[0], axis, before[axis] + after[axis])
            ids = np.concatenate([made[: before[axis]], block.ids, made[before[axis] :]])
            blocks.append(Block((axis,), ids[: out[axis]]))
    t.set(0, blocks)


def _padded_grid(t: Channels, block: Block, before: list[int], after: list[int]) -> Block:
    """Padding of heads or of their dims goes with the row or column that it fills, never alone."""
    ids = block.ids
    for position, axis in enumerate(block.axes):
        size = list(ids.shape)
        size[position] = before[axis] + after[axis]
        first, last = np.split(t.loose(tuple(size)), [before[axis]], axis=position)
        ids = np.concatenate([first, ids, last], axis=position)
    return Block(block.axes, ids)


def pads(t: Channels, node: ir.Node, rank: int) -> tuple[list[int], list[int]]:
    """Return the pads before and after every axis; refuse negative ones on axes with ids."""
    amounts = [int(p) for p in number(t, node, 1)]
    axes = number(t, node, 3)
    which = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(which):
        before[axis], after[axis] = amounts[i], amounts[i + len(which)]
    x = t.need(0)
    if any(before[a] < 0 or after[a] < 0 for b in x.layout for a in b.axes):
        raise Unsupported("it crops an axis that has channels")
    return before, after
