"""Load and save ONNX models.

The model of record is `onnx_ir.Model`: weights stay memory-mapped and a round trip is lossless.
What `load` refuses is refused by name; what it accepts is brought into one form (`normalise`).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import google.protobuf.message
import onnx
import onnx_ir as ir

from onnxslim_kd import mapped
from onnxslim_kd.access import constant, dims, has_rank, name_of, new_initializer
from onnxslim_kd.errors import ModelError, OnnxSlimError, UserError
from onnxslim_kd.normalise import (
    IR_VERSIONS,
    OPSET,
    SMALL,
    adopt,
    infer_shapes,
    normalised,
    raise_opset,
    without_weights,
)
from onnxslim_kd.saving import (
    TWO_GB,
    check_writable,
    embedded,
    save,
    weight_bytes,
    write_file,
    write_text,
)

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

__all__ = [
    "IR_VERSIONS",
    "OPSET",
    "SMALL",
    "TWO_GB",
    "ModelLike",
    "adopt",
    "check_writable",
    "constant",
    "dims",
    "embedded",
    "has_rank",
    "infer_shapes",
    "load",
    "name_of",
    "new_initializer",
    "normalised",
    "raise_opset",
    "save",
    "weight_bytes",
    "without_weights",
    "write_file",
    "write_text",
]
ModelLike: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | gs.Graph"


def load(source: ModelLike, *, normalise: bool = True) -> ir.Model:
    """Read a model and bring it into the form that passes expect.

    Args:
        source: A path, a `onnx.ModelProto`, an `onnx_ir.Model` (copied) or a graphsurgeon graph.
        normalise: False keeps the graph exactly as it is in the file.

    Raises:
        ModelError: The file is missing, not ONNX, truncated, from a newer ONNX than this one,
            holds what is not supported, or its external data is missing or unsafe.
    """
    try:
        model = _read(source)
        _refuse_unsupported(model)
        if normalise:
            normalised(model)
    except (OnnxSlimError, MemoryError):
        raise
    except Exception as error:  # onnx and onnx-ir raise many kinds on malformed graphs
        raise ModelError(f"{_called(source)}: malformed ONNX: {_cause(error)}") from error
    return model


def _called(source: ModelLike) -> str:
    is_path = isinstance(source, str | os.PathLike)
    return str(source) if is_path else f"the given {type(source).__name__}"


def _cause(error: BaseException) -> str:
    """What went wrong first, on one line: onnx-ir tells the whole way there, with all it held."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read(source: ModelLike) -> ir.Model:
    if isinstance(source, ir.Model):
        return source.clone()
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        model = _from_proto(_read_proto(path), str(path))
        if _is_large(path):
            mapped.attach(model, path)
        ir.external_data.set_base_dir(model.graph, path.resolve().parent)
        for tensor in _tensors(model):
            _check_external(tensor)
        _read_small(model)
        return model
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, "the given ModelProto")
    import onnx_graphsurgeon as gs

    if isinstance(source, gs.Graph):
        return _from_proto(gs.export_onnx(source), "the given graphsurgeon graph")
    raise UserError(
        f"a model must be a path, a ModelProto, an onnx_ir.Model or a graphsurgeon Graph,"
        f" got {type(source).__name__}"
    )


def _read_proto(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        proto = mapped.read(path) if _is_large(path) else onnx.load(path, load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file, or cut short ({error})") from error
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: not an ONNX model (no graph or no opset)")
    return proto


def _is_large(path: Path) -> bool:
    return path.stat().st_size >= mapped.LARGE


def _from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
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
    return ir.serde.deserialize_model(proto)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor of the model, in initializers and in attributes, subgraphs included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()


def _check_external(tensor: ir.TensorProtocol) -> None:
    """Refuse external data that is missing, leaves the model's folder, or has the wrong length."""
    if isinstance(tensor, ir.ExternalTensor):
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
                f"{where} is cut short: {path.stat().st_size} bytes,"
                f" {offset + tensor.nbytes} needed"
            )


def _read_small(model: ir.Model) -> None:
    """Hold small external tensors in memory: onnx's own passes look for their files elsewhere."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL:
                value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)


def _refuse_unsupported(model: ir.Model) -> None:
    if len(model.graph) == 0:
        raise ModelError(f"graph {model.graph.name!r} is empty: it has no nodes")
    for tensor in _tensors(model):
        if isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype != ir.DataType.STRING:
            _check_length(tensor)
    for graph in model.graphs():
        for node in graph:
            for value in node.inputs:
                if value is not None and _is_nowhere(value):
                    raise ModelError(
                        f"node {node.name or node.op_type} reads {value.name!r}, which is no graph"
                        f" input, no initializer, and the output of no node"
                    )
        for value in graph.outputs:
            if _is_nowhere(value):
                raise ModelError(f"graph output {value.name!r} is the output of no node")


def _is_nowhere(value: ir.Value) -> bool:
    return value.producer() is None and not value.is_graph_input() and value.const_value is None


def _check_length(tensor: ir.TensorProtoTensor) -> None:
    """Refuse raw data whose length is not what the dimensions say.

    Typed fields are checked by numpy() on use. The length of a message is known without a copy of
    its bytes; only when it is not the usual one are the bytes themselves looked at.
    """
    proto = tensor.raw
    if not proto.HasField("raw_data") or any(d < 0 for d in proto.dims):
        return
    bare = onnx.TensorProto(name=proto.name, dims=proto.dims, data_type=proto.data_type)
    field = bytes(1) + _varint(tensor.nbytes)  # the tag, then the length
    if proto.ByteSize() == bare.ByteSize() + len(field) + tensor.nbytes:
        return
    held = len(proto.raw_data)
    if held != tensor.nbytes:
        raise ModelError(
            f"tensor {tensor.name} holds {held} bytes, its shape"
            f" {list(tensor.shape.numpy())} needs {tensor.nbytes}"
        )


def _varint(number: int) -> bytes:
    """As many bytes as protobuf needs for ``number``."""
    return bytes(max(1, -(-number.bit_length() // 7)))
