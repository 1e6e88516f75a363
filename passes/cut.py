"""Cut: slice the weights, repair what counts channels, check the shapes. It decides nothing."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd import shapes as shape_sampling
from onnxslim_kd.errors import PassError, UserError
from onnxslim_kd.memory import collection_paused
from onnxslim_kd.node_shapes import stated
from onnxslim_kd.passes import fixups, repairs
from onnxslim_kd.passes.channels import Birth, Ids
from onnxslim_kd.passes.groups import Analysis, analyse
from onnxslim_kd.plans import Member, Plan
from onnxslim_kd.shapes import Shape

PLAN_KEY = "onnxslim_kd.pruned"


def mark(analysis: Analysis, removed: Sequence[Ids]) -> Ids:
    """Return a mask over components, True for those that go."""
    mask = np.zeros(analysis.components.count, bool)
    for labels in removed:
        mask[labels] = True
    return mask


def cut(model: model_io.ModelLike, plan: Plan) -> ir.Model:
    """Return ``model`` without the channels that ``plan`` removes; it decides nothing.

    Raises:
        UserError: The plan was made for another model.
        PassError: The cut graph is not what the plan says.
    """
    analysis = analyse(
        model_io.load(model),
        attention=plan.options.attention,
        free_outputs=plan.options.free_outputs,
    )
    apply(analysis, removed_by(analysis, plan))
    return analysis.model


@collection_paused()
def removed_by(analysis: Analysis, plan: Plan) -> Ids:
    """Return the mask over components that ``plan`` means, for this model.

    Raises:
        UserError: The plan names what the model does not have, or cuts what must stay.
    """
    births = {(b.value.name, b.axis, b.size, b.node.name): b for b in analysis.births}
    # a vector has a birth per layer; plans may outlive names of nodes: then its first one counts
    nameless = {key[:3]: birth for key, birth in reversed(births.items())}
    gone: list[Ids] = []
    outputs: list[tuple[Member, Birth, Ids]] = []
    for member in (m for group in plan.groups for m in group.members):
        key = (member.parameter, member.axis, member.before)
        birth = births.get((*key, member.node)) or nameless.get(key)
        if birth is None:
            raise UserError(
                f"the plan was made for another model: here is no {member.parameter} with"
                f" {member.before} channels along axis {member.axis}"
            )
        if member.kept is not None:
            kept = np.array(member.kept, np.int64)
            drop = np.ones(birth.size, bool)
            drop[kept] = False
            gone.append(analysis.labels(birth)[drop])
            outputs.append((member, birth, kept))
    removed = mark(analysis, gone)
    for label in np.flatnonzero(removed & analysis.stays)[:1]:
        reason = analysis.components.pinned[int(label)]
        raise UserError(f"the plan was made for another model: it cuts what stays ({reason})")
    for member, birth, kept in outputs:
        keep = (~removed[analysis.labels(birth)]).nonzero()[0]
        if not np.array_equal(keep, kept):
            raise UserError(
                f"the plan was made for another model: {member.parameter} would keep"
                f" {len(keep)} channels, the plan says {member.after}"
            )
    return removed


@collection_paused()
def apply(analysis: Analysis, removed: Ids) -> dict[ir.Value, Shape]:
    """Slice the weights of the analysed model in place and repair what counts channels.

    Returns:
        The shapes that changed, for the sample of the analysis.

    Raises:
        PassError: The shapes of the cut graph are not what the plan says.
    """
    if not removed.any():
        return {}
    gone = removed[analysis.components.label].astype(bool)
    _ = analysis.other_sample  # of the graph before its weights change
    state = repairs.Cut(analysis, gone, analysis.new_shapes(removed))
    for value, shape in state.shapes.items():
        if 0 in shape and 0 not in analysis.shapes.shape[value]:
            raise PassError(f"{value.name} would lose all its channels, and a layer must not die")
    _slice_weights(analysis, gone)
    fixups.repair(state)
    _set_shapes(state)
    _check_shapes(state)
    return state.shapes


def _set_shapes(state: repairs.Cut) -> None:
    """Write the new extents into the shapes of all values; symbols stay symbols.

    A symbol that changes stands for a dynamic dimension times a cut one: nothing is known then.
    """
    for value, expected in state.shapes.items():
        if value.shape is None or value.is_initializer():
            continue
        before = state.analysis.shapes.shape[value]
        changed = zip(value.shape, before, expected, strict=True)
        value.shape = ir.Shape([_extent(*each) for each in changed])


def _extent(have: int | ir.SymbolicDim, old: int, new: int) -> int | ir.SymbolicDim:
    if old == new:
        return have
    return new if isinstance(have, int) else ir.SymbolicDim(None)


def _slice_weights(analysis: Analysis, gone: Ids) -> None:
    """Slice every weight along its cut axes; a vector shared by layers is cloned first."""
    axes: dict[ir.Value, dict[int, Ids]] = {}
    vectors: dict[ir.Value, list[tuple[Birth, Ids]]] = {}
    for birth, lost in zip(analysis.births, analysis.lost(gone), strict=True):
        vector = len(analysis.shapes.shape[birth.value]) == 1
        if birth.operand is None or not (lost or vector):
            continue
        keep = (~gone[birth.start : birth.start + birth.size]).nonzero()[0]
        if vector:
            vectors.setdefault(birth.value, []).append((birth, keep))
        else:
            axes.setdefault(birth.value, {})[birth.axis] = keep
    for value, cuts in axes.items():
        _slice(value, cuts)
    for value, uses in vectors.items():
        _slice_vector(analysis.model.graph, value, uses)


def _slice(value: ir.Value, cuts: Mapping[int, Ids]) -> None:
    array = _numbers(value)
    for axis, keep in sorted(cuts.items()):  # whole rows first: they are copied at once
        array = array[keep] if axis == 0 else np.take(array, keep, axis=axis)
    tensor = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    value.const_value, value.shape = tensor, tensor.shape


def _numbers(value: ir.Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None
    return value.const_value.numpy()  # of numbers that share bytes, too: one element for each


def _slice_vector(graph: ir.Graph, value: ir.Value, uses: Sequence[tuple[Birth, Ids]]) -> None:
    """Slice a vector for each of its uses; equal cuts share one."""
    whole = uses[0][0].size
    if all(len(keep) == whole for _, keep in uses):
        return
    alike = len({keep.tobytes() for _, keep in uses}) == 1 and not value.is_graph_output()
    if alike and len(uses) == len(value.uses()):
        _slice(value, {0: uses[0][1]})
        return
    clones: dict[bytes, ir.Value] = {}
    for birth, keep in uses:
        if len(keep) == whole:
            continue
        if keep.tobytes() not in clones:
            array = _numbers(value)[keep]
            clones[keep.tobytes()] = model_io.new_initializer(graph, value.name or "w", array)
        assert birth.operand is not None
        birth.node.replace_input_with(birth.operand, clones[keep.tobytes()])
    repairs.remove_dead(graph, [value])


def _check_shapes(state: repairs.Cut) -> None:
    """Infer the cut graph's shapes anew: each must be what the plan says."""
    model, before = state.analysis.model, state.analysis.shapes
    planned = {**before.shape, **state.shapes}
    found = shape_sampling.follow(model, before.inputs, planned).shape
    is_static = not shape_sampling.is_dynamic(model)
    for value in (v for node in model.graph for v in node.outputs if v in found):
        have, expected = found[value], planned.get(value, found[value])
        if have != expected:
            raise PassError(
                f"after the cut {value.name} has shape {list(have)}, the plan says {list(expected)}"
            )
        if is_static and stated(value) is None and not value.is_graph_output():
            value.shape = ir.Shape(have)


def record(model: ir.Model, plan: Plan) -> None:
    """Leave in the metadata which plan made the model, without its long lists."""
    summary = {
        "criterion": plan.criterion,
        "groups": len(plan.groups),
        "macs": [plan.macs_before, plan.macs_after],
        "approximate": plan.approximate,
    }
    model.metadata_props[PLAN_KEY] = json.dumps(summary)
