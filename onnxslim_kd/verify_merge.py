"""Prove that merging changed no number: every model in the merged graph computes what it did alone.

Both run in ONNX Runtime without optimisation, with the same random inputs, and every compared
value must be equal bit for bit: all outputs of the student and of the teachers, and all values
that the losses read. A dynamic model is compared at two sizes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxslim_kd import roles
from onnxslim_kd.access import RANDOM, bodies
from onnxslim_kd.compare import Reference
from onnxslim_kd.errors import OperationError, ProofError, UserError
from onnxslim_kd.model import ModelLike, load, name_of
from onnxslim_kd.passes.join import Teachers
from onnxslim_kd.probe import Probe, values_by_name
from onnxslim_kd.runtime import Array, random_feeds
from onnxslim_kd.shapes import Shape, choose_inputs, sample


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        values: How many values were equal bit for bit, at each size.
        sizes: The shapes of the inputs, one mapping for each run.
        losses: The value of the loss and of every term in the last run.
        random: How many values were not compared, for each run gives others.
    """

    values: int
    sizes: tuple[dict[str, Shape], ...]
    losses: dict[str, float]
    random: int = 0


def verify_merge(
    merged: ir.Model,
    student: ModelLike,
    teachers: Teachers,
    *,
    shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    seed: int = 0,
) -> Proof:
    """Compare a merged model with the models that it was made of.

    Args:
        merged: What `merge` returned.
        student: What was given to `merge`.
        teachers: What was given to `merge`.
        shapes: Of inputs, by name, for every run; by default two sizes of what is dynamic.
        seed: Of the random inputs.

    Raises:
        ProofError: A value differs, or a loss is not finite.
        UserError: ``merged`` is no merged model.
    """
    record = roles.read(merged)
    if record is None:
        raise UserError("this model was not made by merge: it records no roles")
    if not isinstance(teachers, Mapping):
        teachers = {record.teachers[0].name: teachers}
    models = {"": student, **{t.prefix: teachers[t.name] for t in record.teachers}}
    sizes = [choose_inputs(merged, given, 0) for given in shapes]
    try:
        return _proven(merged, record, models, sizes or _two_sizes(merged), seed)
    except OperationError as error:
        if shapes or isinstance(error, ProofError):
            raise
    found = Reference.of(load(student)).shapes  # the student takes other sizes only
    try:
        sizes = [choose_inputs(merged, given, 0) for given in found]
        return _proven(merged, record, models, sizes, seed)
    except OperationError as error:
        if isinstance(error, ProofError):
            raise
        raise ProofError(
            f"no input sizes were found that all models take; give them with --input"
            f" NAME=1x3x224x224 (last: {error})"
        ) from error


def _proven(
    merged: ir.Model,
    record: roles.Roles,
    models: Mapping[str, ModelLike],
    sizes: Sequence[dict[str, Shape]],
    seed: int,
) -> Proof:
    """Compare at these sizes with the models, which are given by their prefixes."""
    for size in sizes:
        size.update(_label_shapes(merged, record, size))
    runs = [_feeds(merged, record, size, seed) for size in sizes]
    _compute_fed(merged, record, runs)
    own_inputs = {name: name for name in record.student_inputs}
    claims = _alone("the student", models[""], merged, ("", own_inputs), runs)
    for t in record.teachers:
        title = f"teacher {t.name!r}"
        claims += _alone(title, models[t.prefix], merged, (t.prefix, t.inputs), runs)
    terms = [*(term.output for term in record.terms), record.loss]
    got = _run_merged(merged, [*terms, *(claim.value for claim in claims)], runs)
    drawn = _random(merged)
    kept = [claim for claim in claims if claim.value not in drawn]
    _compare(kept, got)
    losses = {name: float(got[-1][name]) for name in terms}
    for name, number in losses.items():
        if not np.isfinite(number):
            raise ProofError(f"loss {name!r} is {number} for random inputs{_extreme(kept)}")
    return Proof(len(kept), tuple(sizes), losses, len(claims) - len(kept))


@dataclass(frozen=True)
class _Claim:
    """What a value of the merged graph must be, found by running its model alone."""

    title: str
    name: str
    """Of the value in its own model."""
    value: str
    """Its name in the merged graph."""
    expected: list[Array]
    """For every run."""


def _alone(
    title: str,
    source: ModelLike,
    merged: ir.Model,
    place: tuple[str, Mapping[str, str]],
    runs: Sequence[Mapping[str, Array]],
) -> list[_Claim]:
    """Run one model alone, on what feeds it in the merged graph; it is let go afterwards."""
    prefix, feeds = place
    model = load(source)
    shared = _shared(model, values_by_name(merged), prefix)
    probe = Probe(model, list(shared))
    results = [probe.run({name: run[value] for name, value in feeds.items()}) for run in runs]
    return [_Claim(title, n, v, [result[n] for result in results]) for n, v in shared.items()]


def _shared(alone: ir.Model, merged: Mapping[str, ir.Value], prefix: str) -> dict[str, str]:
    """Own name -> merged name, of all outputs and of what losses read besides."""
    found = {}
    for name, value in values_by_name(alone).items():
        other = merged.get(f"{prefix}{name}")
        if other is None:
            continue
        if value.is_graph_output() or len(other.uses()) > len(value.uses()):
            found[name] = name_of(other)
    return found


def _two_sizes(model: ir.Model) -> list[dict[str, Shape]]:
    dynamic = any(v.shape is None or not v.shape.is_static() for v in model.graph.inputs)
    return [choose_inputs(model, {}, variant) for variant in ((0, 1) if dynamic else (0,))]


def _label_shapes(
    merged: ir.Model, record: roles.Roles, size: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Return the shapes of the labels that inputs of this size want: those of the scores."""
    labels = {label.scores: label for label in record.labels if label.scores}
    if not labels:
        return {}
    inputs = list(record.student_inputs)
    part = ir.Model(
        ir.convenience.extract(merged.graph, inputs, list(labels)), ir_version=merged.ir_version
    )
    found = sample(part, {name: size[name] for name in inputs})
    wanted = {}
    for value in part.graph.outputs:
        label, shape = labels[name_of(value)], found.of(value)
        if shape is not None:
            wanted[label.input] = tuple(d for axis, d in enumerate(shape) if axis != label.axis)
    return wanted


def _feeds(
    merged: ir.Model, record: roles.Roles, size: Mapping[str, Shape], seed: int
) -> dict[str, Array]:
    """Random inputs; zeros and ones for masks."""
    feeds = random_feeds(merged, size, seed=seed)
    for mask in record.masks:
        noise = np.random.default_rng(seed).random(feeds[mask.input].shape)
        feeds[mask.input] = np.asarray(noise < mask.keep, feeds[mask.input].dtype)
    for label in record.labels:  # soft labels and ratios are no normal numbers
        if feeds[label.input].dtype.kind == "f":
            feeds[label.input] = np.abs(np.tanh(feeds[label.input]))
    return feeds


def _compute_fed(merged: ir.Model, record: roles.Roles, runs: Sequence[dict[str, Array]]) -> None:
    """Add what adapters make of the inputs, for that is what the teachers read."""
    fed = {value for teacher in record.teachers for value in teacher.inputs.values()}
    computed = [name for name in values_by_name(merged) if name in fed]
    if not computed:
        return
    inputs = list(record.student_inputs)
    part = ir.convenience.extract(merged.graph, inputs, computed)
    probe = Probe(ir.Model(part, ir_version=merged.ir_version), computed)
    for run in runs:
        run.update(probe.run({name: run[name] for name in inputs}))


def _random(model: ir.Model) -> set[str]:
    """Return the names of all values that random operators lead to."""
    found: set[ir.Value | None] = set()
    for node in model.graph:
        if _is_random(node, found):
            found.update(node.outputs)
    return {name_of(value) for value in found if value is not None}


def _is_random(node: ir.Node, found: Collection[ir.Value | None]) -> bool:
    if node.op_type in RANDOM or any(value in found for value in node.inputs):
        return True
    return any(_is_random(inner, found) for body in bodies(node) for inner in body)


def _run_merged(
    merged: ir.Model, names: Sequence[str], runs: Sequence[Mapping[str, Array]]
) -> list[dict[str, Array]]:
    inputs = [name_of(value) for value in merged.graph.inputs]
    probe = Probe(merged, list(dict.fromkeys(names)))
    return [probe.run({name: run[name] for name in inputs}) for run in runs]


def _compare(claims: Sequence[_Claim], got: Sequence[Mapping[str, Array]]) -> None:
    for claim in claims:
        for expected, run in zip(claim.expected, got, strict=True):
            if not _same(expected, run[claim.value]):
                raise ProofError(
                    f"value {claim.name!r} of {claim.title} is not the same in the merged model"
                )


def _extreme(claims: Sequence[_Claim]) -> str:
    """Point out a value that no loss can take: scores that a mask has set to minus infinity."""
    for claim in claims:
        arrays = [array for array in claim.expected if isinstance(array, np.ndarray)]
        largest = max(
            (float(np.abs(a).max(initial=0)) for a in arrays if a.dtype.kind == "f"), default=0
        )
        if not largest < _HUGE:
            return (
                f": value {claim.name!r} of {claim.title} reaches {largest:.1e}; distil another one"
            )
    return ""


def _same(a: Array | list[Array], b: Array | list[Array]) -> bool:
    """Tell whether two results are equal bit for bit; a sequence is a list of arrays."""
    if isinstance(a, list) or isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


_HUGE = 1e18
"""Its square is beyond float32."""
