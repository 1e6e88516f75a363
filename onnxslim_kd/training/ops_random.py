"""Operators that draw numbers, from torch's generator, which a run seeds at every step."""

from collections.abc import Callable

import torch
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode, torch_dtype

Draw = Callable[[OpNode], Callable[[Tensor], Tensor]]


def normal(node: OpNode) -> Callable[[Tensor], Tensor]:
    """Fill with normal numbers."""
    mean, scale = node.get("mean", 0.0), node.get("scale", 1.0)
    return lambda x: x.normal_(mean, scale)


def uniform(node: OpNode) -> Callable[[Tensor], Tensor]:
    """Fill with numbers between two limits."""
    low, high = node.get("low", 0.0), node.get("high", 1.0)
    return lambda x: x.uniform_(low, high)


def like(draw: Draw) -> Callable[[OpNode], Kernel]:
    """Draw in the shape of the input, and in its type unless another one is asked for."""

    def lower(node: OpNode) -> Kernel:
        fill, kind = draw(node), node.get("dtype", 0)
        return lambda x: fill(torch.empty_like(x, dtype=torch_dtype(kind) if kind else x.dtype))

    return lower


def of_shape(draw: Draw) -> Callable[[OpNode], Kernel]:
    """Draw in a fixed shape."""

    def lower(node: OpNode) -> Kernel:
        fill, kind = draw(node), torch_dtype(node.get("dtype", 1))
        shape = tuple(node.attributes["shape"])
        return lambda: fill(torch.empty(shape, dtype=kind))

    return lower


DRAWN = {
    "RandomNormal": of_shape(normal),
    "RandomNormalLike": like(normal),
    "RandomUniform": of_shape(uniform),
    "RandomUniformLike": like(uniform),
}
