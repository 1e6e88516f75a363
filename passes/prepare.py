"""Bring a graph into the words that the rules of pruning and training know."""

import os
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxslim_kd.compare import Reference, tolerance_of
from onnxslim_kd.contrib import as_matrices
from onnxslim_kd.errors import ModelError, OperationError, ProofError
from onnxslim_kd.passes.branches import inline_branches
from onnxslim_kd.passes.standardise import standardise
from onnxslim_kd.passes.unfuse import unfuse

_STEPS = 0.1
"""Of a value's magnitude: what steps of quantised numbers add up to where one rounds otherwise."""


def prepare(model: ir.Model) -> tuple[str, ...]:
    """Inline known branches and spell out fused operators, in place; return what was done.

    Scales of a quantised weight that are one long vector become a matrix, which changes nothing.

    Args:
        model: A loaded model; one that has neither stays as it is.
    """
    notes = []
    as_matrices(model)
    standardise(model.graph)
    inlined = inline_branches(model)
    if inlined:
        notes.append(f"{inlined} If whose condition never changes: the branch taken was inlined")
    done = unfuse(model)
    if done.expanded:
        counts = ", ".join(f"{number} {name}" for name, number in sorted(done.expanded.items()))
        notes.append(
            f"{counts}: written as standard operators, which ONNX Runtime fuses when it loads them"
        )
    notes += [f"{name} was not spelled out: {reason}" for name, reason in done.left.items()]
    return tuple(notes)


def insist_equal(
    source: "str | os.PathLike[str] | ir.Model",
    model: ir.Model,
    given: Mapping[str, Sequence[int]] | None = None,
) -> str | None:
    """Compare what `prepare` made of a file with the file; say so where that cannot be done.

    Args:
        source: The model as it was given.
        model: What was made of it.
        given: Input shapes by name, where no dynamic size fits.

    Raises:
        ProofError: The outputs differ.
    """
    try:
        reference = Reference.of(model, source=source, given=given)
    except (ModelError, OperationError) as error:
        # fused kernels are not there for every type and machine; the standard ones are
        return f"what was spelled out is not compared with the file, which does not run: {error}"
    wrong = reference.differs(model, tolerance=_tolerance(model))
    if wrong is not None:
        raise ProofError(f"written as standard operators, the model is another one: {wrong}")
    return None


def _tolerance(model: ir.Model) -> float:
    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        return _STEPS
    return tolerance_of(model)
