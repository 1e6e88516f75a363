"""Rules for operators over space: poolings, sampling, resizing, space and depth."""

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.channels import Block, Channels, Ids


def spatial(t: Channels, node: ir.Node) -> None:
    """Poolings: batch and channel pass, and spatial axes along which the window is one wide."""
    x, out = t.need(0), t.out_shape()
    size = [1, 1, *(node.attributes.get_ints("kernel_shape") or x.shape[2:])]
    passes = {a for a, n in enumerate(size) if n == 1 and x.shape[a] == out[a]}
    t.freeze([b for b in x.layout if set(b.axes) - passes], "a spatial axis is computed over")
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        t.freeze(x.layout, "its positions are counted")  # over all channels
    t.set(0, [b for b in x.layout if passes.issuperset(b.axes)])


def grid_sample(t: Channels, node: ir.Node) -> None:
    """GridSample: data and grid have the same batch; the grid's other axes are positions."""
    x, grid = t.need(0), t.need(1)
    for operand in (x, grid):
        t.collapse_all(operand, first=t.heads_go())
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
