"""Raise the opset of a message: ONNX's own converter, and what it gets wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx
from onnx import helper, numpy_helper

from onnxslim_kd.errors import ModelError

OPSET = 17
"""The lowest opset that passes see; older models are raised to it."""
_PARK = "onnxslim_kd.parked"


def raise_message(proto: onnx.ModelProto, lowest: int = OPSET) -> None:
    """Convert ``proto`` to opset ``lowest``, in place, unless it has that or a newer one.

    Raises:
        ModelError: An operator has no newer form.
    """
    own = next((entry for entry in proto.opset_import if not entry.domain), None)
    if own is None or own.version >= lowest:
        return
    if any(_changes(operator, own.version, lowest) for operator in _operators(proto.graph)):
        _convert(proto, own.version, lowest)
    own.version = lowest


def _operators(graph: onnx.GraphProto) -> set[str]:
    """ONNX's own operators in a graph and its bodies."""
    return {node.op_type for g in graphs_of(graph) for node in g.node if not node.domain}


def _changes(operator: str, version: int, newer: int) -> bool:
    """Tell whether ``operator`` is defined anew between two opsets."""
    if not onnx.defs.has(operator, version):
        return False
    old, new = (onnx.defs.get_schema(operator, v).since_version for v in (version, newer))
    return bool(old != new)


def _convert(proto: onnx.ModelProto, version: int, newer: int) -> None:
    finish = [correct(proto.graph) for last, correct in _WRONG if version <= last < newer]
    with _parked(proto, version):
        try:
            raised = onnx.version_converter.convert_version(proto, newer)
        except (RuntimeError, ValueError) as error:
            why = str(error).rpartition("failed: ")[2]
            what = f"opset {version} cannot be raised to {newer}: {why}"
            raise ModelError(what) from error
    _leave(raised.graph)
    for done in finish:
        done(raised.graph)
    _carry_notes(proto.graph, raised.graph)
    proto.graph.CopyFrom(raised.graph)


@contextmanager
def _parked(proto: onnx.ModelProto, version: int) -> Iterator[None]:
    """Hide operators from the converter that their opset does not have.

    ONNX Runtime writes its LayerNormalization and SimplifiedLayerNormalization into files of any
    opset; at 17 the first is ONNX's own.
    """
    unknown = {name for name in _operators(proto.graph) if not onnx.defs.has(name, version)}
    if not unknown:
        yield
        return
    for graph in graphs_of(proto.graph):
        for node in graph.node:
            if node.op_type in unknown and not node.domain:
                node.domain = _PARK
    proto.opset_import.add(domain=_PARK, version=1)
    try:
        yield
    finally:
        proto.opset_import.pop()
        _leave(proto.graph)


def _leave(graph: onnx.GraphProto) -> None:
    """Give parked nodes their domain back."""
    for inner in graphs_of(graph):
        for node in inner.node:
            if node.domain == _PARK:
                node.domain = ""


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Give a graph and every body inside of it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from graphs_of(inner)


def _carry_notes(old: onnx.GraphProto, new: onnx.GraphProto) -> None:
    """Copy what the converter drops: metadata, quantisation annotations, a weight's doc string."""
    new.metadata_props.extend(old.metadata_props)
    new.quantization_annotation.extend(old.quantization_annotation)
    for notes in (_values, _nodes):
        known = {name: it for name, it in notes(old) if it.metadata_props or it.doc_string}
        for name, it in notes(new) if known else ():
            if name in known:
                it.metadata_props.extend(known[name].metadata_props)
            if name in known and known[name].doc_string:
                it.doc_string = known[name].doc_string


def _values(
    graph: onnx.GraphProto,
) -> Iterator[tuple[str, onnx.ValueInfoProto | onnx.TensorProto]]:
    for inner in graphs_of(graph):
        for info in (*inner.input, *inner.output, *inner.value_info):
            yield info.name, info
        for tensor in inner.initializer:
            yield tensor.name, tensor


def _nodes(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The nodes, by their first outputs."""
    for inner in graphs_of(graph):
        for node in inner.node:
            if node.output:
                yield node.output[0], node


# What the converter gets wrong. Each looks at a graph before it, and returns what to do after.

_Finish = Callable[[onnx.GraphProto], None]


def _resize(graph: onnx.GraphProto) -> _Finish:
    """Up to opset 10, points were taken at index / scale; the converter says nothing of that."""
    nearest = {}
    for inner in graphs_of(graph):
        for node in inner.node:
            if node.op_type in ("Upsample", "Resize"):
                nearest[node.output[0]] = b"ceil" if _shrinks(node, inner) else b"floor"

    def finish(raised: onnx.GraphProto) -> None:
        for inner in graphs_of(raised):
            for node in inner.node:
                if node.output[0] in nearest:
                    where = "coordinate_transformation_mode"
                    node.attribute.append(helper.make_attribute(where, b"asymmetric"))
                    how = helper.make_attribute("nearest_mode", nearest[node.output[0]])
                    node.attribute.append(how)

    return finish


def _shrinks(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Tell whether a resize makes smaller: ONNX Runtime then took the next point, not the last."""
    given = [list(a.floats) for a in node.attribute if a.name == "scales"]
    given += [
        numpy_helper.to_array(t).tolist() for t in graph.initializer if t.name == node.input[-1]
    ]
    return any(min(scales) < 1 and max(scales) <= 1 for scales in given)


def _pad(graph: onnx.GraphProto) -> _Finish:
    """The converter leaves a value that the mode has no use for as an attribute."""
    for inner in graphs_of(graph):
        for node in inner.node:
            idle = [a for a in node.attribute if a.name == "value" and node.op_type == "Pad"]
            if idle and any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
                node.attribute.remove(idle[0])
    return lambda _: None


def _hardmax(graph: onnx.GraphProto) -> _Finish:
    """Up to opset 12, the maximum was that over all axes from the given one on."""
    for inner in graphs_of(graph):
        nodes = list(inner.node)
        del inner.node[:]
        for node in nodes:
            flat = node.op_type == "Hardmax" and not node.domain
            inner.node.extend(_flattened(node) if flat else [node])
    return lambda _: None


def _flattened(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape, flat, top = (f"{node.output[0]}/{step}" for step in ("shape", "flat", "top"))
    return [
        helper.make_node("Shape", [node.input[0]], [shape]),
        helper.make_node("Flatten", [node.input[0]], [flat], axis=axis),
        helper.make_node("Hardmax", [flat], [top], name=node.name, axis=1),
        helper.make_node("Reshape", [top, shape], [node.output[0]]),
    ]


_WRONG: list[tuple[int, Callable[[onnx.GraphProto], _Finish]]] = [
    (10, _resize),
    (10, _pad),
    (12, _hardmax),
]
"""Until which opset, and what."""
