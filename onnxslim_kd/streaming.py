"""Write ONNX files without copying their weights: they go from where they are into the file.

    written:  model { ... graph { node ... initializer { dims name raw_data } ... } }

The message is serialised without its big weights. Their lengths are known, so that the lengths of
what holds them are too, and all can be written from first to last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd.access import bytes_of, extents_of, graphs
from onnxslim_kd.inference import SMALL, message
from onnxslim_kd.mapped import LEAST, MARK
from onnxslim_kd.memory import collection_paused, release
from onnxslim_kd.wire import head

Tensors = dict[str, ir.TensorProtocol]
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Field numbers in ModelProto, GraphProto and TensorProto."""
BUFFER = 2**20
"""Bytes handed to the system at once: many writes of less than that take twice as long."""


def write_whole(model: ir.Model, path: Path) -> None:
    """Write ``model`` as one file."""
    with _set_aside(model, LEAST, MARK) as heavy, embedded(model, but=MARK):
        proto = _bare(model)
    parts = [_serialised(tensor, heavy) for tensor in proto.graph.initializer]
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    sizes = [len(light) + (bytes_of(big) if big is not None else 0) for light, big in parts]
    heads = [head(INITIALIZER, size) for size in sizes]
    with path.open("wb", BUFFER) as file:
        file.write(proto.SerializeToString())
        file.write(head(GRAPH, len(graph) + sum(sizes) + sum(map(len, heads))))
        file.write(graph)
        for start, (light, big) in zip(heads, parts, strict=True):
            file.write(start + light)
            if big is not None:
                _write_tensor(big, file)


def _serialised(
    initializer: onnx.TensorProto, big: Tensors
) -> tuple[bytes, ir.TensorProtocol | None]:
    """A tensor's message; a big one's up to the bytes that follow."""
    tensor = big.get(initializer.name)
    if tensor is None:
        return initializer.SerializeToString(), None
    initializer.ClearField("data_location")
    initializer.ClearField("external_data")
    return initializer.SerializeToString() + head(RAW_DATA, bytes_of(tensor)), tensor


def write_beside(model: ir.Model, path: Path) -> None:
    """Write ``model`` with its weights in a second file, ``<path>.data``."""
    weights = path.with_name(f"{path.name}.data")
    with _set_aside(model, SMALL + 1, weights.name) as big, embedded(model, but=weights.name):
        proto = _bare(model)
    path.write_bytes(proto.SerializeToString())
    with weights.open("wb", BUFFER) as file:
        for tensor in big.values():
            _write_tensor(tensor, file)


@collection_paused()
def _bare(model: ir.Model) -> onnx.ModelProto:
    """The message, in which no weight has its shape twice."""
    proto = message(model)
    infos = [info for info in proto.graph.value_info if info.name not in model.graph.initializers]
    if len(infos) < len(proto.graph.value_info):
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(infos)
    return proto


@contextmanager
def _set_aside(
    model: ir.Model, least: int, location: str
) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Let the weights of at least so many bytes stand one after the other in another file."""
    big = {
        name: tensor
        for name, value in model.graph.initializers.data.items()
        if (tensor := value.const_value) is not None
        and bytes_of(tensor) >= least
        and tensor.dtype != ir.DataType.STRING
    }
    offset = 0
    try:
        for name, tensor in big.items():
            length = bytes_of(tensor)
            model.graph.initializers[name].const_value = ir.ExternalTensor(
                location,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(extents_of(tensor)),
                name=name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
            offset += length
        yield big
    finally:
        for name, tensor in big.items():
            model.graph.initializers[name].const_value = tensor


@contextmanager
def embedded(model: ir.Model, *, but: str | None = None) -> Iterator[None]:
    """Serialise external tensors by value for the time of the block, but for those in one file."""
    values = [
        value
        for graph in graphs(model)
        for value in graph.initializers.data.values()
        if type(value.const_value) is ir.ExternalTensor and value.const_value.location != but
    ]
    held = [value.const_value for value in values]
    try:
        for value, tensor in zip(values, held, strict=True):
            assert tensor is not None
            value.const_value = ir.Tensor(
                tensor.numpy(),
                tensor.dtype,
                name=tensor.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
        yield
    finally:
        for value, tensor in zip(values, held, strict=True):
            value.const_value = tensor


def _write_tensor(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    """Append a tensor's bytes, and give back the memory of a mapped one."""
    if isinstance(tensor, ir.Tensor) and tensor.dtype.bitwidth >= 8:
        array = tensor.numpy()
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
        release(array)
    elif isinstance(tensor, ir.ExternalTensor | ir.PackedTensor):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
