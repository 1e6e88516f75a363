"""Normalisations and activations that exporters spell out, as one node of the model's opset.

1. ``(x - mean) / sqrt(mean((x - mean)^2) + e) [* scale] [+ bias]`` along the last axis is
   LayerNormalization (opset 17); without the mean it is RMSNormalization (23).
2. ``x * 0.5 * (1 + erf(x / sqrt 2))`` is Gelu (20), as is its form with tanh.
3. ``x * sigmoid(x)`` is Swish (24).
"""

import math

import numpy as np
import onnx_ir as ir

from onnxslim_kd.model import SMALL, constant, dims, has_rank, new_initializer
from onnxslim_kd.passes.patterns import made_by, replace
from onnxslim_kd.runtime import Array

_NEAR = 1e-4
"""Relative difference up to which a number is the one of the formula: exporters round."""


# --------------------------------------------------------------------- normalisations


def fuse_norm(div: ir.Node) -> bool:
    """Fuse a normalisation that ends with ``div``, and scale and bias behind it."""
    centred, root = div.inputs
    chain = _deviation(root, centred)
    if centred is None or not chain or centred.dtype != ir.DataType.FLOAT:
        return False
    epsilon = _number(chain[1].inputs[0], chain[1].inputs[1])
    mean = _mean_of_last(centred)
    kind, opset = ("LayerNormalization", 17) if mean else ("RMSNormalization", 23)
    if _opset(div) < opset or epsilon is None or not has_rank(centred):
        return False
    width = dims(centred)[-1] if dims(centred) else None
    if width is None:
        return False
    source = mean[0].inputs[0] if mean else centred
    return _write_norm(kind, source, epsilon, width, [div, *chain, *mean])


def _deviation(root: ir.Value | None, centred: ir.Value | None) -> list[ir.Node]:
    """The nodes of ``sqrt(mean(centred^2) + e)``, from last to first."""
    sqrt = made_by(root, "Sqrt")
    add = made_by(sqrt.inputs[0], "Add") if sqrt is not None else None
    if sqrt is None or add is None:
        return []
    for variance in add.inputs:
        mean = made_by(variance, "ReduceMean")
        square = made_by(mean.inputs[0], "Pow", "Mul") if mean is not None else None
        if mean is None or square is None or not _along_last(mean):
            continue
        base, factor = square.inputs
        twice = factor is base if square.op_type == "Mul" else _number(factor) == 2
        if base is centred and twice:
            return [sqrt, add, mean, square]
    return []


def _mean_of_last(centred: ir.Value) -> list[ir.Node]:
    """The nodes of ``x - mean(x)``, from last to first."""
    sub = made_by(centred, "Sub")
    mean = made_by(sub.inputs[1], "ReduceMean") if sub is not None else None
    if sub is None or mean is None or mean.inputs[0] is not sub.inputs[0]:
        return []
    return [sub, mean] if _along_last(mean) else []


def _along_last(mean: ir.Node) -> bool:
    axes = mean.attributes.get_ints("axes")
    if axes is None and len(mean.inputs) > 1 and (given := constant(mean.inputs[1])) is not None:
        axes = given.tolist()
    source = mean.inputs[0]
    if axes is None or len(axes) != 1 or mean.attributes.get_int("keepdims", 1) != 1:
        return False
    return axes[0] == -1 or (has_rank(source) and axes[0] == len(dims(source)) - 1)


def _write_norm(
    kind: str, source: ir.Value | None, epsilon: float, width: int, chain: list[ir.Node]
) -> bool:
    graph = chain[0].graph
    assert isinstance(graph, ir.Graph)
    scaled = _behind(chain[0], "Mul", width)
    if scaled is None and width * 4 > SMALL:
        return False  # ones would have to be written
    last = scaled[0] if scaled is not None else chain[0]
    shifted = _behind(last, "Add", width) if kind == "LayerNormalization" else None
    numbers = [np.ones(width, np.float32) if scaled is None else scaled[1]]
    found = [node for node, _ in filter(None, (shifted, scaled))]
    if shifted is not None:
        numbers.append(shifted[1])
    name = chain[0].name
    given = [
        new_initializer(graph, f"{name}.{part}", number)
        for part, number in zip(("scale", "bias"), numbers, strict=False)
    ]
    new = ir.node(kind, [source, *given], {"axis": -1, "epsilon": epsilon}, name=name)
    done = replace([*found, *chain], new)
    if not done:
        for value in given:
            del graph.initializers[value.name or ""]
    return done


def _behind(node: ir.Node, operator: str, width: int) -> tuple[ir.Node, Array] | None:
    """The only reader of ``node``, if it is an ``operator`` with one number for each entry."""
    users = tuple(node.outputs[0].uses())
    user, index = users[0] if len(users) == 1 else (None, 0)
    if user is None or user.op_type != operator or user.graph is not node.graph:
        return None
    number = constant(user.inputs[1 - index])
    if number is None or number.shape[-1:] not in ((width,), (1,), ()):
        return None
    if number.size not in (1, width) or number.ndim > len(dims(node.outputs[0])):
        return None
    return user, np.broadcast_to(number.reshape(-1).astype(np.float32), (width,)).copy()


# ------------------------------------------------------------------------ activations


def fuse_activation(mul: ir.Node) -> bool:
    """Fuse an activation that ends with ``mul``."""
    opset = _opset(mul)
    return (opset >= 24 and _swish(mul)) or (opset >= 20 and _gelu(mul))


def _swish(mul: ir.Node) -> bool:
    for x, gate in (mul.inputs, reversed(mul.inputs)):
        sigmoid = made_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return replace([mul, sigmoid], ir.node("Swish", [x], name=mul.name))
    return False


def _gelu(mul: ir.Node) -> bool:
    chain, factors = _factors(mul)
    half = [value for value in factors if _is(value, 0.5)]
    for value in factors:
        add = made_by(value, "Add")
        rest = [other for other in factors if other is not value and other not in half]
        if add is None or len(factors) != 3 or len(half) != 1 or len(rest) != 1:
            continue
        for curve, one in (add.inputs, reversed(add.inputs)):
            kind, match = ("none", _erf) if made_by(curve, "Erf") else ("tanh", _tanh)
            inner = match(curve, rest[0])
            if inner and _is(one, 1.0):
                new = ir.node("Gelu", rest, {"approximate": kind}, name=mul.name)
                return replace([*chain, add, *inner], new)
    return False


def _erf(curve: ir.Value | None, x: ir.Value | None) -> list[ir.Node]:
    """The nodes of ``erf(x / sqrt 2)``."""
    erf = made_by(curve, "Erf")
    scaled = made_by(erf.inputs[0], "Div", "Mul") if erf is not None else None
    if erf is None or scaled is None:
        return []
    if scaled.op_type == "Div":
        right = scaled.inputs[0] is x and _is(scaled.inputs[1], math.sqrt(2))
    else:
        right = x in scaled.inputs and any(_is(v, math.sqrt(0.5)) for v in scaled.inputs)
    return [erf, scaled] if right else []


def _tanh(curve: ir.Value | None, x: ir.Value | None) -> list[ir.Node]:
    """The nodes of ``tanh(sqrt(2 / pi) * (x + 0.044715 x^3))``."""
    tanh = made_by(curve, "Tanh")
    outer = made_by(tanh.inputs[0], "Mul") if tanh is not None else None
    if tanh is None or outer is None:
        return []
    for sum_, factor in (outer.inputs, reversed(outer.inputs)):
        add = made_by(sum_, "Add")
        if add is None or not _is(factor, math.sqrt(2 / math.pi)) or x not in add.inputs:
            continue
        term = made_by(add.inputs[1 if add.inputs[0] is x else 0], "Mul")
        if term is None:
            continue
        for power, weight in (term.inputs, reversed(term.inputs)):
            cube = made_by(power, "Pow")
            if cube is not None and cube.inputs[0] is x and _is(cube.inputs[1], 3.0):
                return [tanh, outer, add, term, cube] if _is(weight, 0.044715) else []
    return []


def _factors(mul: ir.Node) -> tuple[list[ir.Node], list[ir.Value | None]]:
    """The products that end with ``mul``, one inside of it too, and what they multiply."""
    for index, value in enumerate(mul.inputs):
        inner = made_by(value, "Mul")
        if inner is not None and len(inner.outputs[0].uses()) == 1:
            return [mul, inner], [*inner.inputs, mul.inputs[1 - index]]
    return [mul], list(mul.inputs)


def _is(value: ir.Value | None, wanted: float) -> bool:
    number = _number(value)
    return number is not None and math.isclose(number, wanted, rel_tol=_NEAR)


def _number(*values: ir.Value | None) -> float | None:
    """The first single constant number among ``values``."""
    for value in values:
        array = constant(value)
        if array is not None and array.size == 1 and array.dtype.kind in "fi":
            return float(array.item())
    return None


def _opset(node: ir.Node) -> int:
    graph = node.graph
    return graph.opset_imports.get("", 0) if isinstance(graph, ir.Graph) else 0
