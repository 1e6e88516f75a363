"""onnx_graphsurgeon in and out: passes written on `gs.Graph`.

graphsurgeon drops a good part of what a model says (metadata, doc strings, quantisation
annotations, unused weights, ...) and copies a weight that an If or Loop captures into each of its
branches. `from_gs` takes all that from the model that the graph came from and puts it back. What
graphsurgeon would corrupt, or crash on, `to_gs` refuses by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_ir.passes import common

from onnxslim_kd import model as model_io
from onnxslim_kd import plugins
from onnxslim_kd.errors import ModelError, OnnxSlimError, PassError
from onnxslim_kd.restore import restore


def apply(model: ir.Model, spec: str) -> ir.Model:
    """Run a user's pass on a copy of ``model``.

    Args:
        model: The model; it stays as it is.
        spec: ``package.module:function``, taking a `gs.Graph` and returning one, or None when it
            changes the graph in place. A function with a true attribute ``changes_interface`` may
            change the graph's inputs and outputs.

    Returns:
        The checked and normalised result.

    Raises:
        UserError: There is no such function, or graphsurgeon cannot hold the model.
        PassError: The function fails, or its result is no valid model.
    """
    function = plugins.find(spec)
    result = _run(function, to_gs(model), spec)
    try:
        changed = from_gs(result, model)
        model_io.normalised(changed)
    except (ModelError, PassError) as error:
        raise PassError(f"{spec}: {error}") from error
    if not getattr(function, "changes_interface", False):
        _same_interface(model, changed, spec)
    return changed


def _run(function: Callable[..., Any], graph: gs.Graph, spec: str) -> gs.Graph:
    try:
        result = function(graph)
    except OnnxSlimError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise PassError(f"{spec} fails: {type(error).__name__}: {error}") from error
    if result is None:
        return graph
    if not isinstance(result, gs.Graph):
        raise PassError(
            f"{spec} returns a {type(result).__name__}, not a graphsurgeon Graph or None"
        )
    return result


def _same_interface(before: ir.Model, after: ir.Model, spec: str) -> None:
    for kind in ("inputs", "outputs"):
        old, new = (
            [(value.name, value.dtype) for value in getattr(model.graph, kind)]
            for model in (before, after)
        )
        if old != new:
            shown = ", ".join(f"{name} ({dtype})" for name, dtype in new) or "none"
            raise PassError(
                f"{spec} changes the {kind} to {shown}; if it means to, set"
                f" {spec.rpartition(':')[2]}.changes_interface = True"
            )


# ---------------------------------------------------------------------- there and back


def to_gs(model: ir.Model) -> gs.Graph:
    """Return ``model`` as a graphsurgeon graph; functions are inlined.

    Raises:
        ModelError: The model holds what graphsurgeon corrupts or crashes on.
    """
    _refuse(model)
    if model.functions:
        model = model.clone()
        common.InlinePass()(model)
    with model_io.embedded(model):
        proto = ir.serde.serialize_model(model)
    with _quiet():
        return gs.import_onnx(proto)


def from_gs(graph: gs.Graph, like: ir.Model) -> ir.Model:
    """Return a graphsurgeon graph as a model, with what graphsurgeon dropped put back.

    Args:
        graph: The graph.
        like: The model that it came from. It stays as it is; unchanged weights are shared.

    Raises:
        PassError: The graph is no valid model.
    """
    try:
        with _quiet():
            proto = gs.export_onnx(graph)
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # graphsurgeon and onnx-ir raise many kinds on broken graphs
        reason = f"{type(error).__name__}: {error}"
        raise PassError(f"graphsurgeon cannot write the graph: {reason}") from error
    model.ir_version = max(like.ir_version or 4, 4)  # below 4, initializers must be inputs
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.domain, model.model_version = like.domain, like.model_version
    model.doc_string = like.doc_string
    model.metadata_props.update(like.metadata_props)
    model.meta.update(like.meta)
    restore(model.graph, like.graph)
    _sort(model.graph)
    _check(model)
    return model


def _sort(graph: ir.Graph) -> None:
    try:
        graph.sort()
    except ValueError as error:
        raise PassError(f"the graph has a cycle: {error}") from error


def _check(model: ir.Model) -> None:
    with model_io.without_weights(model) as proto:
        try:
            onnx.checker.check_model(proto, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise PassError(f"the result is no valid model: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep graphsurgeon's log lines about what is put back afterwards to itself."""
    with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):
        yield


# ---------------------------------------------------------------------------- refusals


def _refuse(model: ir.Model) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in CORRUPTED:
                _refuse_type(f"weight {value.name}", value.const_value.dtype)
        for node in graph:
            for attribute in node.attributes.values():
                _refuse_attribute(node, attribute)
            for output in node.outputs:
                if isinstance(output.type, ir.OptionalType):
                    raise ModelError(f"{output.name} is optional; graphsurgeon cannot hold that")


def _refuse_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    where = f"attribute {attribute.name} of node {node.name}"
    value = attribute.value
    if attribute.type == ir.AttributeType.GRAPHS:
        raise ModelError(f"{where} is a list of graphs; graphsurgeon cannot hold that")
    if attribute.type in LISTS and not value:
        raise ModelError(f"{where} is an empty list; graphsurgeon cannot write that")
    if attribute.type == ir.AttributeType.TENSOR and value.dtype in CORRUPTED:
        _refuse_type(where, value.dtype)
    strings = value if attribute.type == ir.AttributeType.STRINGS else [value]
    if any(isinstance(string, bytes) for string in strings):
        raise ModelError(f"{where} holds bytes that are no text; graphsurgeon cannot read that")


def _refuse_type(where: str, dtype: ir.DataType) -> None:
    raise ModelError(f"{where} has type {dtype.name}, which graphsurgeon corrupts")


CORRUPTED = {
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.FLOAT4E2M1,
    ir.DataType.INT2,
    ir.DataType.UINT2,
    ir.DataType.FLOAT8E4M3FNUZ,  # becomes E4M3FN
}
LISTS = {
    ir.AttributeType.INTS,
    ir.AttributeType.FLOATS,
    ir.AttributeType.STRINGS,
}
