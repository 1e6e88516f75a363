"""Write what is known of shapes into the graph, so that it need not be computed.

1. A number that no dynamic dimension enters becomes a constant.
2. ``Reshape(x, computed)`` becomes ``Reshape(x, [0, -1, 64])``, and Expand in the same way.
3. Reshape, Expand and Slice that give what they take are gone.
4. Numbers that are equal for all inputs are computed once, where they come first.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd.access import extents_of
from onnxslim_kd.model import name_of, new_initializer
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.shape_families import RULES
from onnxslim_kd.passes.shape_rules import MOST, NUMBERS, WHOLE, Array, Known, Shape
from onnxslim_kd.passes.symbolic import Number


def fold_known(model: ir.Model) -> int:
    """Fold what is known of shapes; return how many values changed."""
    found = known(model)
    changed = 0
    first: dict[tuple[object, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.domain or not node.outputs:
            continue
        changed += _skip(found, node) or _set_target(found, model.graph, node)
        changed += _replace(found, model.graph, node, first)
    _write_shapes(model.graph, found)
    return changed


def _skip(found: Known, node: ir.Node) -> bool:
    """Remove a node that gives what it takes."""
    output = node.outputs[0]
    source = node.inputs[0] if node.op_type in ("Reshape", "Expand", "Slice") else None
    if source is None or output.is_graph_output() or found.shape.get(source) is None:
        return False
    if found.shape[source] != found.shape.get(output) or not output.uses():
        return False
    if node.op_type == "Slice" and len(node.inputs) > 4 and node.inputs[4] is not None:
        steps = found.number.get(node.inputs[4])
        if steps is None or any(step != 1 for step in steps):
            return False
    output.replace_all_uses_with(source)
    return True


def _set_target(found: Known, graph: ir.Graph, node: ir.Node) -> bool:
    """Give Reshape or Expand a constant target where its meaning does not depend on numbers."""
    if node.op_type not in ("Reshape", "Expand") or node.attributes.get_int("allowzero", 0) == 1:
        return False
    target = node.inputs[1]
    source, after = found.shape_of(node, 0), found.shape.get(node.outputs[0])
    if target is None or target.producer() is None or source is None or after is None:
        return False
    make = _reshape_target if node.op_type == "Reshape" else _expand_target
    numbers = make(source, after)
    if numbers is None:
        return False
    array = np.array(numbers, np.int64)
    node.replace_input_with(1, new_initializer(graph, f"{node.name}.target", array))
    return True


def _reshape_target(source: Shape, after: Shape) -> list[int] | None:
    """Plain numbers, 0 for "as before", and -1 once."""
    target = [
        n if isinstance(n, int) else 0 if i < len(source) and source[i] == n else -1
        for i, n in enumerate(after)
    ]
    return None if target.count(-1) > 1 or 0 in after else target


def _expand_target(source: Shape, after: Shape) -> list[int] | None:
    before = (1,) * (len(after) - len(source)) + source
    target = [1 if a == b else b for a, b in zip(before, after, strict=True)]
    plain = [n for n in target if isinstance(n, int)]
    return plain if len(plain) == len(target) else None


def _replace(
    found: Known, graph: ir.Graph, node: ir.Node, first: dict[tuple[object, ...], ir.Value]
) -> bool:
    """Use a constant, or the first value with the same numbers, instead of the node's output."""
    output = node.outputs[0]
    numbers = found.number.get(output)
    if numbers is None or output.is_graph_output() or not output.uses() or output.dtype is None:
        return False
    flat: Sequence[Number] = numbers.reshape(-1).tolist()
    if all(isinstance(n, int) for n in flat):
        array = numbers.astype(output.dtype.numpy())
        output.replace_all_uses_with(new_initializer(graph, f"{output.name}.known", array))
        return True
    twin = first.setdefault((output.dtype, numbers.shape, *flat), output)
    if twin is not output:
        output.replace_all_uses_with(twin)
    return twin is not output


def _write_shapes(graph: ir.Graph, found: Known) -> None:
    """Note the plain numbers in shapes, where ONNX's own inference did not see them."""
    for node in graph:
        for value in node.outputs:
            shape = found.shape.get(value)
            if shape is None or value.is_graph_output() or value.dtype is None:
                continue
            before = value.shape
            if before is None or len(before) != len(shape):
                before = ir.Shape([None] * len(shape))
            pairs = list(zip(shape, before, strict=True))
            if any(isinstance(number, int) and number != dim for number, dim in pairs):
                value.shape = ir.Shape([n if isinstance(n, int) else dim for n, dim in pairs])


# -------------------------------------------------------------------- what is known


def known(model: ir.Model) -> Known:
    """Follow shapes and numbers through the main graph of ``model``, whose shapes are inferred."""
    found = Known()
    for value in model.graph.inputs:
        shape = dims.read(value)
        if shape is not None:
            found.given.update(dim for dim in shape if isinstance(dim, str))
            found.shape[value] = tuple(map(found.named, shape))
    for value in model.graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():
            found.shape[value] = extents_of(value.const_value)
            _read_constant(found, value)
    versions = dict(model.graph.opset_imports)
    for node in model.graph:
        _follow(found, node, versions)
    return found


def _read_constant(found: Known, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or value.dtype not in WHOLE:
        return
    shape = extents_of(tensor)
    if len(shape) <= 1 and prod(shape) <= MOST:
        found.number[value] = tensor.numpy().astype(object)


def _follow(found: Known, node: ir.Node, versions: dict[str, int]) -> None:
    if not node.domain and node.op_type in NUMBERS:
        array = _compute(found, node)
        if array is not None and array.ndim <= 1 and array.size <= MOST:
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
