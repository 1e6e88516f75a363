"""Whole heads where they can go, and dimensions of every head where none can.

Before: two heads whose keys come from a grouped convolution: all heads live and die together
After:  the same heads, each with fewer dimensions

1. The walk tries heads everywhere. Where none of a layer's heads can go, a second walk tries the
   dimensions inside of them; it counts if more layers can then be cut than before.
   Where no rule asked for these layers which of the two goes, it would be the same walk.
2. What decides is the graph alone, and only that part of it: a plan is replayed in the same way.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes import grids, ties
from onnxslim_kd.passes.channels import Attention, Channels, Components, Ids
from onnxslim_kd.shapes import Shapes


def solve(
    model: ir.Model, shapes: Shapes, attention: Attention, free_outputs: Sequence[str]
) -> tuple[Channels, Components, tuple[ir.Node, ...]]:
    """Walk a graph and solve its ties.

    Args:
        model: A loaded model.
        shapes: A sample of its shapes.
        attention: Whether whole heads go, dimensions inside all heads, or what can.
        free_outputs: Graph outputs whose channels may go.

    Returns:
        The walk, its components, and the layers that lose dimensions because no head can go.
    """
    first = ties.walk(model, shapes, attention=attention, free_outputs=free_outputs)
    found = grids.settle(first)
    stuck = _stuck(first, found) if attention == "auto" else frozenset()
    if not stuck & first.choices:  # dims would go in the same way
        return first, found, ()
    second = ties.walk(model, shapes, attention=attention, free_outputs=free_outputs, by_dims=stuck)
    now = grids.settle(second)
    before, after = _free(first, found), _free(second, now)
    if len(after) <= len(before):
        return first, found, ()
    return second, now, tuple(node for node in after if node not in before)


def notes(layers: Sequence[ir.Node]) -> list[str]:
    """Say which layers lose dimensions."""
    if not layers:
        return []
    names = [node.name or "?" for node in layers]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"no whole head can go in {shown}: there dimensions of every head may go"]


def _stuck(t: Channels, found: Components) -> frozenset[ir.Node]:
    """The nodes that handle heads of which none can go, and those that hand them on."""
    if not (t.heads and t.choices):
        return frozenset()
    stays = _stays(found)
    whole = stays.copy()
    """What must stay, and what is all that some layer has."""
    for _, ids in t.producers:
        if _is_stuck(label := found.label[ids], stays):
            whole[label] = True
    marked = np.zeros(found.count, bool)
    for ids in t.heads:
        label = found.label[ids]
        marked[label] |= whole[label].all()
    if not marked.any():
        return frozenset()
    tied = (tie.node for tie in t.ties if marked[found.label[tie.a]].any())
    handed_on = (
        value.producer()
        for value, layout in t.layout.items()
        if any(marked[found.label[block.ids]].any() for block in layout)
    )
    return frozenset(node for node in (*tied, *handed_on) if node is not None)


def _free(t: Channels, found: Components) -> dict[ir.Node, None]:
    """The layers of which something can go, in the order of the graph."""
    stays = _stays(found)
    free = (node for node, ids in t.producers if not _is_stuck(found.label[ids], stays))
    return dict.fromkeys(free)


def _stays(found: Components) -> np.ndarray:
    mask = np.zeros(found.count, bool)
    mask[list(found.pinned)] = True
    return mask


def _is_stuck(label: Ids, stays: np.ndarray) -> bool:
    return bool(stays[label].all() or (label == label.flat[0]).all())
