"""Pooling over regions of an image, as in detectors: RoiAlign and MaxRoiPool."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from onnxslim_kd.training.opnode import Kernel, OpNode

Corner = tuple[Tensor, Tensor]
"""Pixels along one axis, and how much each counts."""


def max_roi_pool(node: OpNode) -> Kernel:
    """Take the largest in each cell of a grid over each region."""
    sizes, scale = node.ints("pooled_shape") or [1, 1], node.get("spatial_scale", 1.0)

    def region(x: Tensor, roi: Tensor) -> Tensor:
        batch, *corners = roi.tolist()
        left, top, right, bottom = (math.floor(c * scale + 0.5) for c in corners)
        image = x[int(batch)]
        cells = [
            image[:, rows, columns].flatten(1)
            for rows in _spans(top, bottom, sizes[0], x.shape[2])
            for columns in _spans(left, right, sizes[1], x.shape[3])
        ]
        largest = [c.amax(1) if c.shape[1] else c.new_zeros(len(c)) for c in cells]
        return torch.stack(largest, 1).reshape(-1, *sizes)

    return lambda x, rois: torch.stack([region(x, roi) for roi in rois])


def _spans(first: int, last: int, count: int, size: int) -> Iterator[slice]:
    """Yield what each of ``count`` cells over [first, last] sees of an axis; it may be nothing."""
    length = max(last - first + 1, 1)
    for i in range(count):
        begin, end = first + i * length // count, first - (-(i + 1) * length // count)
        yield slice(min(max(begin, 0), size), min(max(end, 0), size))


def roi_align(node: OpNode) -> Kernel:
    """Interpolate at points in each cell of a grid over each region; average them, or take one.

    As ONNX's reference and ONNX Runtime have it, ``max`` takes the largest corner times its weight,
    not the largest interpolated point.
    """
    rows, columns = node.get("output_height", 1), node.get("output_width", 1)
    count, scale = node.get("sampling_ratio", 0), node.get("spatial_scale", 1.0)
    placed = "half_pixel" if node.since >= 16 else "output_half_pixel"
    half = node.get("coordinate_transformation_mode", placed) == "half_pixel"
    largest = node.get("mode", "avg") == "max"

    def points(first: Tensor, last: Tensor, cells: int) -> tuple[Tensor, int]:
        """Return where to look along one axis, and how often in each cell."""
        length = last - first if half else (last - first).clamp(min=1)
        times = count or math.ceil(float(length) / cells)
        steps = torch.arange(cells * times, dtype=first.dtype, device=first.device) + 0.5
        return first + steps * length / max(cells * times, 1), times

    def region(image: Tensor, roi: Tensor) -> Tensor:
        left, top, right, bottom = (roi * scale - (0.5 if half else 0)).to(image.dtype).unbind()
        ys, high = points(top, bottom, rows)
        xs, wide = points(left, right, columns)
        if high < 1 or wide < 1:  # a region without area
            return image.new_zeros(len(image), rows, columns)
        corners = torch.stack(
            [
                image[:, y][:, :, x] * weight_y[:, None] * weight_x
                for y, weight_y in _corners(ys, image.shape[1])
                for x, weight_x in _corners(xs, image.shape[2])
            ]
        )
        if largest:
            return F.max_pool2d(corners.amax(0), (high, wide))
        return F.avg_pool2d(corners.sum(0), (high, wide))

    def align(x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
        if not len(rois):
            return x.new_zeros(0, x.shape[1], rows, columns)
        return torch.stack([region(x[i], roi) for i, roi in zip(batch, rois, strict=True)])

    return align


def _corners(at: Tensor, size: int) -> tuple[Corner, Corner]:
    """Return the pixels before and after each point; beyond a pixel from the edge none counts."""
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    before = at.detach().long()
    part = at - before
    return (before, (1 - part) * inside), ((before + 1).clamp(max=size - 1), part * inside)


REGION = {"MaxRoiPool": max_roi_pool, "RoiAlign": roi_align}
