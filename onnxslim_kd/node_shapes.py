"""The shapes of one node's outputs, from those of its inputs, under one sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import onnx
import onnx_ir as ir

from onnxslim_kd import contrib
from onnxslim_kd.folding import Array
from onnxslim_kd.inference import extents
from onnxslim_kd.model import name_of
from onnxslim_kd.passes.shape_families import RULES

Shape = tuple[int, ...]
_LIKE_INPUT = ("GroupNormalization", "RMSNormalization", "Swish")
"""Operators that ONNX defines by a function, for which inference gives no shape."""
_NOT_INFERRED = (
    onnx.defs.SchemaError,
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
)


@dataclass
class Shapes:
    """Shapes and folded numbers under one sample of the dynamic dimensions."""

    inputs: Mapping[str, Shape]
    """The sample: the shape of every graph input, by name."""
    shape: dict[ir.Value, Shape] = field(default_factory=dict)
    number: dict[ir.Value, Array] = field(default_factory=dict)
    """Values known without running the model: small constants and what is computed from them."""
    outline: onnx.ModelProto | None = None
    """What shape inference needs of a dynamic model, for another sample of the same graph."""

    def of(self, value: ir.Value) -> Shape | None:
        """Return the shape of ``value``, or None where it depends on the data."""
        return self.shape.get(value)

    def shape_of(self, node: ir.Node, index: int) -> Shape | None:
        """Return the shape of an input, None where it is not there or not known."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.shape.get(value)

    def numbers_of(self, node: ir.Node, index: int) -> list[int] | None:
        """Return the numbers in an input, None where it is not there or they are not known."""
        value = node.inputs[index] if index < len(node.inputs) else None
        number = None if value is None else self.number.get(value)
        if number is None or number.dtype.kind not in "iub":
            return None
        return number.ravel().tolist()

    def new(self) -> NoReturn:
        """Say that a rule does not know a dimension."""
        raise _NotKnownError


class _NotKnownError(Exception):
    """A rule's word for a dimension that it does not follow."""


def stated(value: ir.Value) -> Shape | None:
    """The shape that the model itself gives, where it is known to the last dimension."""
    if value.shape is None:
        return None
    found = value.shape.dims
    for dim in found:
        if not isinstance(dim, int):
            return None
    return found  # type: ignore[return-value]


def infer_node(
    found: Shapes, node: ir.Node, known: Mapping[str, Shape] | None, versions: Mapping[str, int]
) -> None:
    """Set the output shapes of ``node``: from the whole-graph pass, else from its own schema."""
    missing = False
    for value in node.outputs:
        if not value.name:
            continue
        shape = stated(value) if known is None else known.get(value.name)
        if shape is None:
            missing = True
        else:
            found.shape[value] = shape
    if missing and not _infer_by_rule(found, node):
        found.shape.update(_infer_alone(found, node, versions))
        _infer_contrib(found, node)
        if node.op_type in _LIKE_INPUT and (shape := found.of(node.inputs[0])):  # type: ignore[arg-type]
            found.shape.setdefault(node.outputs[0], shape)


def _infer_contrib(found: Shapes, node: ir.Node) -> None:
    """The same for an operator that ONNX does not know."""
    known = contrib.shapes(node, [None if v is None else found.of(v) for v in node.inputs])
    for value, shape in zip(node.outputs, known, strict=False):
        if value.name:
            found.shape.setdefault(value, shape)
            value.type = value.type or contrib.kind(node)


def _infer_by_rule(found: Shapes, node: ir.Node) -> bool:
    """Set the shape of a node's output by its operator's rule: to ask ONNX takes much longer."""
    rule = RULES.get(node.op_type) if node.domain == "" else None
    if rule is None or node.outputs[0].dtype is None:
        return False
    try:
        shape = rule(found, node)
    except (_NotKnownError, IndexError, ValueError):
        return False  # or the graph contradicts itself, of which ONNX knows more
    if shape is not None:
        found.shape[node.outputs[0]] = tuple(map(int, shape))  # type: ignore[arg-type]
    return shape is not None


def _infer_alone(
    found: Shapes, node: ir.Node, versions: Mapping[str, int]
) -> dict[ir.Value, Shape]:
    types, data = {}, {}
    for value in node.inputs:
        if value is None:
            continue
        shape = found.of(value)
        if shape is None or value.dtype is None:
            return {}
        types[name_of(value)] = onnx.helper.make_tensor_type_proto(int(value.dtype), shape)
        if value in found.number:
            data[name_of(value)] = onnx.numpy_helper.from_array(found.number[value])
    version = node.version or versions.get(node.domain, 1)
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        inferred = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.serde.serialize_node(node),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in versions.items()],
        )
    except _NOT_INFERRED:
        return {}  # a custom operator or type, or a shape that depends on data: not known
    shapes = {}
    for value in node.outputs:
        proto = inferred.get(value.name or "")
        if proto is None:
            continue
        if value.type is None:
            value.type = ir.serde.deserialize_type_proto_for_type(proto)
        if (shape := static(proto)) is not None:
            shapes[value] = shape
    return shapes


def static(kind: onnx.TypeProto) -> Shape | None:
    """The shape in a type, or None when it is not known to the last dimension."""
    found = extents(kind)
    if found is None or None in found:
        return None
    return tuple(d for d in found if d is not None)
