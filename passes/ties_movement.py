"""Rules for operators that move data: slices, joins, reshapes, permutations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.blocks import index_layout, permuted, reshaped
from onnxslim_kd.passes.channels import Block, Channels, Ids, Operand, Shuffle, Unsupported
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
    others = _agree(t, operands, axis)
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
    side = min if t.attention == "heads" else max
    keeps = [side(b.axes) for o in operands for b in o.layout if axis in b.axes and len(b.axes) > 1]
    return bool(keeps) and all(any(keeps[0] in b.axes for b in o.layout) for o in operands)


def _part(t: Channels, operand: Operand, axis: int) -> Ids:
    ids = t.ids(operand, axis)
    if ids is None:
        reason = f"stands beside {operand.name}, which has no channels to remove"
        ids = np.full(operand.shape[axis], t.pin(reason))
    return ids


def _agree(t: Channels, operands: list[Operand], axis: int) -> list[Block]:
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
    if x.constant and picked is None:
        for block in moved:
            t.produce(block.ids if len(block.axes) == 1 else None)


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
    t.set(0, [*along, *_agree(t, [x, indices], axis)])


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


def reshape(t: Channels, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: match the runs of axes by their products."""
    x, out = t.need(0), t.out_shape()
    if any(len(b.axes) > 1 for b in x.layout) and _ends_shuffle(t, node, x, out):
        return
    blocks: list[Block] = []
    for block in sorted(x.layout, key=lambda b: _claim(t, b)):
        moved = reshaped(block, x.shape, out)
        if moved is None:
            continue
        if any(set(moved.axes) & set(b.axes) for b in blocks):
            t.freeze([block], "its axis is merged with another one that has channels")
        else:
            blocks.append(moved)
    t.set(0, blocks)


def _claim(t: Channels, block: Block) -> tuple[bool, int]:
    """Which block lives on where two axes merge: a weight's, then the heads or the dims."""
    side = min(block.axes) if t.attention == "heads" else -max(block.axes)
    return t.is_made_up(block.ids), side


def _ends_shuffle(t: Channels, node: ir.Node, x: Operand, out: tuple[int, ...]) -> bool:
    """Recognise Reshape..Transpose..Reshape that permutes one axis: channels stay independent.

    At the cut such a shuffle keeps its form where the survivors still fill a grid, and becomes
    one Gather where they do not. Any other Reshape that ends a grid ties it to a plain axis.
    """
    source, path = _shuffle_source(t, x.value)
    if source is not None and t.shapes.of(source) == out:
        block = next((b for b in t.layout.get(source, ()) if len(b.axes) == 1), None)
        if block is not None and len(t.layout[source]) == 1:
            axis = block.axes[0]
            order = _carried(t, Block((axis,), np.arange(out[axis])), [*path, node])
            if order is not None and order.axes == (axis,):
                t.shuffles[node] = Shuffle(axis, order.ids, tuple(path))
                t.set(0, [Block((axis,), block.ids[order.ids])])
                return True
    grids = [b for b in x.layout if len(b.axes) > 1]
    if all((b := reshaped(g, x.shape, out)) is not None and len(b.axes) > 1 for g in grids):
        return False  # still a grid afterwards
    t.collapse_all(x, first=False)
    return False


def _shuffle_source(t: Channels, value: ir.Value) -> tuple[ir.Value | None, list[ir.Node]]:
    """Walk back over Transpose and Reshape to the value before the grid."""
    path: list[ir.Node] = []
    while any(len(b.axes) > 1 for b in t.layout.get(value, ())):
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Reshape") or node.inputs[0] is None:
            return None, []
        path.insert(0, node)
        value = node.inputs[0]
    return value, path


def _carried(t: Channels, block: Block, path: list[ir.Node]) -> Block | None:
    """Carry a block along a path of Reshape and Transpose nodes."""
    moved: Block | None = block
    for node in path:
        assert node.inputs[0] is not None
        before, after = t.shapes.of(node.inputs[0]), t.shapes.of(node.outputs[0])
        assert before is not None and after is not None and moved is not None
        moved = (
            permuted(moved, _perm(node, len(before)))
            if node.op_type == "Transpose"
            else reshaped(moved, before, after)
        )
    return moved


def transpose(t: Channels, node: ir.Node) -> None:
    """Transpose: axes move."""
    x = t.need(0)
    perm = _perm(node, len(x.shape))
    t.set(0, [permuted(block, perm) for block in x.layout])


def _perm(node: ir.Node, rank: int) -> list[int]:
    perm = node.attributes.get_ints("perm")
    return list(perm) if perm is not None else list(reversed(range(rank)))


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
        elif len(block.axes) > 1 or node.attributes.get_string("mode", "constant") != "constant":
            t.freeze([block], "the axis is padded")
        else:
            axis = block.axes[0]
            made = t.made_up(node.outputs[0], axis, before[axis] + after[axis])
            ids = np.concatenate([made[: before[axis]], block.ids, made[before[axis] :]])
            blocks.append(Block((axis,), ids[: out[axis]]))
    t.set(0, blocks)


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


def resize(t: Channels, node: ir.Node) -> None:
    """Resize, Upsample: axes that keep their size pass; a resized one must stay."""
    x, out = t.need(0), t.out_shape()
    scaled = {a for a, d in enumerate(x.shape) if d != out[a]}
    t.freeze([b for b in x.layout if scaled & set(b.axes)], "the axis is resized")
    t.set(0, [b for b in x.layout if not scaled & set(b.axes)])


def depth_to_space(t: Channels, node: ir.Node) -> None:
    """DepthToSpace: b*b input channels become one output channel, and go together."""
    x = t.need(0)
    ids = t.ids(x, 1)
    if ids is None:
        return
    b = node.attributes.get_int("blocksize")
    assert b is not None
    crd = node.attributes.get_string("mode", "DCR") == "CRD"
    grid = ids.reshape(-1, b * b) if crd else ids.reshape(b * b, -1).T
    t.tie(grid[:, 1:], grid[:, :1])
    t.set(0, [Block((1,), np.ascontiguousarray(grid[:, 0]))])


def space_to_depth(t: Channels, node: ir.Node) -> None:
    """SpaceToDepth: each channel becomes b*b of them, block offset first."""
    x = t.need(0)
    ids: Ids | None = t.ids(x, 1)
    b = node.attributes.get_int("blocksize")
    assert b is not None
    t.set(0, [] if ids is None else [Block((1,), np.tile(ids, b * b))])


def spatial(t: Channels, node: ir.Node) -> None:
    """Poolings: batch and channel pass, spatial axes are computed over."""
    x = t.need(0)
    t.freeze([b for b in x.layout if max(b.axes) > 1], "a spatial axis is computed over")
    for index in range(len(node.outputs)):
        t.set(index, [b for b in x.layout if max(b.axes) <= 1])


def grid_sample(t: Channels, node: ir.Node) -> None:
    """GridSample: data and grid have the same batch; the grid's other axes are positions."""
    x, grid = t.need(0), t.need(1)
    for operand in (x, grid):
        t.collapse_all(operand, first=t.attention == "heads")
    channels = t.ids(x, 1)
    batch = t.same(t.ids(x, 0), t.ids(grid, 0), "data and grid are paired along it")
    inside = [*(b for b in x.layout if min(b.axes) > 1), *(b for b in grid.layout if min(b.axes))]
    t.freeze(inside, "a spatial axis is computed over")
    t.set(0, [Block((i,), ids) for i, ids in enumerate((batch, channels)) if ids is not None])


def regions(t: Channels, node: ir.Node) -> None:
    """RoiAlign, MaxRoiPool: channels pass; the regions choose among the rest."""
    x = t.need(0)
    channels = t.ids(x, 1)
    t.freeze([b for b in x.layout if b.axes != (1,)], "regions are cut out of it")
    for index in range(1, len(node.inputs)):
        t.freeze(t.need(index).layout, "each region is read whole")
    t.set(0, [] if channels is None else [Block((1,), channels)])
