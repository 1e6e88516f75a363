"""Steps that make a graph smaller and change no output: what libraries lack, and their order.

Each function changes the model in place. `STEPS` at the bottom is the order, with its reasons.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd import runtime
from onnxslim_kd.errors import PassError
from onnxslim_kd.model import (
    SMALL,
    adopt,
    embedded,
    infer_shapes,
    load,
    name_of,
    weight_bytes,
    without_weights,
)
from onnxslim_kd.passes.chains import join_chains
from onnxslim_kd.passes.fold import fold, fold_scales
from onnxslim_kd.passes.gate import Step, size
from onnxslim_kd.passes.idle import passed_on
from onnxslim_kd.passes.shape_fold import fold_known
from onnxslim_kd.passes.simplify import fuse_hard_swish, merge_slices, unflatten_softmax
from onnxslim_kd.runtime import Array

GROWTH, SHARE = 4096, 0.01
"""Bytes, and share of all weights, by which folding may let them grow where it removes nodes."""
_ROUNDS = 4
"""Of folding shapes; real graphs need two."""
_SAMPLE = 64
"""Numbers of a weight that are looked at before all are."""
_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"


def remove_dead(model: ir.Model) -> None:
    """Remove nodes and initializers that no output needs."""
    common.RemoveUnusedNodesPass()(model)


def remove_identities(model: ir.Model) -> None:
    """Remove nodes that pass an input on: Identity, idle Dropout, Concat of one, Mul by 1 ...

    1. ``y = Identity(x)`` with y no output of a graph: uses of y become uses of x.
    2. y an output, x from the same graph and itself no output: x takes the name of y.
    3. y an output, x from outside (an input, an initializer, an outer graph): stays.
    """
    for node in list(model.graph.all_nodes()):
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


def fold_and_fuse(model: ir.Model) -> None:
    """Fold small constants and fuse what ONNX Runtime's basic level does, the portable one.

    Raises:
        PassError: The runtime wrote what is not standard ONNX.
    """
    _through_runtime(model, SMALL)


def fold_large(model: ir.Model) -> None:
    """Fold large constants where nodes are left that read nothing else, unless weights grow."""
    if any(_is_constant(node) for node in model.graph.all_nodes()):
        limit = max([SMALL, *(v.const_value.nbytes for v in _initializers(model))])  # type: ignore[union-attr]
        _through_runtime(model, limit, growth=max(GROWTH, SHARE * weight_bytes(model)))


def fold_shapes(model: ir.Model) -> None:
    """Fold what follows from shapes; again while that makes more shapes known."""
    if any(node.op_type in ("Shape", "Size") for node in model.graph):
        for _ in range(_ROUNDS):
            if not fold_known(model):
                break
            remove_dead(model)


def fold_branches(model: ir.Model) -> None:
    """Fold shapes inside of branches, and branches with a known condition.

    Twice: a branch that is inlined makes the shapes behind it known. Weights are not touched.
    """
    if not any(node.op_type == "If" for node in model.graph.all_nodes()):
        return
    from onnxscript import optimizer

    for _ in range(2):
        optimizer.fold_constants(
            model, onnx_shape_inference=True, input_size_limit=SMALL, output_size_limit=SMALL
        )
        remove_identities(model)
        remove_dead(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def refold(model: ir.Model) -> None:
    """Fold and fuse again where folding a first time, or branches, opened something up."""
    nodes = size(model)
    fold_shapes(model)
    if size(model) < nodes or any(map(_is_constant, model.graph.all_nodes())):
        fold_and_fuse(model)


def _through_runtime(model: ir.Model, limit: int, growth: float = math.inf) -> None:
    """Give ``model`` the graph that the runtime makes of it, if it is smaller.

    Args:
        model: Changed in place.
        limit: Bytes up to which the runtime may write out a folded constant.
        growth: Bytes by which all weights together may grow.
    """
    before = weight_bytes(model)
    done = _optimised(model, limit)
    domains = {node.domain for node in model.graph.all_nodes()}
    foreign = {node.domain for node in done.graph.all_nodes()} - domains
    if foreign:
        raise PassError(f"ONNX Runtime wrote operators of {', '.join(sorted(foreign))}")
    fuse_hard_swish(done)  # the runtime spells it out
    after = weight_bytes(done)
    if after <= before + growth and (size(done) < size(model) or after < before):
        done.graph.name = model.graph.name
        model.graph = done.graph


def _initializers(model: ir.Model) -> list[ir.Value]:
    return [v for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]


def _is_constant(node: ir.Node) -> bool:
    given = [value for value in node.inputs if value is not None]
    return bool(given) and all(map(_is_known, given))


def _is_known(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _optimised(model: ir.Model, limit: int) -> ir.Model:
    """Write the model through ONNX Runtime, without the weights that it would only copy."""
    done = ir.Model(model.graph, ir_version=model.ir_version)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        with embedded(model), without_weights(model, only=_is_layer_weight) as proto:
            source.write_bytes(proto.SerializeToString())
        runtime.write_optimised(source, target, settings={_LIMIT: str(limit)})
        adopt(done, load(target, normalise=False))
    common.NameFixPass()(done)
    infer_shapes(done)  # the runtime writes none
    return done


def _is_layer_weight(value: ir.Value) -> bool:
    """Whether only layers read ``value``, together with something computed: nothing to fold."""
    users = value.consumers()
    return bool(users) and all(
        user.op_type in _LAYERS and not all(_is_known(other) for other in user.inputs if other)
        for user in users
    )


def share_equals(model: ir.Model) -> None:
    """Compute equal expressions once, and hold equal weights once."""
    common.CommonSubexpressionEliminationPass()(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    _share_weights(model.graph)


def _share_weights(graph: ir.Graph) -> None:
    """Let equal weights be one; few bytes of each tell most of them apart."""
    known: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in list(graph.initializers.values()):
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
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None


_LAYERS = ("Conv", "ConvTranspose", "Gather", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
"""Operators that read weights as they are; `fold` has done what could be done to them."""

STEPS = (
    Step("dead code", remove_dead),  # first: what is not needed must not block a fusion
    Step("identities", remove_identities),  # they stand between layers that could be fused
    Step("softmax", unflatten_softmax),  # before its Shape nodes are folded
    Step("shape arithmetic", fold_shapes),
    Step("constants and fusions", fold_and_fuse),
    Step("branches", fold_branches),
    Step("shapes and constants again", refold),
    Step("large constants", fold_large),
    Step("batch norm", fold),  # its parameters are constants now
    Step("scales", fold_scales),
    Step("hard swish", fuse_hard_swish),
    Step("slices", merge_slices),
    Step("chains", join_chains),  # after scales: layers take up more of them
    Step("duplicates", share_equals),  # folding makes equal constants
    Step("identities", remove_identities),
    Step("dead code", remove_dead),
    Step("notes", remove_notes),  # last: shapes serve the others
)
"""The order of infer-prune."""
