"""Load, normalise and save ONNX models; the one place that touches files and narrows Optionals.

The model of record is `onnx_ir.Model`: weights stay memory-mapped and a round trip is lossless.
`load` brings every model into one form, so that passes need no special cases:

1. initializers are no graph inputs (IR 3 files list them; it also stops runtime fusions),
2. weights are initializers (Paddle exports every one as a Constant node),
3. functions are inlined, the opset is at least 17, the IR version is one that runtimes load,
4. Conv-like nodes have explicit pads where shapes allow,
5. shapes are inferred on a copy without weights.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd import mapped
from onnxslim_kd.errors import ModelError, OperationError, UserError

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

ModelLike: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | gs.Graph"
OPSET = 17
"""The lowest opset that passes see; older models are raised to it."""
IR_VERSIONS = (8, 13)
"""The IR versions written: 8 is opset 17's own, 13 the newest that ONNX Runtime 1.31 loads."""
TWO_GB = 2**31 - 2**20
"""Protobuf refuses messages of 2 GiB; the margin is for the graph around the weights."""
SMALL = 1024
"""Bytes up to which a tensor counts as a constant of shape arithmetic, not as a weight."""


# ------------------------------------------------------------------------------ load


def load(source: ModelLike, *, normalise: bool = True) -> ir.Model:
    """Read a model and bring it into the form that passes expect.

    Args:
        source: A path, a `onnx.ModelProto`, an `onnx_ir.Model` (copied) or a graphsurgeon graph.
        normalise: False keeps the graph exactly as it is in the file.

    Raises:
        ModelError: The file is missing, not ONNX, truncated, from a newer ONNX than this one,
            holds what is not supported, or its external data is missing or unsafe.
    """
    model = _read(source)
    _refuse_unsupported(model)
    if normalise:
        normalised(model)
    return model


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
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx-ir raises many kinds on malformed protos
        raise ModelError(f"{name}: malformed ONNX: {error}") from error


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


def _refuse_unsupported(model: ir.Model) -> None:
    if len(model.graph) == 0:
        raise ModelError(f"graph {model.graph.name!r} is empty: it has no nodes")
    for tensor in _tensors(model):
        if isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype != ir.DataType.STRING:
            _check_length(tensor)


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


# ------------------------------------------------------------------------- normalise


def normalised(model: ir.Model) -> None:
    """Bring ``model`` into the one form that passes expect, in place."""
    common.InlinePass()(model)
    for value in model.graph.inputs:
        if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
            free = [None if isinstance(d, int) and d < 0 else d for d in value.shape]
            value.shape = ir.Shape(free)  # some exporters write -1 for a dynamic dimension
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    low, high = IR_VERSIONS
    model.ir_version = min(max(model.ir_version or low, low), high)
    raise_opset(model)
    _name_nodes(model)
    infer_shapes(model)
    _explicit_pads(model)


def raise_opset(model: ir.Model, lowest: int = OPSET) -> None:
    """Convert ``model`` to opset ``lowest``, in place, unless it has that or a newer one.

    Raises:
        ModelError: An operator has no newer form.
    """
    version = model.graph.opset_imports.get("", OPSET)
    if version >= lowest:
        return
    with without_weights(model) as proto:
        try:
            raised = onnx.version_converter.convert_version(proto, lowest)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"opset {version} cannot be raised to {lowest}: {error}") from error
    other = ir.serde.deserialize_model(raised)
    _carry_notes(model.graph, other.graph)
    adopt(model, other)


def _carry_notes(old: ir.Graph, new: ir.Graph) -> None:
    """Copy what the converter drops: metadata of nodes and values, quantisation annotations."""
    known = ir.convenience.create_value_mapping(old)
    for name, value in ir.convenience.create_value_mapping(new).items():
        if (before := known.get(name)) is None:
            continue
        value.meta.update(before.meta)
        value.metadata_props.update(before.metadata_props)
        producer, source = value.producer(), before.producer()
        if producer is not None and source is not None:
            producer.metadata_props.update(source.metadata_props)


def adopt(model: ir.Model, other: ir.Model) -> None:
    """Give ``model`` the graph of ``other``, and that graph the weights of ``model``."""
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    graph = other.graph
    for value in [v for v in graph.inputs if v.name in weights]:
        graph.inputs.remove(value)
    values = ir.convenience.create_value_mapping(graph)
    for name, tensor in weights.items():
        if name in values and values[name].producer() is None:
            values[name].const_value = tensor
            graph.register_initializer(values[name])
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(other)
    graph.metadata_props.update(model.graph.metadata_props)
    model.graph = graph


def _name_nodes(model: ir.Model) -> None:
    """Give every node a unique name: plans, reports and merges refer to nodes by name."""
    taken = {node.name for node in model.graph.all_nodes() if node.name}
    seen: set[str] = set()
    for index, node in enumerate(model.graph.all_nodes()):
        if not node.name or node.name in seen:
            base = node.name or f"{node.op_type}_{index}"
            name, extra = base, 0
            while name in taken or name in seen:
                extra += 1
                name = f"{base}_{extra}"
            node.name = name
        seen.add(node.name)


def _explicit_pads(model: ir.Model) -> None:
    """Turn auto_pad into pads where the spatial shape is known (ONNX Conv, MaxPool, ... docs)."""
    for node in model.graph:
        mode = node.attributes.get_string("auto_pad", "NOTSET")
        if mode == "NOTSET" or node.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool"):
            continue
        if mode == "VALID":
            node.attributes.pop("auto_pad")
            continue
        kernel = node.attributes.get_ints("kernel_shape") or dims(node.inputs[1])[2:]
        size = dims(node.inputs[0])[2:] if has_rank(node.inputs[0]) else (None,)
        if None in size or None in kernel:
            continue
        strides = node.attributes.get_ints("strides") or [1] * len(size)
        dilations = node.attributes.get_ints("dilations") or [1] * len(size)
        begin, end = [], []
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
            assert n is not None and k is not None
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            small, large = total // 2, total - total // 2
            begin.append(small if mode == "SAME_UPPER" else large)
            end.append(large if mode == "SAME_UPPER" else small)
        node.attributes.pop("auto_pad")
        node.attributes["pads"] = ir.AttrInt64s("pads", begin + end)


def infer_shapes(model: ir.Model) -> None:
    """Set the shapes and types that ONNX shape inference finds, without copying weights.

    Raises:
        ModelError: The graph contradicts itself; the message names the node.
    """
    with without_weights(model) as proto:
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
            raise ModelError(f"shape inference failed: {error}") from error
    found = {info.name: info.type for info in inferred.graph.value_info}
    found |= {info.name: info.type for info in inferred.graph.output}
    for node in model.graph:
        for value in node.outputs:
            if value.name in found:
                _set_type(value, found[value.name])


def _set_type(value: ir.Value, proto: onnx.TypeProto) -> None:
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    kind = ir.serde.deserialize_type_proto_for_type(proto)
    if kind is not None:
        value.type = kind
    if shape is not None:
        value.shape = shape


@contextmanager
def without_weights(
    model: ir.Model, limit: int = SMALL, only: Callable[[ir.Value], bool] = lambda value: True
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
        if tensor is None or (tensor.nbytes > limit and only(value)):
            big.append((value, tensor))
    try:
        for value, tensor in big:
            if tensor is not None:
                value.shape = ir.Shape(tensor.shape.numpy())
                value.type = ir.TensorType(tensor.dtype)
            del graph.initializers[name_of(value)]
            graph.inputs.append(value)
        yield ir.serde.serialize_model(model)
    finally:
        while len(graph.inputs) > n_inputs:
            graph.inputs.pop()  # a slice deletion would leave the values marked as inputs
        graph.initializers.clear()
        for value in held.values():
            graph.initializers.add(value)


# ------------------------------------------------------------------------- accessors


def has_rank(value: ir.Value | None) -> bool:
    """Tell whether the rank of ``value`` is known."""
    return value is not None and value.shape is not None


def dims(value: ir.Value | None) -> tuple[int | None, ...]:
    """Return the dimensions of ``value``, None for each one not known or symbolic.

    Raises:
        ModelError: The rank is not known.
    """
    if value is None or value.shape is None:
        name = "a missing input" if value is None else repr(value.name)
        raise ModelError(f"the shape of {name} is not known; give the inputs' shapes")
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def name_of(value: ir.Value | None) -> str:
    """Return the name of ``value``; every value of a loaded model has one."""
    assert value is not None and value.name is not None
    return value.name


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the numbers of an initializer, or None when ``value`` is computed or an input."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def new_initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """Add ``array`` to ``graph`` as an initializer with a free name beginning with ``name``."""
    free, extra = name, 0
    while free in graph.initializers:
        extra += 1
        free = f"{name}_{extra}"
    tensor = ir.Tensor(np.require(array, requirements="C"), name=free)
    value = ir.Value(
        name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


# ------------------------------------------------------------------------------ save


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    external_data: bool | None = None,
) -> None:
    """Write ``model`` to ``path``, whole or not at all.

    Args:
        model: The model; it stays as it is, its memory-mapped weights are streamed.
        path: Where to. With external data a second file, ``<path>.data``, stands beside it.
        overwrite: Whether a file that is there may be replaced.
        external_data: True or False to ask for it, None for "where protobuf cannot hold it".

    Raises:
        UserError: The folder is missing, or the file is there and ``overwrite`` is False.
        OperationError: The disk refused (full, read-only).
    """
    target = Path(path)
    check_writable(target, overwrite=overwrite)
    if external_data is None:
        external_data = weight_bytes(model) > TWO_GB
    try:
        folder = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        _write(model, Path(folder) / target.name, external_data=external_data)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the .data file first
            os.replace(file, target.parent / file.name)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(target: Path, *, overwrite: bool) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        UserError: The folder is missing or read-only, or the file exists.
    """
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target}: the folder {target.parent} is read-only")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; give a file name")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists; choose another name or pass --force")


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _write(model: ir.Model, path: Path, *, external_data: bool) -> None:
    if external_data:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=SMALL)
    else:
        with embedded(model):
            proto = ir.serde.serialize_model(model)
        weights = {tensor.name for tensor in proto.graph.initializer}
        infos = [info for info in proto.graph.value_info if info.name not in weights]
        del proto.graph.value_info[:]  # a weight says its shape itself
        proto.graph.value_info.extend(infos)
        path.write_bytes(proto.SerializeToString())
    for file in path.parent.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


@contextmanager
def embedded(model: ir.Model) -> Iterator[None]:
    """Serialise external tensors by value for the time of the block."""
    values = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    held = [value.const_value for value in values]
    try:
        for value, tensor in zip(values, held, strict=True):
            assert tensor is not None
            value.const_value = ir.Tensor(tensor.numpy(), name=tensor.name)
        yield
    finally:
        for value, tensor in zip(values, held, strict=True):
            value.const_value = tensor


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> None:
    """Write a text file (plan, report, JSON), whole or not at all.

    Raises:
        UserError: As in `save`.
        OperationError: As in `save`.
    """
    write_file(path, lambda file: file.write_text(text), overwrite=overwrite)


def write_file(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = False
) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place.

    Raises:
        UserError: As in `save`.
        OperationError: As in `save`.
    """
    target = Path(path)
    check_writable(target, overwrite=overwrite)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
