"""Blocks of ids through operators that only move data: reshapes, permutations, indexing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxslim_kd.passes.channels import Block, Layout, Unsupported
from onnxslim_kd.shapes import Shape

MAX_BLOCK = 1 << 24
"""Elements of the largest block that Reshape may make; beyond it the channels are pinned."""


def runs(before: Shape, after: Shape) -> list[tuple[range, range]]:
    """Match axes of two shapes in the smallest runs of equal product, in order.

    ``runs((2, 12, 5), (2, 3, 4, 5))`` is ``[(0:1, 0:1), (1:2, 1:3), (2:3, 3:4)]``.
    """
    found, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        p = before[i] if i < len(before) else 1
        q = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while p != q:
            if p < q and i < len(before):
                p, i = p * before[i], i + 1
            elif j < len(after):
                q, j = q * after[j], j + 1
            else:
                raise Unsupported(f"cannot match shape {before} with {after}")
        found.append((range(i0, i), range(j0, j)))
    return found


def reshaped(block: Block, before: Shape, after: Shape) -> Block | None:
    """Carry a block through Reshape; None when only axes of size 1 are left of it."""
    touched = [
        (ins, outs)
        for ins, outs in runs(before, after)
        if any(a in ins and before[a] > 1 for a in block.axes)
    ]
    in_axes = [a for ins, _ in touched for a in ins]
    out_axes = [a for _, outs in touched for a in outs]
    if int(np.prod([before[a] for a in in_axes])) > MAX_BLOCK:
        raise Unsupported("too many elements to follow through this reshape")
    order = np.argsort(block.axes)
    ids = np.transpose(block.ids, order)
    view = ids.reshape([before[a] if a in block.axes else 1 for a in in_axes])
    full = np.broadcast_to(view, [before[a] for a in in_axes]).reshape([after[a] for a in out_axes])
    return drop_constant(Block(tuple(out_axes), full))


def drop_constant(block: Block) -> Block | None:
    """Leave out the axes along which the ids do not change."""
    axes, ids = list(block.axes), block.ids
    for position in reversed(range(len(axes))):
        first = ids.take([0], axis=position)
        if ids.shape[position] == 1 or (ids == first).all():
            ids = first.squeeze(position)
            del axes[position]
    return Block(tuple(axes), np.ascontiguousarray(ids)) if axes else None


def index_layout(layout: Layout, index: Sequence[Any]) -> Layout:
    """Carry a layout through basic or one-axis indexing that keeps the rank."""
    blocks = []
    for block in layout:
        ids = block.ids
        for position, axis in enumerate(block.axes):
            ids = ids[(slice(None),) * position + (index[axis],)]
        if ids.size:
            blocks.append(Block(block.axes, ids))
    return tuple(blocks)


def permuted(block: Block, perm: Sequence[int]) -> Block:
    """Carry a block through Transpose, its axes in ascending order again."""
    axes = [perm.index(a) for a in block.axes]
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return Block(tuple(axes[i] for i in order), np.transpose(block.ids, order))
