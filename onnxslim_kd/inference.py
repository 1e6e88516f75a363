"""Shape inference, on models without their weights; and how models become messages quickly.

Most of the time to turn a graph into a message and back goes into the types of the values between
the nodes, of which large graphs have few different ones: they are converted once each.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from onnxslim_kd.access import bodies, bytes_of, extents_of, name_of
from onnxslim_kd.errors import ModelError

SMALL = 1024
"""Bytes up to which a tensor counts as a constant of shape arithmetic, not as a weight."""
_SCALES = 64
"""The same for floats: a Resize has one scale per axis."""


def infer_shapes(model: ir.Model) -> None:
    """Set the shapes and types that ONNX shape inference finds, without copying weights.

    Raises:
        ModelError: The graph contradicts itself; the message names the node.
    """
    with without_weights(model) as proto:
        _set_all_types(model.graph, inferred(proto).graph)


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``proto`` with the types that ONNX shape inference finds.

    Raises:
        ModelError: The graph contradicts itself; the message names the node.
    """
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(f"shape inference failed: {error}") from error


def types(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Return the types of the values that nodes of the main graph compute, by name."""
    return _types_in(proto.graph)


def _types_in(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    infos = (*graph.value_info, *graph.output)
    return {info.name: info.type for info in infos if info.HasField("type")}


def _set_all_types(graph: ir.Graph, found: onnx.GraphProto) -> None:
    """Set the types in ``graph`` and in the bodies inside of it from its message, ``found``."""
    set_types(graph, _types_in(found))
    for node, its in zip(graph, found.node, strict=True):
        inside = bodies(node)
        for body, message in zip(inside, _bodies_in(its) if inside else (), strict=True):
            _set_all_types(body, message)


def _bodies_in(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from (attribute.g,) if attribute.HasField("g") else attribute.graphs


def set_types(graph: ir.Graph, found: Mapping[str, onnx.TypeProto]) -> None:
    """Set the types and shapes of what the nodes of ``graph`` compute."""
    known: dict[bytes, tuple[ir.TypeProtocol | None, ir.Shape | None]] = {}
    for node in graph:
        for value in node.outputs:
            proto = found.get(value.name or "")
            if proto is None:
                continue
            key = proto.SerializeToString()
            if key not in known:
                known[key] = (
                    ir.serde.deserialize_type_proto_for_type(proto),
                    ir.serde.deserialize_type_proto_for_shape(proto),
                )
            kind, shape = known[key]
            if isinstance(kind, ir.TensorType):
                value.type = ir.TensorType(kind.dtype, denotation=kind.denotation)
            elif kind is not None:
                value.type = ir.serde.deserialize_type_proto_for_type(proto)
            if shape is not None:
                value.shape = shape.copy()


@contextmanager
def without_weights(
    model: ir.Model,
    limit: int = SMALL,
    only: Callable[[ir.Value], bool] = lambda value: True,
) -> Iterator[onnx.ModelProto]:
    """Give the model as a proto whose big initializers are graph inputs instead.

    Tensors of at most ``limit`` bytes stay, for shape arithmetic needs them, and those that are
    not meant by ``only``. Copying weights into a C++ pass would cost more than everything else
    (and fails above 2 GB).
    """
    graph = model.graph
    held = dict(graph.initializers.items())
    n_inputs = len(graph.inputs)
    big = []
    for value in held.values():
        tensor = value.const_value
        if tensor is None or (bytes_of(tensor) > limit and only(value)):
            big.append((value, tensor))
    try:
        for value, tensor in big:
            if tensor is not None:
                value.shape = ir.Shape(extents_of(tensor))
                value.type = ir.TensorType(tensor.dtype)
            del graph.initializers[name_of(value)]
            graph.inputs.append(value)
        yield message(model)
    finally:
        while len(graph.inputs) > n_inputs:
            graph.inputs.pop()  # a slice deletion would leave the values marked as inputs
        graph.initializers.clear()
        for value in held.values():
            graph.initializers.add(value)


def outline(model: ir.Model) -> onnx.ModelProto:
    """Return what inference needs of a loaded model and no more: nodes, and types of what enters.

    Weights are inputs; the only types between nodes are those that custom operators give.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    _outline_weights(model.graph, graph)
    for node in model.graph:
        ir.serde.serialize_node_into(graph.node.add(), node)
        for value in node.outputs if node.domain else ():
            ir.serde.serialize_value_into(graph.value_info.add(), value)
    for value in model.graph.outputs:
        info = graph.output.add(name=value.name)
        if isinstance(value.type, ir.TensorType):
            info.type.tensor_type.elem_type = value.type.dtype.value
    return proto


def _outline_weights(model: ir.Graph, graph: onnx.GraphProto) -> None:
    known: dict[tuple[int, tuple[int, ...]], onnx.TypeProto] = {}
    for value in model.initializers.data.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if _may_count(tensor):
            ir.serde.serialize_tensor_into(graph.initializer.add(), tensor)
            continue
        key = int(tensor.dtype), extents_of(tensor)
        if key not in known:
            known[key] = onnx.helper.make_tensor_type_proto(*key)
        graph.input.add(name=value.name).type.CopyFrom(known[key])


def _may_count(tensor: ir.TensorProtocol) -> bool:
    """Tell whether shape arithmetic may read a tensor: whole numbers, or a few scales."""
    size = bytes_of(tensor)
    if size <= SMALL and tensor.dtype.is_floating_point():
        return size <= _SCALES and len(extents_of(tensor)) <= 1
    return size <= SMALL


def extents(kind: onnx.TypeProto) -> tuple[int | None, ...] | None:
    """Return the dimensions in a tensor's type, None for each that is not a number."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)


def message(model: ir.Model) -> onnx.ModelProto:
    """Serialise ``model``, each type once; a weight says its type itself."""
    computed = [value for node in model.graph for value in node.outputs if _is_plain(value)]
    held = model.graph.initializers.values()
    weights = [v for v in held if not (v.is_graph_input() or v.is_graph_output())]
    with _untyped([*computed, *(v for v in weights if not v.metadata_props)]):
        proto = ir.serde.serialize_model(model)
    known: dict[object, onnx.TypeProto] = {}
    for value in computed:
        info = proto.graph.value_info.add(name=value.name)
        info.type.CopyFrom(_type_proto(value, known))
    return proto


def _is_plain(value: ir.Value) -> bool:
    """Tell whether there is nothing to write about a value but its tensor type."""
    return (
        bool(value.name)
        and isinstance(value.type, ir.TensorType)
        and not value.is_graph_output()
        and not value.metadata_props
        and not value.doc_string
    )


@contextmanager
def _untyped(values: Iterable[ir.Value]) -> Iterator[None]:
    """Hide types and shapes for the time of the block."""
    held = [(value, value.type, value.shape) for value in values]
    try:
        for value, _, _ in held:
            value.type = value.shape = None
        yield
    finally:
        for value, kind, shape in held:
            value.type, value.shape = kind, shape


def _type_proto(value: ir.Value, known: dict[object, onnx.TypeProto]) -> onnx.TypeProto:
    kind, shape = value.type, value.shape
    assert isinstance(kind, ir.TensorType)
    key: object = (kind.dtype, kind.denotation)
    if shape is not None:
        key = (key, shape.dims, tuple(map(shape.get_denotation, range(len(shape)))))
    if key not in known:
        known[key] = ir.serde.serialize_value(value).type
    return known[key]
