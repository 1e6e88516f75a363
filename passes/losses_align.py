"""Make a student's value as large as its teacher's, and pooling with any sizes."""

from collections.abc import Sequence
from math import prod
from typing import Annotated, TypeAlias

import numpy as np
import onnx_ir as ir
from pydantic import AfterValidator

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import dims
from onnxslim_kd.passes.scope import Scope, shown, static


def _known_ways(text: str) -> str:
    if not set(text.split("+")) <= WAYS.keys():
        raise ValueError(f"it is one of {', '.join(WAYS)}, or two joined by +, as conv+pool")
    return text


LARGEST = 2**27
"""Weights of a trained layer; more were never meant (512 MiB, and as much for each moment)."""
Align: TypeAlias = Annotated[str, AfterValidator(_known_ways)]
"""One of `WAYS`, or several joined by ``+``: one for the channels, one for the map's size."""


def aligned(scope: Scope, student: ir.Value, teacher: ir.Value, how: str | None) -> ir.Value:
    """Bring ``student`` to the size of ``teacher`` as the ``align`` option says.

    ``conv``: a trained 1x1 convolution to the teacher's channels; ``linear``: a trained matrix on
    the last axis; ``pool``: adaptive average pooling to the teacher's map; ``resize``: linear
    interpolation to it.

    Raises:
        UserError: The value has no such axis.
    """
    for way in how.split("+") if how else ():
        student = WAYS[way](scope, student, teacher)
    return student


def conv_align(scope: Scope, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """Add a trained 1x1 convolution to the teacher's channels (Kaiming, fan out)."""
    _check_maps("conv", student, teacher)
    channels = static(student, 1, "align=conv"), static(teacher, 1, "align=conv")
    return convolution(scope, student, "align", channels, kernel=1)


def _check_maps(way: str, student: ir.Value, teacher: ir.Value) -> None:
    if len(dims(student)) < 3 or len(dims(student)) != len(dims(teacher)):
        raise UserError(
            f"align={way} needs maps of equal rank, {shown(student)} is {student.shape} and"
            f" {shown(teacher)} is {teacher.shape}; try align=linear, on the last axis"
        )


def channels_like(scope: Scope, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """Return ``student`` with the teacher's channels: as it is, or through `conv_align`."""
    if dims(student)[1] is not None and dims(student)[1] == dims(teacher)[1]:
        return student
    return conv_align(scope, student, teacher)


def convolution(
    scope: Scope, x: ir.Value, name: str, channels: tuple[int, int], *, kernel: int
) -> ir.Value:
    """Add a trained convolution that keeps the map's size, with a bias."""
    spatial = [kernel] * (len(dims(x)) - 2)
    _check_size(scope, (channels[1], channels[0], *spatial))
    deviation = np.sqrt(2 / (channels[1] * np.prod(spatial)))
    start = scope.random.standard_normal((channels[1], channels[0], *spatial)) * deviation
    weight = scope.parameter(f"{name}.weight", start)
    bias = scope.parameter(f"{name}.bias", np.zeros(channels[1]))
    pads = [kernel // 2] * (2 * len(spatial))
    return scope.op("Conv", x, weight, bias, kernel_shape=spatial, pads=pads)


def linear_align(scope: Scope, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """Add a trained matrix and bias on the last axis."""
    sizes = static(student, -1, "align=linear"), static(teacher, -1, "align=linear")
    return linear(scope, student, "align", sizes)


def linear(scope: Scope, x: ir.Value, name: str, sizes: tuple[int, int]) -> ir.Value:
    """Add a trained matrix [in, out] and bias on the last axis (Xavier)."""
    _check_size(scope, sizes)
    bound = np.sqrt(6 / sum(sizes))
    weight = scope.parameter(f"{name}.weight", scope.random.uniform(-bound, bound, sizes))
    bias = scope.parameter(f"{name}.bias", np.zeros(sizes[1]))
    return scope.op("Add", scope.op("MatMul", x, weight), bias)


def _check_size(scope: Scope, shape: Sequence[int]) -> None:
    if prod(shape) > LARGEST:
        sides = " x ".join(map(str, shape))
        raise UserError(
            f"loss {scope.name} would train a layer of {sides} weights; give it values of fewer"
            f" channels, or without their map (pefd: mode=gap)"
        )


def pool_align(scope: Scope, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """Pool the student's map to the size of the teacher's."""
    _check_maps("pool", student, teacher)
    sizes = [static(teacher, axis, "align=pool") for axis in range(2, len(dims(teacher)))]
    return adaptive_pool(scope, student, sizes)


def adaptive_pool(scope: Scope, x: ir.Value, sizes: list[int]) -> ir.Value:
    """Average over ``sizes`` cells of each spatial axis; they overlap where it does not divide.

    Cell i of n over m positions covers floor(i m / n) to ceil((i + 1) m / n).
    """
    if all(size == 1 for size in sizes):
        return scope.op("GlobalAveragePool", x)
    have = [static(x, axis, "pooling") for axis in range(2, len(dims(x)))]
    if have == sizes:
        return x
    if all(h % s == 0 for h, s in zip(have, sizes, strict=True)):
        step = [h // s for h, s in zip(have, sizes, strict=True)]
        return scope.op("AveragePool", x, kernel_shape=step, strides=step)
    for axis, (h, s) in enumerate(zip(have, sizes, strict=True), start=2):
        x = _pool_axis(scope, x, axis, _cells(h, s))
    return x


def _pool_axis(scope: Scope, x: ir.Value, axis: int, cells: list[range]) -> ir.Value:
    """Average ``cells`` of positions along ``axis``: gather, weigh, add.

    A matrix would do, but would look like a weight to train.
    """
    longest = max(map(len, cells))
    places = np.array([[cell[i % len(cell)] for i in range(longest)] for cell in cells])
    gathered = scope.op("Gather", x, places, axis=axis)
    if len(set(map(len, cells))) == 1:
        return scope.mean(gathered, [axis + 1])
    shares = np.array([[(i < len(cell)) / len(cell) for i in range(longest)] for cell in cells])
    shares = shares.astype(np.float32).reshape(*shares.shape, *[1] * (len(dims(x)) - axis - 1))
    return scope.sum(scope.op("Mul", gathered, shares), [axis + 1])


def _cells(have: int, want: int) -> list[range]:
    return [range(i * have // want, -(-(i + 1) * have // want)) for i in range(want)]


def resize_align(scope: Scope, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """Interpolate the student's map to the size of the teacher's, which may be dynamic."""
    _check_maps("resize", student, teacher)
    sizes = scope.op("Concat", scope.shape(student, 0, 2), scope.shape(teacher, 2), axis=0)
    resized = scope.op("Resize", student, None, None, sizes, mode="linear")
    assert student.shape is not None and teacher.shape is not None
    resized.shape = ir.Shape([*student.shape[:2], *teacher.shape[2:]])
    return resized


WAYS = {"conv": conv_align, "linear": linear_align, "pool": pool_align, "resize": resize_align}
