"""Padding and cropping."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode
from onnxslim_kd.training.ops_window import torch_pads


def pad(node: OpNode) -> Kernel:
    """Pad (or, where negative, crop) any axes, in any of ONNX's modes."""
    pads, mode = node.numbers(1), node.get("mode", "constant")
    value = node.numbers(2) if node.has(2) else (lambda _: [0])
    axes = node.numbers(3) if node.has(3) else None

    def run(
        x: Tensor, wanted: Tensor | None, fill: Tensor | None = None, along: Tensor | None = None
    ) -> Tensor:
        numbers = pads(wanted)
        half = len(numbers) // 2
        begin, end = [0] * x.dim(), [0] * x.dim()
        for i, axis in enumerate(axes(along) if axes else range(half)):
            begin[axis], end[axis] = numbers[i], numbers[half + i]
        if mode == "constant":
            return F.pad(x, torch_pads(begin, end), value=value(fill)[0])
        return _picked(x, begin, end, _SOURCES[mode])

    return run


def _picked(
    x: Tensor, begin: list[int], end: list[int], source: Callable[[Tensor, int], Tensor]
) -> Tensor:
    for axis, (first, last) in enumerate(zip(begin, end, strict=True)):
        if first or last:
            cut = max(-first, 0)
            n = x.shape[axis] - cut - max(-last, 0)  # what is cropped is not repeated
            wanted = torch.arange(-max(first, 0), n + max(last, 0), device=x.device)
            x = x.index_select(axis, source(wanted, n) + cut)
    return x


def _reflect(index: Tensor, n: int) -> Tensor:
    period = max(2 * (n - 1), 1)
    folded = index % period
    return torch.minimum(folded, period - folded) if n > 1 else torch.zeros_like(index)


def _edge(index: Tensor, n: int) -> Tensor:
    return index.clamp(0, n - 1)


def _wrap(index: Tensor, n: int) -> Tensor:
    return index % n


_SOURCES = {"reflect": _reflect, "edge": _edge, "wrap": _wrap}


def center_crop_pad(node: OpNode) -> Kernel:
    """Crop or pad around the middle to a shape."""
    target, axes = node.numbers(1), node.ints("axes")

    def run(x: Tensor, wanted: Tensor | None) -> Tensor:
        begin, end = [0] * x.dim(), [0] * x.dim()
        sizes = target(wanted)
        for axis, size in zip(axes or range(x.dim()), sizes, strict=True):
            more = size - x.shape[axis]
            first = more // 2 if more >= 0 else -(-more // 2)
            begin[axis], end[axis] = first, more - first
        return F.pad(x, torch_pads(begin, end))

    return run


PAD = {"CenterCropPad": center_crop_pad, "Pad": pad}
