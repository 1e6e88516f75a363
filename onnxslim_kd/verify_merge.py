"""Prove that merging changed no number: every model in the merged graph computes what it did alone.

Both run in ONNX Runtime without optimisation, with the same random inputs, and every compared
value must be equal bit for bit: all outputs of the student and of the teachers, and all values
that the losses read. A dynamic model is compared at two sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxslim_kd import roles
from onnxslim_kd.errors import ProofError, UserError
from onnxslim_kd.model import ModelLike, load, name_of
from onnxslim_kd.passes.join import Teachers
from onnxslim_kd.runtime import Array, Session, random_feeds
from onnxslim_kd.shapes import Shape, choose_inputs


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        values: How many values were equal bit for bit, at each size.
        sizes: The shapes of the inputs, one mapping for each run.
        losses: The value of the loss and of every term in the last run.
    """

    values: int
    sizes: tuple[dict[str, Shape], ...]
    losses: dict[str, float]


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
    pairs = [_Pair("the student", load(student), "", {n: n for n in record.student_inputs})]
    for t in record.teachers:
        pairs.append(_Pair(f"teacher {t.name!r}", load(teachers[t.name]), t.prefix, t.inputs))
    sizes = [choose_inputs(merged, given, 0) for given in shapes] or _two_sizes(merged)
    runs = [_feeds(merged, record, size, seed) for size in sizes]
    got = _run_merged(merged, record, pairs, runs)
    count = sum(_compare(merged, pair, got) for pair in pairs)
    losses = {n: float(got[-1][n]) for n in (record.loss, *(t.output for t in record.terms))}
    for name, number in losses.items():
        if not np.isfinite(number):
            raise ProofError(f"loss {name!r} is {number} for random inputs")
    return Proof(count, tuple(sizes), losses)


@dataclass(frozen=True)
class _Pair:
    """One of the models that were merged."""

    title: str
    alone: ir.Model
    prefix: str
    feeds: Mapping[str, str]
    """Its own inputs -> the values of the merged graph that it reads there."""

    def shared(self, merged: Mapping[str, ir.Value]) -> dict[str, str]:
        """Own name -> merged name, of all outputs and of what losses read besides."""
        found = {}
        for node in self.alone.graph:
            for value in node.outputs:
                other = merged.get(f"{self.prefix}{value.name}") if value.name else None
                if other is None:
                    continue
                if value.is_graph_output() or len(other.uses()) > len(value.uses()):
                    found[name_of(value)] = name_of(other)
        return found


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {name_of(v): v for node in model.graph for v in node.outputs if v.name}


def _two_sizes(model: ir.Model) -> list[dict[str, Shape]]:
    dynamic = any(v.shape is None or not v.shape.is_static() for v in model.graph.inputs)
    return [choose_inputs(model, {}, variant) for variant in ((0, 1) if dynamic else (0,))]


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


def _run_merged(
    merged: ir.Model,
    record: roles.Roles,
    pairs: Sequence[_Pair],
    runs: Sequence[Mapping[str, Array]],
) -> list[dict[str, Array]]:
    """All that is compared, and what the teachers were fed, for each of ``runs``."""
    wanted = dict.fromkeys([record.loss, *(term.output for term in record.terms)])
    values = _values(merged)
    for pair in pairs:
        wanted.update(dict.fromkeys([*pair.shared(values).values(), *pair.feeds.values()]))
    names = [name for name in wanted if name in values]
    session = _session(merged, names)
    return [{**feeds, **session.run(feeds, names)} for feeds in runs]


def _session(model: ir.Model, names: Sequence[str]) -> Session:
    """A session that returns inner values as well; unoptimised, so that nothing is fused away."""
    probe = model.clone()
    values = _values(probe)
    have = {v.name for v in probe.graph.outputs}
    probe.graph.outputs.extend(values[name] for name in names if name not in have)
    return Session(probe, optimise=False)


def _compare(merged: ir.Model, pair: _Pair, got: Sequence[Mapping[str, Array]]) -> int:
    """Run one model alone on what it was fed in the merged graph; return how many values agree."""
    shared = pair.shared(_values(merged))
    session = _session(pair.alone, list(shared))
    for run in got:
        feeds = {name: run[source] for name, source in pair.feeds.items()}
        for name, array in session.run(feeds, list(shared)).items():
            if not _same(array, run[shared[name]]):
                raise ProofError(
                    f"value {name!r} of {pair.title} is not the same in the merged model"
                    f" for inputs of shapes {[list(a.shape) for a in feeds.values()]}"
                )
    return len(shared)


def _same(a: Array | list[Array], b: Array | list[Array]) -> bool:
    """Tell whether two results are equal bit for bit; a sequence is a list of arrays."""
    if isinstance(a, list) or isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
