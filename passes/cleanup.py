"""Steps that make a graph smaller and change no output: what libraries lack, and their order.

Each function changes the model in place. `STEPS` at the bottom is the order, with its reasons.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd import runtime
from onnxslim_kd.errors import PassError
from onnxslim_kd.model import (
    SMALL,
    adopt,
    constant,
    infer_shapes,
    load,
    weight_bytes,
    without_weights,
)
from onnxslim_kd.passes.fold import fold, fold_scales
from onnxslim_kd.passes.gate import Step, size
from onnxslim_kd.passes.simplify import fuse_hard_swish, merge_slices, unflatten_softmax

GROWTH = 4096
"""Bytes by which constant folding may let the weights grow, where it removes nodes for them."""
_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"


def remove_dead(model: ir.Model) -> None:
    """Remove nodes and initializers that no output needs."""
    common.RemoveUnusedNodesPass()(model)


def remove_identities(model: ir.Model) -> None:
    """Remove nodes that pass their input on: Identity, idle Dropout, Concat of one ...

    1. ``y = Identity(x)`` with y no output of a graph: uses of y become uses of x.
    2. y an output, x from the same graph and itself no output: x takes the name of y.
    3. y an output, x from outside (an input, an initializer, an outer graph): stays.
    """
    for node in list(model.graph.all_nodes()):
        if not node.domain and node.op_type in _PASS_ON and _PASS_ON[node.op_type](node):
            _remove_identity(node)


def _remove_identity(node: ir.Node) -> None:
    source, output, graph = node.inputs[0], node.outputs[0], node.graph
    assert source is not None and graph is not None
    if output.is_graph_output():
        producer = source.producer()
        if producer is None or producer.graph is not graph or source.is_graph_output():
            return
        source.name = output.name
        source.shape, source.type = output.shape or source.shape, output.type or source.type
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _idle_dropout(node: ir.Node) -> bool:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    flag = constant(training)
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    seen = mask is not None and (mask.uses() or mask.is_graph_output())
    return not seen and (training is None or (flag is not None and not flag.any()))


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 2


def fold_shapes(model: ir.Model) -> None:
    """Fold what follows from shapes, inside of branches too, and branches with a known condition.

    Twice: a branch that is inlined makes the shapes behind it known. Weights are not touched.
    """
    from onnxscript import optimizer

    if any(node.op_type in _FROM_SHAPES for node in model.graph.all_nodes()):
        for _ in range(2):
            optimizer.fold_constants(
                model,
                onnx_shape_inference=True,
                input_size_limit=SMALL,
                output_size_limit=SMALL,
            )
            remove_identities(model)
            remove_dead(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def fold_and_fuse(model: ir.Model) -> None:
    """Fold constants and fuse what ONNX Runtime's basic level does, the portable one.

    Raises:
        PassError: The runtime wrote what is not standard ONNX.
    """
    before = weight_bytes(model)
    limit = max([SMALL, *(v.const_value.nbytes for v in _initializers(model))])  # type: ignore[union-attr]
    done = _optimised(model, limit)
    if weight_bytes(done) > before + GROWTH:
        done = _optimised(model, SMALL)
    domains = {node.domain for node in model.graph.all_nodes()}
    foreign = {node.domain for node in done.graph.all_nodes()} - domains
    if foreign:
        raise PassError(f"ONNX Runtime wrote operators of {', '.join(sorted(foreign))}")
    fuse_hard_swish(done)  # the runtime spells it out
    if size(done) >= size(model) and weight_bytes(done) >= before:
        return
    done.graph.name = model.graph.name
    model.graph = done.graph


def _initializers(model: ir.Model) -> list[ir.Value]:
    return [v for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]


def _optimised(model: ir.Model, limit: int) -> ir.Model:
    """Write the model through ONNX Runtime, without the weights that it would only copy."""
    done = model.clone()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        with without_weights(model, only=_is_layer_weight) as proto:
            onnx.save(proto, source)
        runtime.write_optimised(source, target, settings={_LIMIT: str(limit)})
        adopt(done, load(target, normalise=False))
    common.NameFixPass()(done)
    infer_shapes(done)  # the runtime writes none
    return done


def _is_layer_weight(value: ir.Value) -> bool:
    """Whether only layers read ``value``, together with something computed: nothing to fold."""
    users = value.consumers()
    return bool(users) and all(
        user.op_type in _LAYERS and any(constant(other) is None for other in user.inputs if other)
        for user in users
    )


def share_equals(model: ir.Model) -> None:
    """Compute equal expressions once, and hold equal weights once."""
    common.CommonSubexpressionEliminationPass()(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.DeduplicateHashedInitializersPass()(model)


def remove_notes(model: ir.Model) -> None:
    """Remove what no runtime reads: documentation and shapes inside the graph.

    The model's own metadata stays: label lists and preprocessing live there.
    """
    kept = dict(model.metadata_props)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(kept)
    common.RemoveUnusedOpsetsPass()(model)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None


_PASS_ON: dict[str, Callable[[ir.Node], bool]] = {
    "Identity": lambda node: True,
    "Concat": lambda node: len(node.inputs) == 1,
    "Dropout": _idle_dropout,
    "Flatten": lambda node: node.attributes.get_int("axis", 1) == 1 and _is_matrix(node.inputs[0]),
}
"""Operators that pass their first input on, and when."""

_LAYERS = ("Conv", "ConvTranspose", "Gather", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
"""Operators that read weights as they are; `fold` has done what could be done to them."""

_FROM_SHAPES = ("Shape", "Size", "If")
"""Operators without which there is no shape arithmetic."""

STEPS = (
    Step("dead code", remove_dead),  # first: what is not needed must not block a fusion
    Step("identities", remove_identities),  # they stand between layers that could be fused
    Step("softmax", unflatten_softmax),  # before its Shape nodes are folded
    Step("shape arithmetic", fold_shapes),  # leaves fewer branches for what follows
    Step("constants and fusions", fold_and_fuse),
    Step("batch norm", fold),  # its parameters are constants now
    Step("scales", fold_scales),
    Step("hard swish", fuse_hard_swish),
    Step("slices", merge_slices),
    Step("duplicates", share_equals),  # folding makes equal constants
    Step("identities", remove_identities),
    Step("dead code", remove_dead),
    Step("notes", remove_notes),  # last: shapes serve the others
)
"""The order of infer-prune."""
