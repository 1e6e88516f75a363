"""What `load` refuses, each by name: versions, forms, broken graphs, unsafe external data."""

import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxslim_kd.access import bits_of, graphs
from onnxslim_kd.errors import ModelError


def refuse_form(proto: onnx.ModelProto, name: str) -> None:
    """Refuse a message that is newer than the onnx package, or holds what no pass supports.

    Raises:
        ModelError: It is.
    """
    if proto.training_info:
        raise ModelError(
            f"{name}: holds training_info, which is not supported; export for inference"
        )
    if proto.graph.sparse_initializer:
        raise ModelError(
            f"{name}: holds sparse initializers (first:"
            f" {proto.graph.sparse_initializer[0].values.name}), which are not supported;"
            f" convert them to dense ones"
        )
    newest = onnx.defs.onnx_opset_version()
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{name}: ir_version {proto.ir_version} is newer than this onnx knows"
            f" ({onnx.IR_VERSION}); upgrade the onnx package"
        )
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= newest:
            raise ModelError(
                f"{name}: opset {entry.version} is not one this onnx knows (1 to {newest});"
                f" upgrade the onnx package or export with an older opset"
            )


def tensors(inside: Iterable[ir.Graph]) -> Iterator[ir.TensorProtocol]:
    """Every tensor in initializers and in attributes."""
    for graph in inside:
        for value in graph.initializers.data.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.data.values():
                if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.value


def refuse_external(tensor: ir.ExternalTensor) -> None:
    """Refuse external data that is missing, leaves the model's folder, or has the wrong length.

    Raises:
        ModelError: It does.
    """
    where = f"external data of {tensor.name}: {tensor.location}"
    path, base = Path(tensor.path), Path(tensor.base_dir)
    if base not in Path(os.path.normpath(path)).parents:
        raise ModelError(f"{where} is outside of the model's folder")
    if path.is_symlink() or base.resolve() not in path.resolve().parents:
        raise ModelError(f"{where} is a link; copy the file itself beside the model")
    if not path.is_file():
        raise ModelError(f"{where} does not exist beside the model")
    if path.stat().st_nlink > 1:
        raise ModelError(f"{where} is a hard link; copy the file itself beside the model")
    offset, length = tensor.offset or 0, tensor.length
    if offset < 0 or (length is not None and length != tensor.nbytes):
        raise ModelError(
            f"{where} holds {length} bytes at {offset}, its shape needs {tensor.nbytes}"
        )
    if offset + tensor.nbytes > path.stat().st_size:
        raise ModelError(
            f"{where} is cut short: {path.stat().st_size} bytes, {offset + tensor.nbytes} needed"
        )


def refuse_unsupported(model: ir.Model) -> bool:
    """Refuse an empty graph, one that reads what is nowhere, and tensors of the wrong length.

    Returns:
        Whether every node stands behind those that it reads from.

    Raises:
        ModelError: It is one.
    """
    if len(model.graph) == 0:
        raise ModelError(f"graph {model.graph.name!r} is empty: it has no nodes")
    inside = graphs(model)
    for tensor in tensors(inside):
        if type(tensor) is ir.TensorProtoTensor:
            _check_length(tensor.raw)
    return all([_refuse_unknown(graph) for graph in inside])


def _refuse_unknown(graph: ir.Graph) -> bool:
    """Refuse what reads from nowhere; tell whether every node stands behind what it reads."""
    in_order, before = True, set[ir.Node]()
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None:
                in_order = in_order and (producer in before or producer.graph is not graph)
            elif value is not None and _is_nowhere(value):
                raise ModelError(
                    f"node {node.name or node.op_type} reads {value.name!r}, which is no graph"
                    f" input, no initializer, and the output of no node"
                )
        before.add(node)
    for value in graph.outputs:
        if _is_nowhere(value):
            raise ModelError(f"graph output {value.name!r} is the output of no node")
    return in_order


def _is_nowhere(value: ir.Value) -> bool:
    return value.producer() is None and not value.is_graph_input() and value.const_value is None


def _check_length(proto: onnx.TensorProto) -> None:
    """Refuse raw data whose length is not what the dimensions say.

    Typed fields are checked by numpy() on use. The length of a message is known without a copy of
    its bytes; only when it is not the usual one are the bytes themselves looked at.
    """
    dims = tuple(proto.dims)
    if not proto.HasField("raw_data") or (dims and min(dims) < 0):
        return
    wanted = -(-prod(dims) * bits_of(proto.data_type) // 8)
    if wanted > _CHEAP:
        bare = onnx.TensorProto(name=proto.name, dims=dims, data_type=proto.data_type)
        tag_and_length = 1 + max(1, -(-wanted.bit_length() // 7))
        if proto.ByteSize() == bare.ByteSize() + tag_and_length + wanted:
            return
    if (held := len(proto.raw_data)) != wanted:
        raise ModelError(
            f"tensor {proto.name} holds {held} bytes, its shape {list(dims)} needs {wanted}"
        )


_CHEAP = 4096
"""Bytes up to which a copy costs less than the question for its length."""
