"""Small patterns that exporters and opset conversion leave behind, written as one node."""

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import graphs
from onnxslim_kd.model import constant, dims, has_rank, new_initializer
from onnxslim_kd.runtime import Array


def merge_slices(model: ir.Model) -> int:
    """Write two Slices in a row as one; return how many were merged.

    ``Slice(Slice(x, axes A), axes B)`` with constant numbers and no axis in both is
    ``Slice(x, axes A + B)``.
    """
    merged = 0
    for graph in graphs(model):
        for node in list(graph):
            first = (
                node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] else None
            )
            if first is None or first.op_type != "Slice" or not _is_private(first.outputs[0]):
                continue
            one, two = _slice_numbers(first), _slice_numbers(node)
            if one is None or two is None or set(one[2]) & set(two[2]) or first.graph is not graph:
                continue
            for index, parts in enumerate(zip(one, two, strict=True)):
                joined = np.concatenate(parts)
                name = f"{node.name}.{('starts', 'ends', 'axes', 'steps')[index]}"
                node.resize_inputs(max(len(node.inputs), index + 2))
                node.replace_input_with(index + 1, new_initializer(graph, name, joined))
            node.replace_input_with(0, first.inputs[0])
            graph.remove(first, safe=True)
            merged += 1
    return merged


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
    found = 0
    for node in list(model.graph):
        softmax = (
            node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] else None
        )
        flatten = (
            softmax.inputs[0].producer() if softmax is not None and softmax.inputs[0] else None
        )
        if softmax is None or flatten is None or flatten.op_type != "Flatten":
            continue
        source, axis = flatten.inputs[0], flatten.attributes.get_int("axis", 1)
        if softmax.op_type not in ("Softmax", "LogSoftmax") or not has_rank(source):
            continue
        shape = dims(source)
        last = softmax.attributes.get_int("axis", -1) in (-1, 1)
        alone = _is_private(softmax.outputs[0]) and _is_private(flatten.outputs[0])
        if (
            last
            and alone
            and axis >= 0
            and set(shape[axis + 1 :]) <= {1}
            and _restores(node, source)
        ):
            softmax.replace_input_with(0, source)
            softmax.attributes["axis"] = ir.AttrInt64("axis", axis)
            output, name = node.outputs[0], node.outputs[0].name
            softmax.outputs[0].shape = output.shape
            output.replace_all_uses_with(softmax.outputs[0], replace_graph_outputs=True)
            model.graph.remove([flatten, node], safe=True)
            softmax.outputs[0].name = name
            found += 1
    return found


def _restores(reshape: ir.Node, source: ir.Value | None) -> bool:
    """Whether ``reshape`` gives the shape of ``source``."""
    target = reshape.inputs[1]
    producer = target.producer() if target is not None else None
    if producer is not None and producer.op_type == "Shape" and not producer.attributes:
        return producer.inputs[0] is source
    numbers = constant(target)
    return numbers is not None and tuple(numbers.tolist()) == dims(source)


def _is_private(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def fuse_hard_swish(model: ir.Model) -> int:
    """Write ``x * hard sigmoid(x)``, which exporters spell out, as HardSwish; return how many.

    1. ``Mul(x, HardSigmoid(x))`` with alpha 1/6 and beta 0.5,
    2. ``Div(Mul(x, Clip(Add(x, 3), 0, 6)), 6)``.
    """
    fused = 0
    for graph in graphs(model):
        for node in list(graph):
            chain = _by_hard_sigmoid(node) or _by_clip(node)
            if not chain or any(not _is_private(inner.outputs[0]) for inner in chain[1:]):
                continue
            first, output = chain[-1], node.outputs[0]
            swish = ir.node("HardSwish", [first.inputs[0]], name=node.name)
            new = swish.outputs[0]
            new.shape, new.type = output.shape, output.type
            graph.insert_before(node, swish)
            output.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(chain, safe=True)
            new.name = output.name
            fused += 1
    return fused


def _by_hard_sigmoid(node: ir.Node) -> list[ir.Node]:
    for x, gate in _both_ways(node, "Mul"):
        sigmoid = _made_by(gate, "HardSigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            alpha = sigmoid.attributes.get_float("alpha", 0.2)
            beta = sigmoid.attributes.get_float("beta", 0.5)
            if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
                return [node, sigmoid]
    return []


def _by_clip(node: ir.Node) -> list[ir.Node]:
    product = _made_by(node.inputs[0], "Mul") if node.op_type == "Div" else None
    if product is None or not _is_number(node.inputs[1], 6):
        return []
    for x, gate in _both_ways(product, "Mul"):
        clip = _made_by(gate, "Clip")
        bounds = clip.inputs[1:3] if clip is not None else ()
        if clip is None or len(bounds) < 2:
            continue
        added = _made_by(clip.inputs[0], "Add")
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


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _is_number(value: ir.Value | None, wanted: float) -> bool:
    array = constant(value)
    if array is None or array.dtype.kind != "f" or array.size != 1 or array.ndim > 1:
        return False
    return bool(array.item() == wanted)
