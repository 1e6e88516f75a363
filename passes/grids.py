"""Grids stay full: what is left of one after a cut must be some rows times some columns.

Reshape makes a grid of one axis; what reads it may pick it apart (Q, K and V out of one product,
say), so that its slices could lose different channels. Then no Reshape could make the grid any
more. Here such slices are tied: along the axis that leaves the most to choose from.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.channels import Channels, Components, Ids, connected

_STAYS = -1


def settle(t: Channels) -> Components:
    """Tie what would leave a grid with holes, and solve all ties."""
    exempt = set(_inside_shuffles(t))
    grids = [
        (value, block)
        for value, layout in t.layout.items()
        for block in layout
        if len(block.axes) > 1 and value not in exempt
    ]
    while True:
        found = t.components()
        pinned = np.zeros(found.count, bool)
        pinned[list(found.pinned)] = True
        before = len(t.ties)
        for value, block in grids:
            label = found.label[block.ids]
            label[pinned[label]] = _STAYS
            if not any(_is_full(label, position) for position in range(label.ndim)):
                t.node = value.producer()
                rows = _rows(block.ids, _best(t, label))
                t.tie(rows[:, 1:], rows[:, :1])
        t.node = None
        if len(t.ties) == before:
            return found


def _inside_shuffles(t: Channels) -> Iterator[ir.Value]:
    """Grids that only a channel shuffle reads: where one gets holes, a Gather takes its place."""
    for end, shuffle in t.shuffles.items():
        inside = {*shuffle.path, end}
        for node in shuffle.path:
            if all(reader in inside for reader in node.outputs[0].consumers()):
                yield node.outputs[0]


def _rows(grid: Ids, position: int) -> Ids:
    return np.moveaxis(grid, position, 0).reshape(grid.shape[position], -1)


def _is_full(label: Ids, position: int) -> bool:
    rows = _rows(label, position)
    return bool((rows == rows[:, :1]).all())


def _best(t: Channels, label: Ids) -> int:
    """The axis whose slices, once tied, leave the most units; heads come before dims if asked."""
    order = range(label.ndim) if t.heads_go() else reversed(range(label.ndim))
    return max(order, key=lambda position: _units(_rows(label, position)))


def _units(rows: Ids) -> int:
    """Count the sets of labels that can still go when each row goes as a whole."""
    labels, column = np.unique(rows, return_inverse=True)
    row = np.repeat(np.arange(len(rows)), rows.shape[1])
    count, part = connected(len(rows) + len(labels), row, len(rows) + column.ravel())
    return count - len(np.unique(part[len(rows) :][labels == _STAYS]))
