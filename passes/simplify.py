"""Small patterns that exporters and opset conversion leave behind, written as one node."""

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import graphs
from onnxslim_kd.model import constant, dims, has_rank, new_initializer
from onnxslim_kd.passes.patterns import before, made_by, replace, skip
from onnxslim_kd.runtime import Array

PARTS = ("starts", "ends", "axes", "steps")


def merge_slices(model: ir.Model) -> int:
    """Write two Slices in a row as one; return how many were merged.

    ``Slice(Slice(x, axes A), axes B)`` with constant numbers and no axis in both is
    ``Slice(x, axes A + B)``.
    """
    slices = (n for g in graphs(model) for n in list(g) if n.op_type == "Slice" and not n.domain)
    return sum(map(_merge_slice, slices))


def _merge_slice(node: ir.Node) -> bool:
    first = before(node, 0, "Slice")
    one, two = (None if n is None else _slice_numbers(n) for n in (first, node))
    if first is None or one is None or two is None or set(one[2]) & set(two[2]):
        return False
    assert isinstance(node.graph, ir.Graph)
    node.resize_inputs(1 + len(PARTS))
    for index, parts in enumerate(zip(one, two, strict=True)):
        joined = new_initializer(node.graph, f"{node.name}.{PARTS[index]}", np.concatenate(parts))
        node.replace_input_with(index + 1, joined)
    return skip(node, first)


def _slice_numbers(node: ir.Node) -> tuple[Array, Array, Array, Array] | None:
    """Starts, ends, axes and steps, or None when one is computed or an axis counts from the end."""
    given = [constant(value) for value in node.inputs[1:]]
    if len(given) < 2 or any(
        number is None and value is not None
        for number, value in zip(given, node.inputs[1:], strict=True)
    ):
        return None
    starts, ends = (np.asarray(number, np.int64) for number in given[:2])
    axes = given[2] if len(given) > 2 and given[2] is not None else np.arange(starts.size)
    steps = given[3] if len(given) > 3 and given[3] is not None else np.ones(starts.size)
    if np.any(axes < 0):
        return None
    return starts, ends, axes.astype(np.int64), steps.astype(np.int64)


def unflatten_softmax(model: ir.Model) -> int:
    """Write the opset 12 form of softmax as one node where it is one; return how many were.

    ``Reshape(Softmax(Flatten(x, axis), -1), shape of x)`` is ``Softmax(x, axis)`` when all
    dimensions of x behind ``axis`` are 1. Opset conversion writes the left side.
    """
    reshapes = (n for n in list(model.graph) if n.op_type == "Reshape" and not n.domain)
    return sum(map(_unflatten, reshapes))


def _unflatten(reshape: ir.Node) -> bool:
    softmax = made_by(reshape.inputs[0], "Softmax", "LogSoftmax")
    flatten = made_by(softmax.inputs[0], "Flatten") if softmax is not None else None
    if softmax is None or flatten is None or not has_rank(flatten.inputs[0]):
        return False
    source, axis = flatten.inputs[0], flatten.attributes.get_int("axis", 1)
    if softmax.attributes.get_int("axis", -1) not in (-1, 1) or axis < 0:
        return False
    if not set(dims(source)[axis + 1 :]) <= {1} or not _restores(reshape, source):
        return False
    new = ir.node(softmax.op_type, [source], {"axis": axis}, name=softmax.name)
    return replace([reshape, softmax, flatten], new)


def _restores(reshape: ir.Node, source: ir.Value | None) -> bool:
    """Whether ``reshape`` gives the shape of ``source``."""
    target = reshape.inputs[1]
    producer = target.producer() if target is not None else None
    if producer is not None and producer.op_type == "Shape" and not producer.attributes:
        return producer.inputs[0] is source
    numbers = constant(target)
    return numbers is not None and tuple(numbers.tolist()) == dims(source)


def fuse_hard_swish(model: ir.Model) -> int:
    """Write ``x * hard sigmoid(x)``, which exporters spell out, as HardSwish; return how many.

    1. ``Mul(x, HardSigmoid(x))`` with alpha 1/6 and beta 0.5,
    2. ``Div(Mul(x, Clip(Add(x, 3), 0, 6)), 6)``.
    """
    return sum(_hard_swish(node) for graph in graphs(model) for node in list(graph))


def _hard_swish(node: ir.Node) -> bool:
    chain = _by_hard_sigmoid(node) or _by_clip(node)
    source = chain[-1].inputs[0] if chain else None
    return bool(chain) and replace(chain, ir.node("HardSwish", [source], name=node.name))


def _by_hard_sigmoid(node: ir.Node) -> list[ir.Node]:
    for x, gate in _both_ways(node, "Mul"):
        sigmoid = made_by(gate, "HardSigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            alpha = sigmoid.attributes.get_float("alpha", 0.2)
            beta = sigmoid.attributes.get_float("beta", 0.5)
            if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
                return [node, sigmoid]
    return []


def _by_clip(node: ir.Node) -> list[ir.Node]:
    product = made_by(node.inputs[0], "Mul") if node.op_type == "Div" else None
    if product is None or not _is_number(node.inputs[1], 6):
        return []
    for x, gate in _both_ways(product, "Mul"):
        clip = made_by(gate, "Clip")
        bounds = clip.inputs[1:3] if clip is not None else ()
        if clip is None or len(bounds) < 2:
            continue
        added = made_by(clip.inputs[0], "Add")
        if added is None or not (_is_number(bounds[0], 0) and _is_number(bounds[1], 6)):
            continue
        if added.inputs[0] is x and _is_number(added.inputs[1], 3):
            return [node, product, clip, added]
    return []


def _both_ways(node: ir.Node, operator: str) -> list[tuple[ir.Value | None, ir.Value | None]]:
    if node.op_type != operator:
        return []
    one, two = node.inputs
    return [(one, two), (two, one)]


def _is_number(value: ir.Value | None, wanted: float) -> bool:
    array = constant(value)
    if array is None or array.dtype.kind != "f" or array.size != 1 or array.ndim > 1:
        return False
    return bool(array.item() == wanted)
