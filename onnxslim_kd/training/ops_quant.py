"""Quantisation, so that it can be trained through.

Quantised values are kept as whole numbers in floating point, and rounding lets the gradient pass
as if it were not there (straight-through), so a QDQ model trains as it will run.
"""

from typing import Any

import torch
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode, torch_dtype
from onnxslim_kd.training.ops_linear import conv

RANGES: dict[int, tuple[int, int]] = {
    2: (0, 255),
    3: (-128, 127),
    4: (0, 65535),
    5: (-32768, 32767),
    21: (0, 15),
    22: (-8, 7),
}
"""ONNX type code to the numbers it holds."""
CODES = {torch.uint8: 2, torch.int8: 3, torch.uint16: 4, torch.int16: 5}


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded(x: Tensor) -> Tensor:
    """Round, and let the gradient pass."""
    result: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return result


def quantize(node: OpNode) -> Kernel:
    """Divide by the scale, round, shift and limit."""
    low, high = _range(node)
    axis, block = node.get("axis", 1), node.get("block_size", 0)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        whole = rounded(x.to(scale.dtype) / _spread(scale, x, axis, block))
        if zero is not None:
            whole = whole + _spread(zero, x, axis, block).to(whole.dtype)
        return whole.clamp(low, high)

    return run


def _range(node: OpNode, index: int = 2) -> tuple[int, int]:
    """Return the smallest and largest number of the type, which the zero point has."""
    code = node.get("output_dtype", 0)
    if not code:
        zero = node.constants[index] if node.has(index) else None
        if node.has(index) and zero is None:
            raise node.refuse("its zero point is computed")
        code = 2 if zero is None else CODES.get(zero.dtype, 0)
    if code not in RANGES:
        raise node.refuse("only integer types of 4, 8 and 16 bits are supported")
    return RANGES[code]


def dequantize(node: OpNode) -> Kernel:
    """Take off the zero point and multiply by the scale."""
    axis, block = node.get("axis", 1), node.get("block_size", 0)
    code = node.get("output_dtype", 0)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        whole = x.to(scale.dtype)
        if zero is not None:
            whole = whole - _spread(zero, x, axis, block).to(scale.dtype)
        result = whole * _spread(scale, x, axis, block)
        return result.to(torch_dtype(code)) if code else result

    return run


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Make a scale or zero point broadcast: one for all, per index of an axis, or per block."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(-1, *[1] * (x.dim() - 1 - axis % x.dim()))


def dynamic_quantize(node: OpNode) -> Kernel:
    """Quantise to uint8 by the range of the data, with zero in it."""

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.round(-low / scale).clamp(0, 255)
        return (rounded(x / scale) + zero).clamp(0, 255), scale, zero

    return run


# ------------------------------------------------- quantised layers, in one operator


def _real(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """Return the real numbers that a quantised tensor stands for."""
    return (x.to(scale.dtype) - _spread(zero, x, axis, 0).to(scale.dtype)) * _spread(
        scale, x, axis, 0
    )


def _quantised(y: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int]) -> Tensor:
    return (rounded(y / scale) + zero.to(y.dtype)).clamp(*limits)


def qlinear_conv(node: OpNode) -> Kernel:
    """Convolve quantised tensors; the bias counts in units of both scales."""
    convolve: Any = conv(node, weight=3)
    limits = _range(node, 7)

    def run(x: Tensor, xs: Tensor, xz: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        ws, wz, ys, yz = rest[:4]
        bias = rest[4] * (xs * ws) if len(rest) > 4 else None
        y = convolve(_real(x, xs, xz, 1), _real(w, ws, wz, 0), bias)
        return _quantised(y, ys, yz, limits)

    return run


def qlinear_matmul(node: OpNode) -> Kernel:
    """Multiply quantised matrices."""
    limits = _range(node, 7)

    def run(a: Tensor, as_: Tensor, az: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        bs, bz, ys, yz = rest
        y = torch.matmul(_real(a, as_, az, -2), _real(b, bs, bz, -1))
        return _quantised(y, ys, yz, limits)

    return run


QUANT = {
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": dynamic_quantize,
    "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul,
    "QuantizeLinear": quantize,
}
