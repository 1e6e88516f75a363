"""Rules for operators that regroup axes: reshapes, transposes, and the shuffles made of both."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.blocks import permuted, reshaped
from onnxslim_kd.passes.channels import Block, Channels, Layout, Operand, Shuffle


def reshape(t: Channels, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: match the runs of axes by their products."""
    x, out = t.need(0), t.out_shape()
    if any(len(b.axes) > 1 for b in x.layout) and _ends_shuffle(t, node, x, out):
        return
    blocks: list[Block] = []
    for block in _by_claim(t, x.layout):
        moved = reshaped(block, x.shape, out)
        if moved is None:
            continue
        if any(set(moved.axes) & set(b.axes) for b in blocks):
            t.freeze([block], "its axis is merged with another one that has channels")
        else:
            blocks.append(moved)
    t.set(0, blocks)


def _by_claim(t: Channels, layout: Layout) -> Sequence[Block]:
    """In the order in which blocks live on where axes merge: weights', then heads or dims."""
    if len(layout) < 2:
        return layout
    heads = t.heads_go()
    return sorted(
        layout, key=lambda b: (t.is_made_up(b.ids), min(b.axes) if heads else -max(b.axes))
    )


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
