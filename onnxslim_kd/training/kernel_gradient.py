"""The gradient of a large kernel over small images, as one matrix product.

oneDNN adds the gradient of a kernel up image by image. A kernel that outgrows the cache, as those
of 512 by 512 channels do where images are down to 4 x 4 pixels, is then read and written more than
it is computed with: at a quarter of the speed of the product of all patches with all errors, whose
numbers are the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGE = 2**20
"""Elements of a kernel that no cache of a core holds beside its gradient."""
SMALL = 16
"""Pixels of an output up to which the product is quicker."""


def conv2d(x: Tensor, w: Tensor, b: Tensor | None, strides: list[int], pads: list[int]) -> Tensor:
    """Convolve, and compute the gradient of ``w`` as a product where that is quicker."""
    if not _pays(x, w, strides, pads):
        return F.conv2d(x, w, b, strides, pads)
    result: Tensor = _Conv.apply(x, w, b, strides, pads)  # type: ignore[no-untyped-call]
    return result


def _pays(x: Tensor, w: Tensor, strides: list[int], pads: list[int]) -> bool:
    if w.numel() < LARGE or not w.requires_grad or not torch.is_grad_enabled():
        return False
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    sides = zip(x.shape[2:], w.shape[2:], strides, pads, strict=True)
    high, wide = ((side + 2 * pad - kernel) // stride + 1 for side, kernel, stride, pad in sides)
    return high * wide <= SMALL


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, strides: list[int], pads: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.window = strides, pads
        return F.conv2d(x, w, b, strides, pads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        strides, pads = ctx.window
        for_x, for_w, for_b = ctx.needs_input_grad[:3]
        along_x, _, along_b = torch.ops.aten.convolution_backward(
            *(error, x, w, [w.shape[0]], strides, pads, [1, 1], False, [0, 0], 1),
            [for_x, False, for_b],
        )
        return (
            along_x,
            _along_kernel(error, x, w, strides, pads) if for_w else None,
            along_b,
            *_NONE,
        )


def _along_kernel(
    error: Tensor, x: Tensor, w: Tensor, strides: list[int], pads: list[int]
) -> Tensor:
    outputs, inputs, high, wide = w.shape
    padded = F.pad(x, (pads[1], pads[1], pads[0], pads[0])).permute(0, 2, 3, 1)
    patches = padded.unfold(1, high, strides[0]).unfold(2, wide, strides[1])
    rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, high * wide * inputs)
    product = error.permute(0, 2, 3, 1).reshape(-1, outputs).t() @ rows
    return product.reshape(outputs, high, wide, inputs).permute(0, 3, 1, 2)


_NONE = (None, None)
"""Strides and pads have no gradient."""
