"""Turn a file or message into a graph, its weights still in the file."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import google.protobuf.message
import onnx
import onnx_ir as ir

from onnxslim_kd import mapped
from onnxslim_kd.access import graphs
from onnxslim_kd.errors import ModelError, UserError
from onnxslim_kd.inference import SMALL, inferred, set_types
from onnxslim_kd.normalise import written_version
from onnxslim_kd.raising import graphs_of, raise_message
from onnxslim_kd.refusals import refuse_external, refuse_form, tensors
from onnxslim_kd.wire import Buffer

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

ModelLike: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | gs.Graph"


def called(source: ModelLike) -> str:
    """What to call a model in a message."""
    is_path = isinstance(source, str | os.PathLike)
    return str(source) if is_path else f"the given {type(source).__name__}"


def read(
    source: ModelLike, *, infer: bool, operators: Counter[str] | None = None
) -> tuple[ir.Model, bool]:
    """Return the graph as it is, and whether its shapes were inferred on the way.

    Args:
        source: A path, proto or graph; a message or model is copied.
        infer: Whether to infer shapes, where that can be done on the message: it saves a round
            trip from the graph.
        operators: Filled with how often each operator stands in the source.

    Raises:
        ModelError: It cannot be read.
        UserError: It is no model.
    """
    if isinstance(source, ir.Model):
        _count(operators, (node.op_type for graph in graphs(source) for node in graph))
        return source.clone(), False
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source), operators, infer=infer)
    proto = _proto_of(source)
    refuse_form(proto, called(source))
    _count(operators, operators_of(proto.graph))
    return ir.serde.deserialize_model(proto), False


def _proto_of(source: ModelLike) -> onnx.ModelProto:
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)  # onnx-ir's tensors are views: a new name would reach the caller's
        return proto
    import onnx_graphsurgeon as gs

    if isinstance(source, gs.Graph):
        exported: onnx.ModelProto = gs.export_onnx(source)
        return exported
    raise UserError(
        f"a model must be a path, a ModelProto, an onnx_ir.Model or a graphsurgeon Graph,"
        f" got {type(source).__name__}"
    )


def _count(operators: Counter[str] | None, found: Iterable[str]) -> None:
    if operators is not None:
        operators.update(found)


def operators_of(graph: onnx.GraphProto) -> Iterator[str]:
    """Give the operator of every node, those inside of bodies too."""
    return (node.op_type for inner in graphs_of(graph) for node in inner.node)


def _from_file(path: Path, operators: Counter[str] | None, *, infer: bool) -> tuple[ir.Model, bool]:
    proto, data = _read_proto(path)
    refuse_form(proto, str(path))
    _count(operators, operators_of(proto.graph))
    typed = _typed(proto) if infer else None
    model = ir.serde.deserialize_model(proto) if typed is None else typed
    inside = graphs(model)
    mapped.attach(inside, data)
    for tensor in tensors(inside):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.resolve().parent
            refuse_external(tensor)
    _read_small(inside)
    return model, typed is not None


def _read_proto(path: Path) -> tuple[onnx.ModelProto, Buffer]:
    if not path.is_file():
        what = "is a folder, not a model" if path.is_dir() else "no such file"
        raise ModelError(f"{path}: {what}")
    try:
        proto, data = mapped.read(path)
    except (google.protobuf.message.DecodeError, ValueError) as error:
        raise ModelError(f"{path}: not an ONNX file, or cut short ({error})") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: not an ONNX model (no graph or no opset)")
    return proto, data


def _typed(proto: onnx.ModelProto) -> ir.Model | None:
    """Infer shapes before there is a graph; None where that is too early."""
    _lift_constants(proto.graph)
    if not _can_infer(proto):
        return None
    proto.ir_version = written_version(proto.ir_version)
    _correct_inputs(proto.graph)
    try:
        raise_message(proto)
        for graph in graphs_of(proto.graph):
            _lift_constants(graph)  # in bodies, and attributes that became inputs
        proto = inferred(proto)
    except ModelError:
        return None  # said again, better, once the graph was looked at
    graph = proto.graph
    infos = list(graph.value_info)
    del graph.value_info[:]
    graph.value_info.extend(info for info in infos if info.metadata_props or info.doc_string)
    model = ir.serde.deserialize_model(proto)
    set_types(model.graph, {info.name: info.type for info in infos})
    return model


def _can_infer(proto: onnx.ModelProto) -> bool:
    """Tell whether there is nothing to normalise first that inference depends on."""
    return not proto.functions and not any(map(_is_elsewhere, proto.graph.initializer))


def _correct_inputs(graph: onnx.GraphProto) -> None:
    """Leave what is an input, for old files list their weights too, and free sizes of -1."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [info for info in graph.input if info.name not in weights]
    if len(inputs) < len(graph.input):
        del graph.input[:]
        graph.input.extend(inputs)
    for info in graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.ClearField("value")


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Make initializers of Constant nodes while they are messages, where it costs little."""
    outputs = {info.name for info in graph.output}
    nodes = list(graph.node)
    lifted = [node for node in nodes if _is_constant(node) and node.output[0] not in outputs]
    if not lifted:
        return
    for node in lifted:
        node.attribute[0].t.name = node.output[0]
        graph.initializer.append(node.attribute[0].t)
    gone = {node.output[0] for node in lifted}
    graph.node.sort(key=lambda node: bool(node.output) and node.output[0] in gone)  # to the end
    del graph.node[-len(lifted) :]


def _is_constant(node: onnx.NodeProto) -> bool:
    return (
        node.op_type == "Constant"
        and node.domain == ""
        and [attribute.name for attribute in node.attribute] == ["value"]
    )


def _is_elsewhere(tensor: onnx.TensorProto) -> bool:
    """Tell whether a tensor is external data that shape arithmetic may need."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return False
    return prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth <= 8 * SMALL


def _read_small(inside: list[ir.Graph]) -> None:
    """Hold small external tensors in memory: onnx's own passes look for their files elsewhere."""
    for graph in inside:
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL:
                value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)
