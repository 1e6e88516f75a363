"""infer-prune: the model as it ships. Any model in, the smallest equal one out, with proof.

stripped = infer_prune("merged.onnx")      # the student alone, in inference form
save(stripped.model, "student.onnx")
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxslim_kd import decisions
from onnxslim_kd.access import RANDOM, graphs
from onnxslim_kd.compare import TOLERANCE, Reference, tolerance_of
from onnxslim_kd.errors import ModelError, PassError, ProofError
from onnxslim_kd.memory import collection_paused
from onnxslim_kd.model import ModelLike, load, weight_bytes, without_weights
from onnxslim_kd.passes import gate
from onnxslim_kd.passes.cleanup import STEPS
from onnxslim_kd.passes.deploy import (
    Activation,
    add_activation,
    keep_inputs,
    keep_role,
    keep_values,
    to_inference,
)
from onnxslim_kd.passes.unfuse import unfuse


@dataclass(frozen=True)
class Proof:
    """That the outputs stayed the same.

    Attributes:
        shapes: The input shapes that both models ran with.
        worst: Largest difference of an output, as a share of its largest magnitude.
        tolerance: What was allowed.
        same_decisions: Whether both were given what the original's TopK or comparisons decide.
    """

    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    worst: float
    tolerance: float = TOLERANCE
    same_decisions: bool = False


@dataclass(frozen=True)
class Stripped:
    """What infer-prune made.

    Attributes:
        model: The model to ship.
        notes: What was left out or could not be shown, one sentence each.
        counts: Nodes by operator, before and after; operators inside of branches count too.
        bytes: Of the weights, before and after.
        removed: By how many nodes each step made the graph smaller.
        proof: None when it was not asked for, or the outputs are random.
    """

    model: ir.Model
    notes: tuple[str, ...]
    counts: Mapping[str, tuple[int, int]]
    bytes: tuple[int, int]
    removed: Mapping[str, int]
    proof: Proof | None


@collection_paused()
def infer_prune(
    model: ModelLike,
    *,
    keep: str = "student",
    outputs: Sequence[str] | None = None,
    activation: Activation | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    verify: bool = True,
) -> Stripped:
    """Reduce a model to what inference needs, in its smallest equal form.

    Args:
        model: A merged, trained or any other model.
        keep: Whose outputs to keep of a merged model: ``student``, ``teacher`` or its name.
        outputs: Values to make the outputs, instead of those of a role.
        activation: What to append to the outputs: ``softmax``, ``sigmoid`` or nothing.
        shapes: Input shapes for the proof, by name, where no dynamic size fits.
        verify: Whether to compare outputs; False trusts every step.

    Raises:
        UserError: An option does not fit the model.
        NotFoundError: A name in ``outputs`` is not in the graph.
        PassError: The result is not valid ONNX.
        ProofError: The outputs differ, or nothing could be run.
    """
    asked = _Asked(model, keep, outputs, activation)
    start = asked.declare()
    notes = [f"{start.switched} nodes switched from training to inference"] * bool(start.switched)
    again = lambda: asked.declare().model  # noqa: E731
    guard = _Guard(_reference(asked, start, shapes, notes) if verify else None, again)
    gated = gate.apply(start.model, STEPS, guard.differs, again=again)
    guard.insist(gated.model)
    keep_inputs(gated.model, start.inputs)
    _check(gated.model)
    return Stripped(
        model=gated.model,
        notes=(*notes, *gated.notes),
        counts=_counts(start.operators, _operators(gated.model)),
        bytes=(start.bytes, weight_bytes(gated.model)),
        removed=gated.removed,
        proof=guard.proof,
    )


@dataclass(frozen=True)
class _Declared:
    """The model whose outputs the result must have, before any step."""

    model: ir.Model
    inputs: list[str] | None
    """Those to keep; None for those that are needed."""
    as_given: bool
    """Whether its outputs are some of the given model's, at the sizes that one takes."""
    switched: int
    operators: Counter[str]
    """Of the model as it was given."""
    bytes: int
    """Of its weights, also of those in Constant nodes."""


@dataclass(frozen=True)
class _Asked:
    """What to make of which model."""

    model: ModelLike
    keep: str
    outputs: Sequence[str] | None
    activation: Activation | None

    def declare(self) -> _Declared:
        """Load the model and make it compute what is asked for."""
        operators: Counter[str] = Counter()
        model = load(self.model, operators=operators)
        held, fixed = weight_bytes(model), [value.shape for value in model.graph.inputs]
        unfuse(model, contrib=False)  # what ONNX does not know; its checker looks at the result
        inputs = keep_role(model, self.keep)
        freed = fixed != [value.shape for value in model.graph.inputs]
        if self.outputs:
            keep_values(model, self.outputs)
            inputs = None
        switched = to_inference(model)
        if self.activation is not None:
            add_activation(model, self.activation)
        changed = self.keep != "student" or self.outputs or self.activation or switched or freed
        return _Declared(model, inputs, not changed, switched, operators, held)

    def source(self) -> "str | os.PathLike[str] | ir.Model":
        """The model as it was given, for the runtime."""
        given = self.model
        return given if isinstance(given, str | os.PathLike) else load(given, normalise=False)


def _reference(
    asked: _Asked,
    start: _Declared,
    shapes: Mapping[str, Sequence[int]] | None,
    notes: list[str],
) -> Reference | None:
    """Run the model as it was given where its outputs are to stay, else as it was declared."""
    random = [node for node in _nodes(start.model) if node.op_type in RANDOM]
    if random:
        notes.append(f"outputs are random ({random[0].op_type} {random[0].name}): not compared")
        return None
    names = [str(value.name) for value in start.model.graph.outputs]
    if start.as_given:
        try:
            return Reference.of(start.model, source=asked.source(), outputs=names, given=shapes)
        except ModelError as error:
            notes.append(f"compared with its normalised form: the file itself fails: {error}")
    return Reference.of(start.model, given=shapes)


class _Guard:
    """Compares every model that a step made; the last one that passed is the result."""

    def __init__(self, reference: Reference | None, again: Callable[[], ir.Model]) -> None:
        self.reference = reference
        self.again = again
        """Makes the model that the reference is of."""
        self.proof: Proof | None = None

    def differs(self, model: ir.Model) -> str | None:
        if self.reference is None:
            return None
        (wrong, worst), held = _apart(self.reference, model), False
        found = decisions.find(model.graph) if wrong is not None else decisions.Decisions()
        if found.answers:
            held, twin = True, model.clone()
            wrong, worst = _apart(decisions.hold(found, self.reference, self.again(), twin), twin)
        if wrong is None:
            shapes, allowed = tuple(self.reference.shapes), tolerance_of(model)
            self.proof = Proof(shapes, worst, allowed, same_decisions=held)
        return wrong

    def insist(self, model: ir.Model) -> None:
        """Compare a model that no step changed, and refuse it if it differs."""
        wrong = self.differs(model) if self.proof is None else None
        if wrong is not None:
            raise ProofError(f"the outputs are not those of the given model: {wrong}")


def _apart(reference: Reference, model: ir.Model) -> tuple[str | None, float]:
    """What is wrong with a model, if anything, and how far it is from the reference."""
    try:
        worst = reference.worst(model)
    except (ProofError, ModelError) as error:
        return str(error), float("inf")
    if worst > (allowed := tolerance_of(model)):
        return f"outputs differ by {worst:.1e} of their magnitude, {allowed:.0e} allowed", worst
    return None, worst


def _check(model: ir.Model) -> None:
    """Run the full checker; big weights are left out, for it copies them several times."""
    try:
        with without_weights(model) as proto:
            onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PassError(f"the result is not valid ONNX: {error}") from error


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in _nodes(model))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return (node for graph in graphs(model) for node in graph)


def _counts(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    return {name: (before[name], after[name]) for name in sorted(before | after)}
