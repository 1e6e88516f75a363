"""Read big ONNX files without copying their weights: they stay in the file, mapped into memory.

Protobuf has no such thing: parsing a file of 1.5 GB takes 3 GB. But the weights are `raw_data`
fields of the message, so the file is walked field by field (a few per node), a message without
the big ones is put together and parsed, and tensors that look into the file are set in their
place. All other rules of the format stay with protobuf, which parses the rest.

    file:     model { graph { node ... initializer { dims name raw_data } ... } }
    parsed:   model { graph { node ... initializer { dims name external_data } ... } }
    attached: the same model, its tensors numpy views of the mapped file
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd.errors import ModelError

LARGE = 256 * 2**20
"""Bytes of a file from which this is worth it: a mapped file must not be cut while it is in use."""
LEAST = 4096
"""Bytes of a field from which it stays in the file."""
MARK = "\0mapped"
"""Stands for the file itself where external data has a file name; no file can be called so."""


def read(path: Path) -> onnx.ModelProto:
    """Parse ``path`` without its big weights, which `attach` sets afterwards.

    Raises:
        google.protobuf.message.DecodeError: As protobuf does.
        OSError: The file cannot be read.
        ValueError: The file is not a protobuf message, or is cut short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            light = _without_weights(data, 0, len(data), "model")
        except IndexError as error:
            raise ValueError("the file is cut short") from error
    proto = onnx.ModelProto()
    proto.ParseFromString(light)
    return proto


def attach(model: ir.Model, path: Path) -> None:
    """Give ``model``, read from ``path``, the tensors that stayed in the file.

    Raises:
        ModelError: A tensor holds more or fewer bytes than its shape needs.
    """
    data = np.memmap(path, np.uint8, mode="r")
    for graph in model.graphs():
        for value in graph.initializers.values():
            if _is_marked(value.const_value):
                value.const_value = _tensor(value.const_value, data)
        for node in graph:
            for name, attribute in node.attributes.items():
                held = attribute.value
                if attribute.type == ir.AttributeType.TENSOR and _is_marked(held):
                    node.attributes[name] = ir.AttrTensor(name, _tensor(held, data))


def _is_marked(tensor: object) -> bool:
    return isinstance(tensor, ir.ExternalTensor) and tensor.location == MARK


def _tensor(marked: ir.TensorProtocol | None, data: np.ndarray[Any, Any]) -> ir.TensorProtocol:
    """A tensor that looks into ``data``, where the mark says."""
    assert isinstance(marked, ir.ExternalTensor)
    start, length = marked.offset or 0, marked.length or 0
    if length != marked.nbytes or start + length > len(data):
        raise ModelError(
            f"tensor {marked.name} holds {length} bytes, its shape"
            f" {list(marked.shape.numpy())} needs {marked.nbytes}"
        )
    view = data[start : start + length]
    if marked.dtype.bitwidth < 8:
        return ir.PackedTensor(view, marked.dtype, shape=marked.shape, name=marked.name)
    array = np.frombuffer(view, marked.dtype.numpy()).reshape(marked.shape.numpy())
    return ir.Tensor(array, marked.dtype, shape=marked.shape, name=marked.name)


# ---------------------------------------------------------------------- the wire format


def _without_weights(data: mmap.mmap, start: int, end: int, kind: str) -> bytes:
    """Copy a message, field by field, with marks instead of big weights."""
    out, position = bytearray(), start
    while position < end:
        number, body, stop = _field(data, position)
        if stop > end:
            raise IndexError(stop)
        inner = INNER[kind].get(number) if stop - body >= LEAST else None
        if inner is None:
            out += data[position:stop]
        elif inner == "weights":
            out += _mark(body, stop - body)
        else:
            light = _without_weights(data, body, stop, inner)
            out += _bytes_field(number, light)
        position = stop
    return bytes(out)


def _field(data: mmap.mmap, position: int) -> tuple[int, int, int]:
    """The number of the field at ``position``, where its content begins and where it ends."""
    tag, body = _varint(data, position)
    form = tag & 7
    if form == _LENGTH:
        length, body = _varint(data, body)
        return tag >> 3, body, body + length
    if form == _VARINT:
        return tag >> 3, body, _varint(data, body)[1]
    if form not in _FIXED:
        raise ValueError(f"byte {position} is no field of a protobuf message")
    return tag >> 3, body, body + _FIXED[form]


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least first, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _bytes_field(number: int, content: bytes) -> bytes:
    return _encoded(number << 3 | _LENGTH) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _mark(offset: int, length: int) -> bytes:
    """The fields of a TensorProto that say "external, at this place"."""
    tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", MARK), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor.SerializeToString()


_VARINT, _LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}
# message -> field number -> the message in that field (onnx.proto); all else is copied as it is
INNER = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
    "tensor": {9: "weights"},
}
