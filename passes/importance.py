"""How much a channel matters: one function per criterion, in the table at the bottom.

A criterion gives one score per index along a parameter's axis, shape ``(size,)``; the lowest
scores go first. To add one, write the function and put it in IMPORTANCES.
"""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import numpy as np
import onnx_ir as ir
from scipy.spatial.distance import cdist

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import constant
from onnxslim_kd.passes.groups import Analysis, Parameter

Scores = np.ndarray[Any, Any]


def weights(parameter: Parameter) -> Scores:
    """Return a weight as ``(size, rest)``, the parameter's axis first, dequantised.

    Raises:
        UserError: The parameter is computed by the graph, so that it has no numbers here.
    """
    array = constant(parameter.birth.value)
    if array is None:
        raise UserError(
            f"{parameter.name} is computed inside the graph and has no weights to score;"
            f" leave it out with --ignore or use --criterion random"
        )
    rows = np.moveaxis(array, parameter.axis, 0).reshape(parameter.birth.size, -1)
    return rows.astype(np.float64) * _scale(parameter)


def _scale(parameter: Parameter) -> Scores:
    """The quantisation scale along the parameter's axis, 1 for floats."""
    node = parameter.node
    scale = constant(node.inputs[1]) if node.op_type == "DequantizeLinear" else None
    if scale is None or scale.size not in (1, parameter.birth.size):
        return np.ones((1, 1))
    return scale.reshape(-1, 1).astype(np.float64)


def l1(analysis: Analysis, parameter: Parameter) -> Scores:
    """Sum of absolute weights (Li et al. 2017, Pruning Filters for Efficient ConvNets)."""
    return np.asarray(np.abs(weights(parameter)).sum(axis=1))


def l2(analysis: Analysis, parameter: Parameter) -> Scores:
    """Root of the sum of squared weights."""
    return np.asarray(np.sqrt(np.square(weights(parameter)).sum(axis=1)))


def geometric_median(analysis: Analysis, parameter: Parameter) -> Scores:
    """Sum of distances to all other filters (He et al. 2019, FPGM): redundant ones score low."""
    rows = weights(parameter)
    return np.asarray(cdist(rows, rows).sum(axis=1))


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
    found = []
    for node in value.consumers():
        if node.op_type in ("Identity", "Add", "DequantizeLinear", "Conv"):
            found += [n for n in node.outputs[0].consumers() if node.op_type != "Conv"]
        found.append(node)
    return found


def random(analysis: Analysis, parameter: Parameter) -> Scores:
    """Seeded noise, the same for the same parameter name."""
    seed = crc32(parameter.name.encode())
    return np.random.default_rng(seed).random(parameter.birth.size)


Criterion = Callable[[Analysis, Parameter], Scores]

IMPORTANCES: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "geometric-median": geometric_median,
    "bn-scale": bn_scale,
    "random": random,
}
