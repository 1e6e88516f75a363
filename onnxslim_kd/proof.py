"""What must hold after a pass: a valid graph, the same interface, the right numbers.

The proof of a cut: **the pruned model equals the original in which the removed channels are
silent where they are consumed.** The silenced original is built here before the cut, on the
original's own graph: weights that sum over removed channels are zeroed there, and an operator that
reduces, normalises or contracts over them gets the survivors alone and its result is spread out
again (compress, compute, expand). Inner values are compared too, so that an error in one channel
cannot hide behind a deep network's rounding.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd import decisions, foreign
from onnxslim_kd.compare import Reference, tolerance_of
from onnxslim_kd.decisions import Decisions
from onnxslim_kd.errors import PassError, ProofError
from onnxslim_kd.model import name_of, new_initializer, without_weights
from onnxslim_kd.passes.channels import Consumption, Ids
from onnxslim_kd.passes.fixups_counts import explicit_scale
from onnxslim_kd.passes.groups import Analysis

Array = np.ndarray[Any, Any]
ROUNDINGS, LARGEST = 10.0, 5e-2
"""So many times what rounding does to the original counts as rounding; no more than this share."""
TAPS = 32
"""Inner values compared, beside the outputs."""


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


@dataclass(frozen=True)
class Silenced:
    """The original with the removed channels silent, and where to look."""

    model: ir.Model
    names: dict[str, str]
    """The value of the pruned model for every output."""
    outputs: int
    given: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Input shapes that the user gave."""
    decisions: Decisions = field(default_factory=Decisions)


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
def blaming(silenced: "Silenced | None") -> Iterator[None]:
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
    graph, decided = pruned.graph, silenced.decisions
    values = ir.convenience.create_value_mapping(graph)
    names = {out: inner for out, inner in silenced.names.items() if inner in values}
    kept = [
        {out: array for out, array in outputs.items() if out in names}
        for outputs in reference.outputs
    ]
    tolerance = tolerance_of(pruned)
    n_outputs = len(graph.outputs)
    taps = [values[inner] for inner in names.values()]
    compared = Reference(reference.feeds, tuple(kept))
    held = False
    try:
        graph.outputs.extend(v for v in taps if not v.is_graph_output())
        error = _worst(compared, pruned, names, stop=not decided.answers)
        if not error <= tolerance and decided.answers:
            held, twin = True, pruned.clone()
            compared = decisions.hold(decided, compared, silenced.model, twin)
            error = compared.worst(twin, names)
    finally:
        while len(graph.outputs) > n_outputs:
            graph.outputs.pop()
    rounding = 0.0
    if not error <= tolerance:
        rounding = compared.rounding(silenced.model)
        tolerance = max(tolerance, min(ROUNDINGS * rounding, LARGEST))
    if not error <= tolerance:
        raise ProofError(
            f"the pruned model is not the silenced original: they differ by {error:.1e} of the"
            f" magnitude, {tolerance:.0e} is allowed; nothing was written"
        )
    shapes = tuple(dict(s) for s in reference.shapes)
    inner = len(names) - silenced.outputs
    found = Proof(shapes, silenced.outputs, inner, error, tolerance, rounding, held)
    return replace(found, foreign=tuple(strange))


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


def _worst(reference: Reference, model: ir.Model, names: Mapping[str, str], *, stop: bool) -> float:
    """The largest difference; infinity where there is none to speak of, unless that is the end."""
    try:
        return reference.worst(model, names)
    except ProofError:
        if stop:
            raise
        return float("inf")


# ------------------------------------------------------------------------- silencing


def silence(analysis: Analysis, removed: Ids) -> Silenced:
    """Copy the analysed model and silence the removed channels in the copy.

    Args:
        analysis: Of the model before the cut.
        removed: Mask over its components.
    """
    model = analysis.model.clone()
    mapping = ir.convenience.create_value_mapping(model.graph)
    nodes = {node.name: node for node in model.graph}
    work = _Silencer(analysis, removed[analysis.components.label].astype(bool), model.graph)
    for consumption in analysis.channels.consumed:
        work.consume(consumption, nodes[consumption.node.name])
    names = {name_of(v): name_of(v) for v in model.graph.outputs}
    for index, value in enumerate(model.graph.outputs):
        gathered = work.gathered(mapping[name_of(value)], name_of(value), f"kept.{index}")
        if gathered is not None:
            names[name_of(gathered)] = names.pop(name_of(value))
            model.graph.outputs[index] = gathered
    outputs = len(names)
    for index, value in enumerate(_taps(analysis, work.gone)):
        inner = mapping.get(name_of(value))
        gathered = inner and work.gathered(inner, name_of(value), f"inner.{index}")
        if gathered is not None:
            model.graph.outputs.append(gathered)
            names[name_of(gathered)] = name_of(value)
    found = decisions.find(analysis.model.graph, lambda value: not work.loses(value))
    return Silenced(model, names, outputs, analysis.given, found)


def _taps(analysis: Analysis, gone: Array) -> list[ir.Value]:
    """Outputs of layers that lose channels, evenly spread over the depth of the network."""
    cut = [
        node.outputs[0]
        for node, ids in analysis.channels.producers
        if gone[ids].any() and node.outputs[0] in analysis.channels.layout
    ]
    return cut[:: max(1, -(-len(cut) // TAPS))]


@dataclass
class _Silencer:
    analysis: Analysis
    gone: Array
    graph: ir.Graph
    """Of the copy."""

    def keep(self, name_value: ir.Value, axis: int) -> Array | None:
        """Positions kept along an axis of a value of the analysed model; None for all."""
        channels = self.analysis.channels
        layout = channels.layout.get(name_value) or channels.born(name_value)
        for block in layout:
            if block.axes == (axis,) and self.gone[block.ids].any():
                return np.flatnonzero(~self.gone[block.ids])
        return None

    def loses(self, value: ir.Value) -> bool:
        """Tell whether some of a value's channels are removed."""
        blocks = self.analysis.channels.layout.get(value, ())
        return any(self.gone[block.ids].any() for block in blocks)

    def consume(self, consumption: Consumption, copy: ir.Node) -> None:
        """Silence the removed channels where ``copy`` computes over them."""
        places = []
        for index, axis in consumption.axes:
            value = consumption.node.inputs[index]
            if value is not None and value in self.analysis.shapes.shape:
                places.append((index, axis % len(self.analysis.shapes.shape[value]), value))
        keeps = [self.keep(value, axis) for _, axis, value in places]
        found = [k for k in keeps if k is not None]
        if not found:
            return
        if copy.op_type == "Attention":
            explicit_scale(copy, self.analysis.shapes.shape[places[0][2]])
        for (index, axis, value), keep in zip(places, keeps, strict=True):
            if consumption.out_axis is not None:
                break
            is_float = value.dtype is not None and value.dtype.is_floating_point()
            if value.is_initializer() and is_float and keep is not None:
                self._zero(copy.inputs[index], axis, keep)
                return  # a zero weight silences the channel, whatever the other operand holds
        for (index, axis, _), keep in zip(places, keeps, strict=True):
            source = copy.inputs[index]
            assert source is not None
            taken = self._take(source, axis, found[0] if keep is None else keep, copy)
            copy.replace_input_with(index, taken)
        if consumption.out_axis is not None:
            size = self.analysis.shapes.shape[places[0][2]][places[0][1]]
            rank = len(self.analysis.shapes.shape[consumption.node.outputs[0]])
            self._expand(copy, consumption.out_axis % rank, found[0], (size, rank))

    def _zero(self, value: ir.Value | None, axis: int, keep: Ids) -> None:
        assert value is not None and value.const_value is not None
        array = value.const_value.numpy().copy()
        drop = np.ones(array.shape[axis], bool)
        drop[keep] = False
        array[(slice(None),) * axis + (drop,)] = 0
        value.const_value = ir.Tensor(array, name=value.name)

    def _take(self, value: ir.Value, axis: int, keep: Ids, before: ir.Node) -> ir.Value:
        indices = new_initializer(self.graph, f"{value.name}.keep", keep)
        node = ir.node("Gather", [value, indices], {"axis": axis})
        self.graph.insert_before(before, node)
        return _named(node, f"{value.name}.taken.{before.name}.{axis}")

    def _expand(self, node: ir.Node, axis: int, keep: Ids, extent: tuple[int, int]) -> None:
        """Spread the survivors' results out again; zeros stand for what was removed."""
        output, (size, rank) = node.outputs[0], extent
        readers = list(output.uses())
        amounts = np.zeros(2 * rank, np.int64)
        amounts[rank + axis] = 1
        pads = new_initializer(self.graph, f"{node.name}.pads", amounts)
        index = np.full(size, len(keep), np.int64)
        index[keep] = np.arange(len(keep))
        spread = new_initializer(self.graph, f"{node.name}.spread", index)
        pad = ir.node("Pad", [output, pads])
        gather = ir.node("Gather", [_named(pad, f"{node.name}.padded"), spread], {"axis": axis})
        self.graph.insert_after(node, [pad, gather])
        wide = _named(gather, f"{node.name}.expanded.{axis}")
        wide.type = output.type
        for use in readers:
            use.node.replace_input_with(use.idx, wide)

    def gathered(self, value: ir.Value, original: str, name: str) -> ir.Value | None:
        """The kept channels of ``value`` as a new value; None where nothing is removed."""
        source = self.analysis.values[original]
        last, taken = value, False
        for block in self.analysis.channels.layout.get(source, ()):
            if len(block.axes) > 1 and self.gone[block.ids].any():
                return None  # a grid of a channel shuffle: its ends are compared
            if self.gone[block.ids].any():
                keep = np.flatnonzero(~self.gone[block.ids])
                indices = new_initializer(self.graph, f"{name}.keep", keep)
                node = ir.node("Gather", [last, indices], {"axis": block.axes[0]})
                self.graph.append(node)
                last, taken = _named(node, f"{name}.{block.axes[0]}"), True
        last.type = value.type
        return last if taken else None


def _named(node: ir.Node, name: str) -> ir.Value:
    node.name = name
    node.outputs[0].name = name
    return node.outputs[0]
