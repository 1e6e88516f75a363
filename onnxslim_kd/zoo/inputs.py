"""What an exported module is fed: sizes, types, and which axes stay open."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from onnxslim_kd.errors import UserError


@dataclass(frozen=True)
class Input:
    """One input: its shape while exporting, and which axes may have any size afterwards."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    dynamic: tuple[int, ...] = (0,)

    @classmethod
    def parse(cls, text: str) -> "Input":
        """Read ``1x3x224x224`` or ``1x77:int64``.

        The first axis is dynamic; ``1?x3x224?x224?`` marks others, ``1!x3x224x224`` fixes all.

        Raises:
            UserError: The text has another form.
        """
        sizes, _, dtype = text.partition(":")
        found = [re.fullmatch(r"([1-9]\d*)([?!]?)", size) for size in sizes.split("x")]
        dims = [match.groups() for match in found if match is not None]
        if len(dims) < len(found):
            raise UserError(f"{text!r} is no shape; write it like 1x3x224x224 or 1x77:int64")
        dynamic = tuple(axis for axis, (_, mark) in enumerate(dims) if mark == "?")
        if not any(mark for _, mark in dims):
            dynamic = (0,)
        return cls(tuple(int(size) for size, _ in dims), dtype or "float32", dynamic)

    def tensor(self, *, grow: bool = False) -> Tensor:
        """Make noise of this shape, or of one that differs along the dynamic axes."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not hasattr(np, self.dtype):
            raise UserError(
                f"{self.dtype!r} is no type that torch and NumPy share; try float32 or int64"
            )
        shape = list(self.shape)
        for axis in self.dynamic if grow else ():
            shape[axis] = shape[axis] + 1 if axis == 0 else shape[axis] * 2
        if dtype.is_floating_point:
            return torch.randn(shape).to(dtype)
        return torch.randint(0, 2, shape).to(dtype)


def in_order(module: nn.Module, inputs: Mapping[str, Input]) -> list[str]:
    """Order the inputs as ``forward`` does: the exporter names them by position."""
    known = list(inspect.signature(module.forward).parameters)
    if all(name in known for name in inputs):
        return sorted(inputs, key=known.index)
    return list(inputs)


@contextmanager
def positional(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Let ``forward`` take these inputs in this order and return a flat tuple of tensors."""
    forward = module.forward
    by_name = set(names) <= set(inspect.signature(forward).parameters)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        result = forward(**given) if by_name else forward(*tensors)
        return tuple(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))

    module.forward = flat  # a wrapping module would change the names of the parameters
    try:
        yield
    finally:
        del module.forward


def axis_name(name: str, axis: int) -> str:
    """Name a dynamic axis."""
    return "batch" if axis == 0 else f"{name}_{axis}"
