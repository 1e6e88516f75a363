"""What must hold after a pass: a valid graph, the same interface, the right numbers.

The proof of a cut: **the pruned model equals the original in which the removed channels are
silent where they are consumed.** `silencing` builds that one before the cut. Inner values are
compared too, so that an error in one channel cannot hide behind a deep network's rounding.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir

from onnxslim_kd import decisions, foreign
from onnxslim_kd.compare import Reference, tolerance_of
from onnxslim_kd.errors import PassError, ProofError
from onnxslim_kd.model import name_of, without_weights
from onnxslim_kd.silencing import Silenced

ROUNDINGS, LARGEST = 10.0, 5e-2
"""So many times what rounding does to the original counts as rounding; no more than this share."""


@dataclass(frozen=True)
class Proof:
    """What was verified, and how close it came."""

    shapes: tuple[dict[str, tuple[int, ...]], ...]
    """The input shapes on which both models ran."""
    outputs: int
    inner_values: int
    error: float
    """The largest difference, as a share of the largest magnitude of its value."""
    tolerance: float
    rounding: float = 0.0
    """How far the original itself moves when it is rounded otherwise, where that was asked."""
    same_decisions: bool = False
    """Whether both were given what the original's TopK, ArgMax or comparisons decide."""
    foreign: tuple[str, ...] = ()
    """Operators that the runtime does not have: what goes into them was compared."""

    def __str__(self) -> str:
        runs = " and ".join(
            ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
            for shapes in self.shapes
        )
        why = f": rounding alone moves the original by {self.rounding:.0e}" if self.rounding else ""
        return (
            f"{self.outputs} output{'s' * (self.outputs != 1)} and {self.inner_values} inner"
            f" value{'s' * (self.inner_values != 1)} equal the silenced original's"
            f" to {self.error:.1e} (limit {self.tolerance:.0e}{why}) for {runs}"
            f"{', given its decisions (TopK, comparisons)' * self.same_decisions}"
            f"{', up to what ONNX Runtime does not have: ' * bool(self.foreign)}"
            f"{', '.join(self.foreign)}"
        )


def structure(model: ir.Model) -> None:
    """Check the graph with the full ONNX checker, without copying weights.

    Raises:
        PassError: The checker refuses it.
    """
    with without_weights(model) as proto:
        try:
            onnx.checker.check_model(proto, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            why = " ".join(str(error).split())
            raise PassError(f"the graph is not valid ONNX: {why}") from error


@contextmanager
def blaming(silenced: Silenced | None) -> Iterator[None]:
    """Where the cut fails, say so if the original does not even run.

    Raises:
        ProofError: It does not.
    """
    try:
        yield
    except PassError:
        if silenced is not None:
            Reference.of(silenced.model, given=silenced.given)
        raise


def interface(model: ir.Model) -> tuple[tuple[str, str, str], ...]:
    """Return name, type and shape of every input and output, to compare before and after."""
    values = [*model.graph.inputs, *model.graph.outputs]
    return tuple((name_of(v), str(v.dtype), str(v.shape)) for v in values)


def same_interface(
    before: Sequence[tuple[str, str, str]], model: ir.Model, *, freed: Iterable[str] = ()
) -> None:
    """Check that a pass left inputs and outputs as they were.

    Raises:
        PassError: One changed that was not declared to.
    """
    free = set(freed)
    for old, new in zip(before, interface(model), strict=True):
        if old != new and old[0] not in free:
            raise PassError(f"{old[0]} changed from {old[1]}{old[2]} to {new[1]}{new[2]}")


def prove(silenced: Silenced, pruned: ir.Model) -> Proof:
    """Run both models on the same inputs and compare them.

    What the model's narrowest floats allow is allowed, and what rounding alone does to the original
    (a norm of a nearly constant value blows it up).

    Args:
        silenced: The original with the removed channels silent.
        pruned: What must equal it.

    Raises:
        ProofError: They differ, or one of them does not run; the message says what to do.
    """
    strange = foreign.foreign(pruned)
    if strange:
        silenced, pruned = _without(strange, silenced, pruned)
    reference = Reference.of(silenced.model, given=silenced.given)
    values = ir.convenience.create_value_mapping(pruned.graph)
    names = {out: inner for out, inner in silenced.names.items() if inner in values}
    tolerance, rounding = tolerance_of(pruned), 0.0
    with _shown(pruned.graph, [values[inner] for inner in names.values()]):
        error, compared = _compared(_only(reference, names), silenced, pruned, names, tolerance)
    if not error <= tolerance:
        rounding = compared.rounding(silenced.model)
        tolerance = max(tolerance, min(ROUNDINGS * rounding, LARGEST))
    if not error <= tolerance:
        raise ProofError(
            f"the pruned model is not the silenced original: they differ by {error:.1e} of the"
            f" magnitude, {tolerance:.0e} is allowed; nothing was written"
        )
    return Proof(
        shapes=tuple(dict(s) for s in reference.shapes),
        outputs=silenced.outputs,
        inner_values=len(names) - silenced.outputs,
        error=error,
        tolerance=tolerance,
        rounding=rounding,
        same_decisions=compared.feeds[0].keys() != reference.feeds[0].keys(),
        foreign=tuple(strange),
    )


def _only(reference: Reference, names: Container[str]) -> Reference:
    outputs = ({out: a for out, a in held.items() if out in names} for held in reference.outputs)
    return Reference(reference.feeds, tuple(outputs))


@contextmanager
def _shown(graph: ir.Graph, values: Iterable[ir.Value]) -> Iterator[None]:
    """Make values outputs of a graph for the time of the block."""
    count = len(graph.outputs)
    try:
        graph.outputs.extend(value for value in values if not value.is_graph_output())
        yield
    finally:
        while len(graph.outputs) > count:
            graph.outputs.pop()


def _compared(
    reference: Reference,
    silenced: Silenced,
    pruned: ir.Model,
    names: Mapping[str, str],
    tolerance: float,
) -> tuple[float, Reference]:
    """The largest difference, and from which reference: one with the same decisions if need be."""
    decided = silenced.decisions
    try:
        error = reference.worst(pruned, names)
    except ProofError:
        if not decided.answers:
            raise
        error = float("inf")
    if error <= tolerance or not decided.answers:
        return error, reference
    twin = pruned.clone()
    held = decisions.hold(decided, reference, silenced.model, twin)
    return held.worst(twin, names), held


def _without(
    strange: Sequence[str], silenced: Silenced, pruned: ir.Model
) -> tuple[Silenced, ir.Model]:
    """Both models without the operators that the runtime does not have.

    Raises:
        ProofError: Nothing is left to compare.
    """
    pruned = pruned.clone()
    into = foreign.take_out(silenced.model)
    foreign.take_out(pruned)
    left = {name_of(value) for value in silenced.model.graph.outputs}
    if not left:
        raise ProofError(
            f"nothing can be compared without {', '.join(strange)}, which ONNX Runtime does not"
            f" have; --no-verify does without the proof"
        )
    own = list(silenced.names)[: silenced.outputs]
    names = {out: inner for out, inner in silenced.names.items() if out in left}
    names |= {name: name for name in into}
    outputs = sum(out in left for out in own)
    return replace(silenced, names=names, outputs=outputs), pruned
