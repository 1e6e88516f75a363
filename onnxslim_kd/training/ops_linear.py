"""Convolutions and matrix products."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.kernel_gradient import conv2d
from onnxslim_kd.training.opnode import Kernel, OpNode
from onnxslim_kd.training.ops_window import Window, halves, torch_pads, window

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _spatial_rank(node: OpNode, weight: int) -> int:
    kernel = node.ints("kernel_shape")
    rank = len(kernel) if kernel else (node.ranks[weight] or 0) - 2
    if rank not in CONV:
        raise node.refuse(f"it has {rank} spatial axes, 1 to 3 are supported")
    return rank


# ---------------------------------------------------------------------- convolutions


def conv(node: OpNode, weight: int = 1) -> Kernel:
    """Convolve; only pads that torch cannot express are made explicit."""
    rank = _spatial_rank(node, weight)
    kernel, group = CONV[rank], node.get("group", 1)
    attributes = window(node, node.ints("kernel_shape") or [0] * rank)
    strides, dilations = attributes.strides, attributes.dilations
    if attributes.symmetric:
        pads = attributes.begin
        if group == 1 and dilations == [1, 1]:
            return lambda x, w, b=None: conv2d(x, w, b, strides, pads)
        return lambda x, w, b=None: kernel(x, w, b, strides, pads, dilations, group)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        sized = window(node, list(w.shape[2:]))
        padded = F.pad(x, torch_pads(*sized.pads(x.shape[2:])))
        return kernel(padded, w, b, strides, 0, dilations, group)

    return run


def conv_transpose(node: OpNode) -> Kernel:
    """Convolve transposed: directly where torch can, else whole, cropped, then biased."""
    rank = _spatial_rank(node, 1)
    kernel, group = CONV_TRANSPOSE[rank], node.get("group", 1)
    more = node.ints("output_padding") or [0] * rank
    wanted = node.ints("output_shape")
    attributes = window(node, node.ints("kernel_shape") or [0] * rank)
    s, d = attributes.strides, attributes.dilations
    fits = all(m < max(a, b) for m, a, b in zip(more, s, d, strict=True))
    if attributes.symmetric and wanted is None and fits:
        pads = attributes.begin
        return lambda x, w, b=None: kernel(x, w, b, s, pads, more, group, d)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        sized = window(node, list(w.shape[2:]))
        begin, end = _transposed_pads(sized, x.shape[2:], more, wanted)
        whole = kernel(x, w, None, s, 0, 0, group, d)
        grown = [extra - last for extra, last in zip(more, end, strict=True)]
        result = F.pad(whole, torch_pads([-first for first in begin], grown))
        return result if b is None else result + b.reshape(-1, *[1] * rank)

    return run


def _transposed_pads(
    sized: Window, sizes: torch.Size, more: list[int], wanted: list[int] | None
) -> tuple[list[int], list[int]]:
    if wanted is None and not sized.same:
        return sized.begin, sized.end
    begin, end = [], []
    for i, n in enumerate(sizes):
        out = wanted[-len(sizes) :][i] if wanted else n * sized.strides[i]
        reach = (sized.kernel[i] - 1) * sized.dilations[i] + 1
        total = sized.strides[i] * (n - 1) + more[i] + reach - out
        total = total if wanted else max(total, 0)  # auto_pad never adds, in ONNX Runtime
        small, large = halves(max(total, 0))
        begin.append(small if sized.auto_pad == "SAME_UPPER" else large)
        end.append(total - begin[-1])
    return begin, end


def col2im(node: OpNode) -> Kernel:
    """Add columns up into images of two spatial axes."""
    image, block = node.numbers(1), node.numbers(2)
    strides, dilations = node.ints("strides") or [1, 1], node.ints("dilations") or [1, 1]
    pads = node.ints("pads") or [0] * 4
    if len(pads) != 4:
        raise node.refuse("only images with two spatial axes are supported")

    def run(x: Tensor, size: Tensor | None, kernel: Tensor | None) -> Tensor:
        height, width = image(size)
        padded = (height + pads[0] + pads[2], width + pads[1] + pads[3])
        whole = F.fold(x, padded, tuple(block(kernel)), tuple(dilations), 0, tuple(strides))
        return whole[..., pads[0] : pads[0] + height, pads[1] : pads[1] + width]

    return run


# ------------------------------------------------------------------- matrix products


def gemm(node: OpNode) -> Kernel:
    """Multiply two matrices, each maybe transposed, and add a third."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    flip_a, flip_b = node.get("transA", 0), node.get("transB", 0)
    if flip_b and not flip_a and alpha == beta == 1 and node.has(2) and node.ranks[2] == 1:
        return F.linear

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if flip_a else a, b.t() if flip_b else b
        if c is None:
            return torch.mm(a, b) * alpha if alpha != 1 else torch.mm(a, b)
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return run


def einsum(node: OpNode) -> Kernel:
    """Sum products by an equation."""
    equation = node.get("equation", "")
    return lambda *operands: torch.einsum(equation, *operands)


def matmul(node: OpNode) -> Kernel:
    """Multiply matrices, batched by broadcasting."""
    return torch.matmul


# ------------------------------------------------------------------ integer products


def matmul_integer(node: OpNode) -> Kernel:
    """Multiply quantised matrices; in float64, where integers are exact and gradients flow."""

    def run(a: Tensor, b: Tensor, a0: Tensor | None = None, b0: Tensor | None = None) -> Tensor:
        left = _centred(a, a0, -2)
        return torch.matmul(left, _centred(b, b0, -1))

    return run


def _centred(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    if zero is None:
        return x.double()
    if zero.dim() == 1 and zero.numel() > 1 and axis == -2:
        zero = zero.unsqueeze(-1)
    return x.double() - zero.double()


def conv_integer(node: OpNode) -> Kernel:
    """Convolve quantised tensors, as `matmul_integer`."""
    whole: Any = conv(node)

    def run(x: Tensor, w: Tensor, x0: Tensor | None = None, w0: Tensor | None = None) -> Tensor:
        if w0 is not None and w0.dim() == 1 and w0.numel() > 1:
            w0 = w0.reshape(-1, *[1] * (w.dim() - 1))
        result: Tensor = whole(_centred(x, x0, -1), _centred(w, w0, -1))
        return result

    return run


LINEAR = {
    "Col2Im": col2im,
    "Conv": conv,
    "ConvInteger": conv_integer,
    "ConvTranspose": conv_transpose,
    "Einsum": einsum,
    "Gemm": gemm,
    "MatMul": matmul,
    "MatMulInteger": matmul_integer,
}
