"""What is known, for all inputs, of the shapes and numbers in a graph and the bodies inside of it.

A branch that is never taken counts for nothing; an If whose condition is not known has the shapes
that both of its branches agree on.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd.access import bodies, extents_of
from onnxslim_kd.model import name_of
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.shape_families import RULES
from onnxslim_kd.passes.shape_rules import MOST, NUMBERS, WHOLE, Array, Known
from onnxslim_kd.passes.symbolic import Number


def known(model: ir.Model) -> Known:
    """Follow shapes and numbers through ``model``, whose shapes are inferred."""
    found = Known()
    for value in model.graph.inputs:
        shape = dims.read(value)
        if shape is not None:
            found.given.update(dim for dim in shape if isinstance(dim, str))
            found.shape[value] = tuple(map(found.named, shape))
    _walk(found, model.graph, dict(model.graph.opset_imports))
    return found


def branch_taken(found: Known, node: ir.Node) -> ir.Graph | None:
    """Return the branch that an If takes for every input; None where that is not known."""
    if node.op_type != "If" or node.domain or node.inputs[0] not in found.number:
        return None
    condition = found.number[node.inputs[0]].item()
    if not isinstance(condition, int):
        return None
    branch: ir.Graph = node.attributes["then_branch" if condition else "else_branch"].value
    return branch


def _walk(found: Known, graph: ir.Graph, versions: dict[str, int]) -> None:
    for value in graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():
            found.shape[value] = extents_of(value.const_value)
            _read_constant(found, value)
    for node in graph:
        taken = branch_taken(found, node)
        inside = bodies(node) if taken is None else [taken]
        for body in inside:
            _walk(found, body, versions)
        if node.op_type == "If" and not node.domain:
            _agree(found, node, inside)
        _follow(found, node, versions)


def _agree(found: Known, node: ir.Node, branches: Sequence[ir.Graph]) -> None:
    """Know of the outputs of an If what is known of the results of all its ``branches``."""
    for output, *results in zip(node.outputs, *(b.outputs for b in branches), strict=True):
        shapes = {found.shape.get(result) for result in results}
        shape = shapes.pop()
        if shape is not None and not shapes:
            found.shape[output] = shape
        if len(results) == 1 and results[0] in found.number:
            found.number[output] = found.number[results[0]]


def _read_constant(found: Known, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or value.dtype not in WHOLE:
        return
    shape = extents_of(tensor)
    if len(shape) <= 2 and prod(shape) <= MOST:
        found.number[value] = tensor.numpy().astype(object)


def _follow(found: Known, node: ir.Node, versions: dict[str, int]) -> None:
    if not node.domain and node.op_type in NUMBERS:
        array = _compute(found, node)
        if array is not None and array.ndim <= 2 and array.size <= MOST:
            found.number[node.outputs[0]] = array
            found.shape[node.outputs[0]] = array.shape
            return
    for value in node.outputs:
        stated = dims.read(value)
        if stated is not None and all(isinstance(d, int) or d in found.given for d in stated):
            found.shape[value] = tuple(map(found.named, stated))
    if node.outputs[0] in found.shape:
        return
    rule = RULES.get(node.op_type) if not node.domain else None
    shape = rule(found, node) if rule is not None else None
    if shape is not None:
        found.shape[node.outputs[0]] = shape
    else:
        _infer(found, node, versions)
        _trust_ranks(found, node)


def _trust_ranks(found: Known, node: ir.Node) -> None:
    """Take the plain numbers of what is stated where nothing else is known."""
    for value in node.outputs:
        stated = dims.read(value)
        if stated is not None and value not in found.shape:
            found.shape[value] = tuple(d if isinstance(d, int) else found.new() for d in stated)


def _compute(found: Known, node: ir.Node) -> Array | None:
    if node.op_type in ("Shape", "Size"):
        shape = found.shape.get(node.inputs[0]) if node.inputs[0] is not None else None
        if shape is None:
            return None
        inputs: list[Array] = [_array(shape)]
    elif any(value is None or value not in found.number for value in node.inputs):
        return None
    else:
        inputs = [found.number[value] for value in node.inputs if value is not None]
    try:
        return NUMBERS[node.op_type](node, inputs)
    except (ValueError, IndexError, TypeError):
        return None  # a symbol where a plain integer is needed, or a form of the operator not here


def _array(numbers: Sequence[Number]) -> Array:
    array = np.empty(len(numbers), object)
    array[:] = numbers
    return array


def _infer(found: Known, node: ir.Node, versions: dict[str, int]) -> None:
    """Ask ONNX for the shapes of one node's outputs, with symbols as names."""
    types, data = {}, {}
    if bodies(node):  # it would need what they read from outside
        return
    for value in node.inputs:
        if value is None:
            continue
        if value not in found.shape or value.dtype is None:
            return
        shape = [found.name(number) for number in found.shape[value]]
        types[name_of(value)] = onnx.helper.make_tensor_type_proto(int(value.dtype), shape)
        numbers = found.number.get(value)
        if numbers is not None and all(isinstance(n, int) for n in numbers.reshape(-1)):
            plain = numbers.astype(value.dtype.numpy())
            data[name_of(value)] = onnx.numpy_helper.from_array(plain)
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain),
            ir.serde.serialize_node(node),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in versions.items()],
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return  # a custom operator, or one that needs more than shapes: not known
    for value in node.outputs:
        proto = inferred.get(value.name or "")
        if proto is not None and proto.tensor_type.HasField("shape"):
            read = ir.serde.deserialize_type_proto_for_shape(proto)
            assert read is not None
            found.shape[value] = tuple(
                found.named(d if isinstance(d, int) else d.value) for d in read
            )
