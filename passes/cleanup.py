"""Steps that make a graph smaller and change no output: what libraries lack, and their order.

Each function changes the model in place. `STEPS` at the bottom is the order, with its reasons.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd.access import graphs
from onnxslim_kd.model import name_of
from onnxslim_kd.passes.branches import read_claims
from onnxslim_kd.passes.chains import join_chains
from onnxslim_kd.passes.constants import fold_constants
from onnxslim_kd.passes.fold import fold as fold_norms
from onnxslim_kd.passes.fold import fold_scales
from onnxslim_kd.passes.fusions import fuse
from onnxslim_kd.passes.gate import Step
from onnxslim_kd.passes.idle import passed_on
from onnxslim_kd.passes.shape_fold import fold_known
from onnxslim_kd.passes.simplify import fuse_hard_swish, merge_slices, unflatten_softmax
from onnxslim_kd.runtime import Array

_ROUNDS = 8
"""Of folding shapes and constants; real graphs need two, or one for each stage of a network."""
_SAMPLE = 64
"""Numbers of a weight that are looked at before all are."""
_DECIDED = ("If", "Shape", "Size")
"""Operators that facts about shapes decide about."""


def remove_dead(model: ir.Model) -> None:
    """Remove nodes and initializers that no output needs."""
    common.RemoveUnusedNodesPass()(model)


def remove_identities(model: ir.Model) -> None:
    """Remove nodes that pass an input on: Identity, idle Dropout, Concat of one, Mul by 1 ...

    1. ``y = Identity(x)`` with y no output of a graph: uses of y become uses of x.
    2. y an output, x from the same graph and itself no output: x takes the name of y.
    3. y an output, x from outside (an input, an initializer, an outer graph): stays.
    """
    for graph in graphs(model):
        for node in list(graph):
            source = passed_on(node)
            if source is not None:
                _remove_identity(node, source)


def _remove_identity(node: ir.Node, source: ir.Value) -> None:
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    if output.is_graph_output():
        producer = source.producer()
        if producer is None or producer.graph is not graph or source.is_graph_output():
            return
        source.name = output.name
        source.shape, source.type = output.shape or source.shape, output.type or source.type
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def fold(model: ir.Model) -> None:
    """Fold shapes and constants, again while a constant may make more shapes known."""
    read_claims(model)
    for turn in range(_ROUNDS):
        known = fold_known(model) if _reads_shapes(model) else 0
        if known:
            remove_dead(model)
        folded = fold_constants(model)
        if known or folded:
            remove_identities(model)
        if turn == 0 and (known or folded):
            share_equals(model)  # what is the same need be folded once
        if not folded:
            break


def _reads_shapes(model: ir.Model) -> bool:
    return any(node.op_type in _DECIDED for graph in graphs(model) for node in graph)


def share_equals(model: ir.Model) -> None:
    """Compute equal expressions once, and hold equal weights once."""
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    _share_weights(model.graph)
    common.CommonSubexpressionEliminationPass()(model)  # equal constants are one by now


def _share_weights(graph: ir.Graph) -> None:
    """Let equal weights be one, by the shortest name; few bytes of each tell most of them apart."""
    known: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in sorted(graph.initializers.values(), key=lambda value: len(name_of(value))):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or _is_interface(value):
            continue
        sample = np.ascontiguousarray(tensor.numpy().reshape(-1)[:_SAMPLE]).tobytes()
        alike = known.setdefault((tensor.dtype, tuple(tensor.shape), sample), [])
        twin = next((other for other in alike if _same_bytes(other, value)), None)
        if twin is None:
            alike.append(value)
        else:
            value.replace_all_uses_with(twin)
            del graph.initializers[name_of(value)]


def _is_interface(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_graph_output()


def _same_bytes(one: ir.Value, two: ir.Value) -> bool:
    """Compare bytes, for NaN is unequal to itself and 0 equal to -0."""
    first, second = _bytes(one), _bytes(two)
    return bool(np.array_equal(first, second))


def _bytes(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.ascontiguousarray(value.const_value.numpy()).reshape(-1).view(np.uint8)


def remove_notes(model: ir.Model) -> None:
    """Remove what no runtime reads: documentation and shapes inside the graph.

    The model's own metadata stays: label lists and preprocessing live there.
    """
    kept = dict(model.metadata_props)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(kept)
    common.RemoveUnusedOpsetsPass()(model)
    for graph in graphs(model):
        for weight in graph.initializers.values():
            weight.metadata_props.clear()
        for value in (value for node in graph for value in node.outputs):
            if not value.is_graph_output():
                value.shape = value.type = None


STEPS = (
    Step("dead code", remove_dead),  # first: what is not needed must not block a fusion
    Step("identities", remove_identities),  # they stand between layers that could be fused
    Step("softmax", unflatten_softmax),  # before its Shape nodes are folded
    Step("shapes and constants", fold),
    Step("fusions", fuse),  # before scales: Gemm takes them up
    Step("batch norm", fold_norms),  # its parameters are constants now
    Step("scales", fold_scales),
    Step("hard swish", fuse_hard_swish),
    Step("slices", merge_slices),
    Step("chains", join_chains),  # after scales: layers take up more of them
    Step("duplicates", share_equals),  # folding makes equal constants
    Step("shapes and constants", fold_constants),  # what only duplicates kept from it
    Step("identities", remove_identities),
    Step("dead code", remove_dead),
    Step("notes", remove_notes),  # last: shapes serve the others
)
"""The order of infer-prune."""
