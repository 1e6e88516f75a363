"""Rules for operators that work element by element, and for those that reduce or normalise axes."""

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.channels import Block, Channels, Layout, Operand, Unsupported
from onnxslim_kd.shapes import Shape

Rule = Callable[[Channels, ir.Node], None]


def unary(t: Channels, node: ir.Node) -> None:
    """One input decides, and every axis passes through: Relu, Cast, Clip, Identity, Dropout."""
    x = t.need(0)
    for index in range(len(node.outputs)):
        t.set(index, x.layout)


def dynamic_quantize(t: Channels, node: ir.Node) -> None:
    """DynamicQuantizeLinear: one scale, from the extremes over all channels."""
    x = t.need(0)
    t.collapse_all(x, first=t.heads_go())
    for block in x.layout:
        t.not_exact(block.ids, "DynamicQuantizeLinear runs over the channels")
        t.consume((0, block.axes[0]), out_axis=block.axes[0])
    t.set(0, x.layout)


def broadcast(t: Channels, node: ir.Node) -> None:
    """Numpy broadcasting over all inputs: Add, Mul, Where, Sum, Max, PRelu, ..."""
    operands = [t.need(i) for i, value in enumerate(node.inputs) if value is not None]
    t.set(0, join(t, operands, t.out_shape()))


def join(t: Channels, operands: Iterable[Operand], out: Shape) -> Layout:
    """Tie operands that broadcast to ``out``; return the layout of the result."""
    aligned = [_aligned(t, operand, out) for operand in operands]
    _settle_grids(t, aligned)
    blocks: dict[tuple[int, ...], Block] = {}
    for operand in aligned:
        for block in operand.layout:
            if block.axes in blocks:
                t.tie(blocks[block.axes].ids, block.ids)
            elif not operand.constant:
                blocks[block.axes] = block
    for operand in aligned:  # a constant gives its ids where no activation spans the axis
        for block in operand.layout if operand.constant else ():
            if block.axes in blocks:
                t.tie(blocks[block.axes].ids, block.ids)
            elif any(_spans(o, block.axes[0], out) and not o.constant for o in aligned):
                t.freeze([block], "meets an axis that has no channels to remove")
            else:
                blocks[block.axes] = block
    for block in list(blocks.values()):
        _pin_unmatched(t, aligned, block, out)
    return tuple(blocks.values())


def _pin_unmatched(t: Channels, aligned: list[Operand], block: Block, out: Shape) -> None:
    for operand in aligned:
        if block.axes in {b.axes for b in operand.layout}:
            continue
        if any(_spans(operand, axis, out) for axis in block.axes):
            t.freeze([block], f"meets {operand.name}, which has no channels to remove there")


def _aligned(t: Channels, operand: Operand, out: Shape) -> Operand:
    """Shift an operand to the axes of the result; a channel that is repeated there must stay."""
    shift = len(out) - len(operand.shape)
    blocks = []
    for block in operand.layout:
        if all(operand.shape[a] > 1 or out[a + shift] == 1 for a in block.axes):
            blocks.append(Block(tuple(a + shift for a in block.axes), block.ids))
        else:
            t.freeze([block], "one channel is repeated over an axis")
    shape = (1,) * shift + operand.shape
    return Operand(operand.value, tuple(blocks), shape, operand.constant)


def _spans(operand: Operand, axis: int, out: Shape) -> bool:
    return operand.shape[axis] > 1 or out[axis] == 1


def _settle_grids(t: Channels, aligned: list[Operand]) -> None:
    """Collapse grids that meet anything but the same grid or what is constant along it."""
    for operand in aligned:
        for grid in [b for b in operand.layout if len(b.axes) > 1]:
            others = [o for o in aligned if o is not operand]
            meets = [o for o in others if any(o.shape[a] > 1 for a in grid.axes)]
            if all(grid.axes in {b.axes for b in o.layout} for o in meets):
                continue
            plain = _collapsed(t, grid, _axis_to_keep(t, grid, meets))
            operand.layout = tuple(plain if b is grid else b for b in operand.layout)


def _axis_to_keep(t: Channels, grid: Block, meets: list[Operand]) -> int:
    """Choose the axis of a grid along which every operand it meets can lose channels too."""

    def removable(axis: int) -> bool:
        return all(
            o.shape[axis] == 1 or o.constant or any(axis in b.axes for b in o.layout) for o in meets
        )

    fit = [axis for axis in sorted(grid.axes) if removable(axis)] or sorted(grid.axes)
    return fit[0] if len(fit) > 1 and t.heads_go() else fit[-1]


def _collapsed(t: Channels, grid: Block, keep: int) -> Block:
    position = grid.axes.index(keep)
    rows = grid.ids.swapaxes(0, position).reshape(grid.ids.shape[position], -1)
    t.tie(rows[:, 1:], rows[:, :1])
    return Block((keep,), rows[:, 0])


# ------------------------------------------------------------- reductions and norms


def axes_of(t: Channels, node: ir.Node, rank: int) -> list[int]:
    """Return the axes of a Reduce*-like node, from its attribute or its second input."""
    axes = node.attributes.get_ints("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        number = t.shapes.number.get(node.inputs[1])
        if number is None:
            raise Unsupported("its axes are not constant")
        axes = [int(a) for a in number]
    if not axes:
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return [a % rank for a in axes]


def reduce(*, exact: bool) -> Rule:
    """Reduce*: reduced axes end. Sums over removed (zero) channels are exact, means are not."""

    def rule(t: Channels, node: ir.Node) -> None:
        x = t.need(0)
        axes = axes_of(t, node, len(x.shape))
        _drop_axes(t, node, x, axes, exact=exact)

    return rule


def global_pool(*, exact: bool) -> Rule:
    """Global pooling; exporters use it for a mean over channels that stand behind the tokens."""

    def rule(t: Channels, node: ir.Node) -> None:
        x = t.need(0)
        _drop_axes(t, node, x, list(range(2, len(x.shape))), exact=exact)

    return rule


def arg_reduce(t: Channels, node: ir.Node) -> None:
    """ArgMax and ArgMin give positions: the axis must stay whole."""
    x = t.need(0)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    t.freeze([b for b in x.layout if axis in b.axes], "its positions are counted")
    _drop_axes(t, node, x, [axis], exact=True)


def _drop_axes(t: Channels, node: ir.Node, x: Operand, axes: list[int], *, exact: bool) -> None:
    for axis in axes:
        ids = t.ids_inside(x, axis)
        if ids is not None:
            t.consume((0, axis))
        if not exact:
            t.not_exact(ids, f"{node.op_type} runs over the channels")
    left = [b for b in x.layout if not set(b.axes) & set(axes)]
    if not node.attributes.get_int("keepdims", 1):
        left = [Block(tuple(a - sum(r < a for r in axes) for a in b.axes), b.ids) for b in left]
    t.set(0, left)


def along_axis(default: int, *, exact: bool = False) -> Rule:
    """Softmax, LpNormalization, ...: one axis is computed over, all pass through."""

    def rule(t: Channels, node: ir.Node) -> None:
        x = t.need(0)
        axis = node.attributes.get_int("axis", default) % len(x.shape)
        ids = t.ids_inside(x, axis)
        t.consume((0, axis), out_axis=axis)
        if not exact:
            t.not_exact(ids, f"{node.op_type} runs over the channels")
        t.set(0, x.layout)

    return rule


def frozen_axis(default: int) -> Rule:
    """CumSum, TopK, ...: neighbours along the axis matter, so that it must stay whole."""

    def rule(t: Channels, node: ir.Node) -> None:
        x = t.need(0)
        axis = node.attributes.get_int("axis", default)
        if node.op_type == "CumSum":
            number = t.shapes.number.get(node.inputs[1])  # type: ignore[arg-type]
            if number is None:
                raise Unsupported("its axis is not constant")
            axis = int(number.item())
        axis %= len(x.shape)
        t.freeze([b for b in x.layout if axis in b.axes], "its order along the axis matters")
        for index in range(len(node.outputs)):
            t.set(index, [b for b in x.layout if axis not in b.axes])

    return rule


def frozen_matrix(t: Channels, node: ir.Node) -> None:
    """Trilu: the last two axes are positions."""
    x = t.need(0)
    last = {len(x.shape) - 1, len(x.shape) - 2}
    t.freeze([b for b in x.layout if last & set(b.axes)], "rows and columns are positions")
    t.set(0, x.layout)


def channel_norm(t: Channels, node: ir.Node) -> None:
    """BatchNormalization, InstanceNormalization: each channel alone, parameters along axis 1."""
    x = t.need(0)
    channels = t.ids(x, 1)
    for index in range(1, len(node.inputs)):
        if (p := t.operand(index)) is not None and p.shape != (1,):
            channels = t.same(channels, t.ids(p, 0), f"meets {p.name}")
    training = node.attributes.get_int("training_mode", 0)
    if node.op_type == "InstanceNormalization" or training:
        for axis in range(2, len(x.shape)):
            t.not_exact(t.ids(x, axis), f"{node.op_type} runs over the channels")
            t.consume((0, axis), out_axis=axis)
    rest = [b for b in x.layout if 1 not in b.axes]
    t.set(0, rest if channels is None else [Block((1,), channels), *rest])
    for index in range(1, len(node.outputs)):  # running statistics, in training mode
        t.set(index, [] if channels is None else [Block((0,), channels)])


def layer_norm(t: Channels, node: ir.Node) -> None:
    """LayerNormalization, RMSNormalization: statistics over the trailing axes."""
    x = t.need(0)
    axis = node.attributes.get_int("axis", -1) % len(x.shape)
    operands = [t.need(i) for i, value in enumerate(node.inputs) if value is not None]
    for a in range(axis, len(x.shape)):
        t.not_exact(t.ids_inside(x, a), f"{node.op_type} runs over the channels")
        across = [
            (i, a - len(x.shape))
            for i, o in enumerate(operands)
            if len(o.shape) >= len(x.shape) - a
        ]
        t.consume(*across, out_axis=a)
    t.set(0, join(t, operands, x.shape))


def group_norm(t: Channels, node: ir.Node) -> None:
    """GroupNormalization: groups stay equally wide, so that position j of each goes together."""
    x = t.need(0)
    groups = node.attributes.get_int("num_groups")
    assert groups is not None
    channels = t.ids(x, 1)
    for index in (1, 2):
        p = t.need(index)
        if p.shape == (x.shape[1],):  # opset 21; before it the parameters are one per group
            channels = t.same(channels, t.ids(p, 0), f"meets {p.name}")
    if channels is None:
        t.set(0, x.layout)
        return
    if groups < x.shape[1]:  # a group of one channel goes with it
        grid = channels.reshape(groups, -1)
        t.tie(grid[1:], grid[:1])
        t.not_exact(channels, "GroupNormalization runs over the channels")
        per_channel = [i for i in (1, 2) if t.need(i).shape == (x.shape[1],)]
        t.consume((0, 1), *[(i, 0) for i in per_channel], out_axis=1)
    t.set(0, [Block((1,), channels), *[b for b in x.layout if 1 not in b.axes]])


def lrn(t: Channels, node: ir.Node) -> None:
    """LRN: a window over neighbouring channels."""
    x = t.need(0)
    t.not_exact(t.ids(x, 1), "LRN runs over neighbouring channels")
    t.consume((0, 1), out_axis=1)
    t.set(0, x.layout)


def quantize(t: Channels, node: ir.Node) -> None:
    """QuantizeLinear, DequantizeLinear: scale and zero point along ``axis`` are weights."""
    x = t.need(0)
    axis = node.attributes.get_int("axis", 1)
    blocked = node.attributes.get_int("block_size", 0) > 0
    for index in (1, 2):
        p = t.operand(index)
        if p is not None and blocked:
            _tie_blocks(t, node, x, p)
        elif p is not None and len(p.shape) == 1 and p.shape[0] > 1:
            t.same(t.ids(x, axis), t.ids(p, 0), f"meets {p.name}")
    t.set(0, x.layout)


def _tie_blocks(t: Channels, node: ir.Node, x: Operand, p: Operand) -> None:
    """Along one axis a scale or zero point is that of a whole block, which goes or stays."""
    blocked = node.attributes.get_int("axis", 1) % len(x.shape)
    for axis in range(len(x.shape)):
        ids, own = t.ids(x, axis), t.ids(p, axis)
        if axis != blocked:
            t.same(ids, own, f"meets {p.name}")
        elif ids is None or own is None:
            found = ids if own is None else own
            t.freeze([] if found is None else [Block((0,), found)], "one block shares a scale")
        else:
            t.tie(ids, own[np.arange(len(ids)) // node.attributes.get_int("block_size", 1)])
