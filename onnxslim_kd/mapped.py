"""Read ONNX files without copying their weights: they stay in the file's bytes.

Protobuf copies every weight when it parses, and again when its bytes are asked for. But weights
are `raw_data` fields of the message, so the file is walked field by field (a few per node), a
message without the big ones is put together and parsed, and tensors that look into the file are
set in their place. All other rules of the format stay with protobuf, which parses the rest.

    file:     model { graph { node ... initializer { dims name raw_data } ... } }
    parsed:   model { graph { node ... initializer { dims name external_data } ... } }
    attached: the same model, its tensors numpy views of the file's bytes
"""

import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd.access import bytes_of, extents_of
from onnxslim_kd.errors import ModelError
from onnxslim_kd.wire import Buffer, field, head

LARGE = 256 * 2**20
"""Bytes from which a file is mapped, not read: a mapped file must not be cut while in use."""
LEAST = 4096
"""Bytes of a field from which it stays in the file."""
MARK = "\0mapped"
"""Stands for the file itself where external data has a file name; no file can be called so."""


def read(path: Path) -> tuple[onnx.ModelProto, Buffer]:
    """Parse ``path`` without its big weights, which `attach` sets from the bytes.

    Raises:
        google.protobuf.message.DecodeError: As protobuf does.
        OSError: The file cannot be read.
        ValueError: The file is not a protobuf message, or is cut short.
    """
    data = _bytes(path)
    try:
        light = _without_weights(data, 0, len(data), "model")
    except IndexError as error:
        raise ValueError("the file is cut short") from error
    proto = onnx.ModelProto()
    proto.ParseFromString(light)
    return proto, data


def _bytes(path: Path) -> Buffer:
    if path.stat().st_size < LARGE:
        return memoryview(np.fromfile(path, np.uint8).data)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def attach(graphs: Iterable[ir.Graph], data: Buffer) -> None:
    """Give a model's graphs the tensors that stayed in the bytes it was read from.

    Raises:
        ModelError: A tensor holds more or fewer bytes than its shape needs.
    """
    for graph in graphs:
        for value in graph.initializers.data.values():
            if _is_marked(held := value.const_value):
                value.const_value = _tensor(held, data)
        for node in graph:
            for name, attribute in node.attributes.data.items():
                if _is_marked(held := attribute.value):
                    node.attributes[name] = ir.AttrTensor(name, _tensor(held, data))


def _is_marked(tensor: object) -> TypeGuard[ir.ExternalTensor]:
    return type(tensor) is ir.ExternalTensor and tensor.location == MARK


def _tensor(marked: ir.ExternalTensor, data: Buffer) -> ir.TensorProtocol:
    """A tensor that looks into ``data``, where the mark says."""
    start, length, wanted = marked.offset or 0, marked.length or 0, bytes_of(marked)
    if length != wanted or start + length > len(data):
        raise ModelError(
            f"tensor {marked.name} holds {length} bytes, its shape"
            f" {list(extents_of(marked))} needs {wanted}"
        )
    view = np.frombuffer(data, np.uint8, length, start)
    if marked.dtype.bitwidth < 8:
        array: np.ndarray[Any, Any] = view
        kind: Callable[..., ir.TensorProtocol] = ir.PackedTensor
    else:
        array = view.view(marked.dtype.numpy()).reshape(extents_of(marked))
        kind = ir.Tensor
    return kind(
        array,
        marked.dtype,
        shape=marked.shape,
        name=marked.name,
        doc_string=marked.doc_string,
        metadata_props=dict(marked.metadata_props),
    )


def _without_weights(data: Buffer, start: int, end: int, kind: str) -> bytes:
    """Copy a message, field by field, with marks instead of big weights."""
    out, position, copied, inside = bytearray(), start, start, INNER[kind]
    mark = b""  # at the end: of a field that stands twice, the last one counts
    while position < end:
        number, body, stop = field(data, position)
        if stop > end:
            raise IndexError(stop)
        inner = inside.get(number) if stop - body >= LEAST else None
        if inner is not None:
            out += data[copied:position]
            if inner == "weights":
                mark = _mark(body, stop - body)
            else:
                light = _without_weights(data, body, stop, inner)
                out += head(number, len(light)) + light
            copied = stop
        position = stop
    return bytes(out + data[copied:end] + mark)


def _mark(offset: int, length: int) -> bytes:
    """The fields of a TensorProto that say "external, at this place"."""
    tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", MARK), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor.SerializeToString()


# message -> field number -> the message in that field (onnx.proto); all else is copied as it is
INNER = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
    "tensor": {9: "weights"},
}
