"""How much a channel matters: one function per criterion, in the tables at the bottom.

A criterion gives one score per index along a parameter's axis, shape ``(size,)``; the lowest
scores go first. To add one, write the function and put it in IMPORTANCES, or, if it looks at all
parameters of a model at once, give one score per component and put it in OVERALL.
"""

import math
from collections.abc import Callable
from typing import Any
from zlib import crc32

import numpy as np
import onnx_ir as ir

from onnxslim_kd import contrib
from onnxslim_kd.errors import UserError
from onnxslim_kd.model import constant
from onnxslim_kd.passes.channels import Birth
from onnxslim_kd.passes.groups import Analysis, Parameter

Scores = np.ndarray[Any, Any]
PART = 1 << 16
"""Elements of a weight that are looked at together."""


def weights(parameter: Parameter) -> Scores:
    """Return a weight as ``(size, rest)``, the parameter's axis first, dequantised.

    Raises:
        UserError: The parameter is computed by the graph, so that it has no numbers here.
    """
    found = rows(parameter.birth)
    if found is None:
        raise _computed(parameter)
    return found


def _computed(parameter: Parameter) -> UserError:
    return UserError(
        f"{parameter.name} is computed inside the graph and has no weights to score;"
        f" leave it out with --ignore or use --criterion random"
    )


def rows(birth: Birth) -> Scores | None:
    """A weight as ``(size, rest)``; None where the graph computes it."""
    array = _numbers(birth)
    if array is None:
        return None
    lines = np.moveaxis(array, birth.axis, 0).reshape(birth.size, -1)
    return np.asarray(lines.astype(np.float64) * _scale(birth))


def _numbers(birth: Birth) -> Scores | None:
    if birth.node.op_type == "MatMulNBits" and birth.operand == 1:
        return contrib.dequantised(birth.node)
    if birth.operand == 0 and birth.node.attributes.get_int("block_size", 0) > 0:
        return _by_blocks(birth.node)
    return constant(birth.value)


def _by_blocks(node: ir.Node) -> Scores | None:
    """A weight of which every block along one axis has a scale, as DequantizeLinear gives it."""
    codes, scales = constant(node.inputs[0]), constant(node.inputs[1])
    zeros = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if codes is None or scales is None:
        return None
    axis, size = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 1)
    block, numbers = np.arange(codes.shape[axis]) // size, codes.astype(np.float64)
    if zeros is not None:
        numbers -= np.take(zeros.astype(np.float64), block, axis)
    return np.asarray(numbers * np.take(scales.astype(np.float64), block, axis))


def _scale(birth: Birth) -> Scores:
    """The quantisation scale along an axis of a weight, 1 for floats."""
    node = birth.node
    scale = constant(node.inputs[1]) if node.op_type == "DequantizeLinear" else None
    if scale is None or scale.size not in (1, birth.size):
        return np.ones((1, 1))
    return scale.reshape(-1, 1).astype(np.float64)


def l1(analysis: Analysis, parameter: Parameter) -> Scores:
    """Sum of absolute weights (Li et al. 2017, Pruning Filters for Efficient ConvNets)."""
    array = _numbers(parameter.birth)
    if array is None:
        raise _computed(parameter)
    with np.errstate(over="ignore"):  # what is too large for a float is important
        sums = _absolute_sums(array, parameter.axis)
    return np.asarray(sums * np.abs(_scale(parameter.birth)).ravel())


def _absolute_sums(array: Scores, axis: int) -> Scores:
    """Sums of magnitudes along ``axis``, a part at a time so that it stays in the cache.

    Inside of a part floats are added as such, pairwise; between parts in double precision.
    """
    if array.dtype.kind != "f":
        array = array.astype(np.float64)  # the magnitude of int8's -128 is no int8
    kind = np.promote_types(array.dtype, np.float32)
    sums = np.zeros(array.shape[axis])
    if axis == 0:
        rows = array.reshape(len(array), -1)
        step = max(1, PART // max(1, rows.shape[1]))
        for i in range(0, len(rows), step):
            sums[i : i + step] = np.abs(rows[i : i + step]).sum(axis=1, dtype=kind)
        return sums
    blocks = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
    step = max(1, PART // max(1, blocks[0].size))
    for i in range(0, len(blocks), step):
        part = np.abs(blocks[i : i + step]).sum(axis=0, dtype=kind)
        sums += part[:, 0] if part.shape[1] == 1 else part.sum(axis=1, dtype=np.float64)
    return sums


def l2(analysis: Analysis, parameter: Parameter) -> Scores:
    """Root of the sum of squared weights."""
    return np.asarray(np.sqrt(np.square(weights(parameter)).sum(axis=1)))


def lamp(analysis: Analysis, parameter: Parameter) -> Scores:
    """Squared norm over that of all filters at least as large (Lee et al. 2021, LAMP).

    The order inside of a layer is that of l2; between layers the scores are comparable.
    """
    squares = np.square(weights(parameter)).sum(axis=1)
    order = np.argsort(squares, kind="stable")
    left = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty(len(squares))
    scores[order] = squares[order] / np.where(left > 0, left, 1.0)
    return scores


def geometric_median(analysis: Analysis, parameter: Parameter) -> Scores:
    """Sum of distances to all other filters (He et al. 2019, FPGM): redundant ones score low."""
    from scipy.spatial.distance import cdist  # slow to import, and few ask for it

    found = weights(parameter)
    return np.asarray(cdist(found, found).sum(axis=1))


def bn_scale(analysis: Analysis, parameter: Parameter) -> Scores:
    """Absolute scale of the BatchNormalization behind the layer (Liu et al. 2017, Slimming).

    Raises:
        UserError: No BatchNormalization reads the layer's output.
    """
    if parameter.node.op_type == "BatchNormalization":
        return np.asarray(np.abs(weights(parameter)).sum(axis=1))
    for consumer in _consumers(parameter.node.outputs[0]):
        if consumer.op_type == "BatchNormalization":
            gamma = constant(consumer.inputs[1])
            if gamma is not None and gamma.size == parameter.birth.size:
                return np.asarray(np.abs(gamma.astype(np.float64)))
    raise UserError(
        f"criterion bn-scale: no BatchNormalization follows {parameter.name}; it may be folded"
        f" into the layer: use --criterion l1"
    )


def _consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, looking through a bias Add and Identity."""
    found = list(value.consumers())
    for node in value.consumers():
        if node.op_type in ("Identity", "Add"):
            found += node.outputs[0].consumers()
    return found


def random(analysis: Analysis, parameter: Parameter) -> Scores:
    """Seeded noise, the same for the same parameter name."""
    seed = crc32(parameter.name.encode())
    return np.random.default_rng(seed).random(parameter.birth.size)


def group_l2(analysis: Analysis) -> Scores:
    """Root of the sum of squared weights of everything that goes with a channel.

    The filters that make it, the inputs of the layers that read it and the scale of its norms, but
    no bias: Torch-Pruning's GroupMagnitudeImportance.
    """
    total = np.zeros(analysis.components.count)
    for birth in analysis.births:
        is_vector = len(analysis.shapes.shape[birth.value]) == 1
        found = rows(birth) if birth.operand is not None else None
        if found is None or (is_vector and (birth.node.op_type, birth.operand) not in SCALES):
            continue
        np.add.at(total, analysis.labels(birth), np.square(found).sum(axis=1))
    return np.sqrt(total)


# ---------------------------------------------------------------------------- tables

Criterion = Callable[[Analysis, Parameter], Scores]
Overall = Callable[[Analysis], Scores]

SCALES = {("BatchNormalization", 1), ("LayerNormalization", 1)}
"""The vectors that are scales: (operator, input)."""

IMPORTANCES: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "lamp": lamp,
    "geometric-median": geometric_median,
    "bn-scale": bn_scale,
    "random": random,
}
OVERALL: dict[str, Overall] = {"group-l2": group_l2}
