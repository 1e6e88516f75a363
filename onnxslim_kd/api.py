"""The library's front door: one call per command, on a path, a proto, an ir.Model or a gs.Graph."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import onnx_ir as ir

from onnxslim_kd import cost as costs
from onnxslim_kd import interop
from onnxslim_kd import model as model_io
from onnxslim_kd import proof as proofs
from onnxslim_kd import shapes as shape_sampling
from onnxslim_kd.compare import Reference
from onnxslim_kd.cost import Cost
from onnxslim_kd.errors import ModelError, OnnxSlimError, PassError, UserError, insist_on
from onnxslim_kd.memory import collection_paused
from onnxslim_kd.passes import correct as correction
from onnxslim_kd.passes import groups
from onnxslim_kd.passes import prune as pruning
from onnxslim_kd.passes.channels import Attention
from onnxslim_kd.passes.correct_layer import Corrected
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.prepare import insist_equal
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.plans import Plan
from onnxslim_kd.samples import Samples
from onnxslim_kd.shapes import Shapes
from onnxslim_kd.silencing import silence


@dataclass(frozen=True)
class Pruned:
    """What `prune` did."""

    model: ir.Model
    plan: Plan
    before: Cost
    after: Cost
    proof: proofs.Proof | None
    """None when verification was turned off; it is about the cut, before any correction."""
    corrected: tuple[Corrected, ...] = ()
    """The layers that were corrected."""
    uncorrected: tuple[str, ...] = ()
    """Layers that lost inputs and that a correction cannot handle."""


@dataclass(frozen=True)
class Reading:
    """How to read a graph before pruning it."""

    attention: Attention = "auto"
    free_outputs: Sequence[str] = ()
    inputs: Mapping[str, Sequence[int]] | None = None
    """Shapes for dynamic inputs, by name."""
    passes: Sequence[str] = ()
    """Graphsurgeon passes, as ``module:function``, to apply first."""
    passes_after: Sequence[str] = ()
    """The same, to apply to the result."""
    correct: Samples | None = None
    """Samples by which to correct the layers that lost inputs, after the cut."""

    def __post_init__(self) -> None:
        insist_on("attention", self.attention, get_args(Attention))

    @collection_paused()
    def analyse(self, source: model_io.ModelLike) -> Analysis:
        """Load a model, apply the passes, and solve its ties."""
        model = model_io.load(source)
        for spec in self.passes:
            model = model_io.load(interop.apply(model, spec))
        return groups.analyse(
            model,
            attention=self.attention,
            free_outputs=self.free_outputs,
            inputs=self.inputs,
        )


def inspect(source: model_io.ModelLike, reading: Reading | None = None) -> Analysis:
    """Read a model and say which of its channels can go: parameters, groups, reasons, shapes.

    Raises:
        ModelError: The model cannot be read.
    """
    with _blaming(source):
        return (reading or Reading()).analyse(source)


def plan(source: model_io.ModelLike, choice: Choice | Plan, reading: Reading | None = None) -> Plan:
    """Decide which channels go, and change nothing; a plan is checked against the model.

    Raises:
        UserError: The choice or plan does not fit the model.
    """
    analysis = inspect(source, _reading_of(choice, reading))
    with _blaming(source):
        if isinstance(choice, Plan):
            pruning.removed_by(analysis, choice)
            return choice
        return pruning.plan(analysis, choice)


@collection_paused()
def prune(
    source: model_io.ModelLike,
    choice: Choice | Plan,
    output: str | os.PathLike[str] | None = None,
    *,
    reading: Reading | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Pruned:
    """Remove whole channels and prove that nothing else changed.

    Args:
        source: What to prune; it stays as it is.
        choice: What to prune and how, or a plan to replay.
        output: Where to write the result; nothing is written without it.
        reading: How to read the graph; a plan brings its own.
        verify: Whether to run both models and compare them.
        overwrite: Whether ``output`` may exist.

    Raises:
        UserError: The choice or plan does not fit the model, or the output cannot be written.
        ProofError: The pruned model is not the silenced original; nothing is written.
    """
    if output is not None:
        check_output(source, Path(output), overwrite=overwrite)
    with _blaming(source):
        done = _pruned(source, choice, reading, verify=verify)
    if output is not None:
        model_io.save(done.model, output, overwrite=overwrite)
    return done


@contextmanager
def _blaming(source: model_io.ModelLike) -> Iterator[None]:
    """Where a step fails as nobody foresaw, say so if the model is not valid, or does not run.

    Raises:
        ModelError: It is not, or does not.
    """
    try:
        yield
    except (OnnxSlimError, OSError, MemoryError):
        raise
    except Exception as error:  # a broken graph breaks rules in as many ways as there are rules
        given = model_io.load(source)
        try:
            proofs.structure(given)
            Reference.of(given)
        except PassError as why:
            raise ModelError(f"{model_io.called(source)}: {why}") from error
        except OnnxSlimError:
            raise
        except Exception as why:  # what cannot even be written
            cause = model_io.cause(why)
            raise ModelError(f"{model_io.called(source)}: malformed ONNX: {cause}") from error
        raise


def _pruned(
    source: model_io.ModelLike, choice: Choice | Plan, reading: Reading | None, *, verify: bool
) -> Pruned:
    analysis = inspect(source, _reading_of(choice, reading))
    decided = choice if isinstance(choice, Plan) else pruning.plan(analysis, choice)
    before = costs.cost(analysis.model, analysis.shapes)
    samples = reading.correct if reading is not None else None
    if verify and analysis.notes and not (reading and reading.passes):
        note = insist_equal(_as_given(source), analysis.model, analysis.given)
        if note:
            decided = decided.model_copy(update={"notes": (*decided.notes, note)})
    left_out: list[str] = []
    if samples is not None:
        left_out = correction.left_out(analysis, pruning.removed_by(analysis, decided))
    model, shapes, proof, corrected = _carry_out(analysis, decided, samples, verify=verify)
    for spec in reading.passes_after if reading is not None else ():
        model = interop.apply(model, spec)
        shapes = shape_sampling.sample(model, analysis.shapes.inputs)
    cost_after = costs.cost(model, shapes)
    return Pruned(model, decided, before, cost_after, proof, corrected, tuple(left_out))


def _as_given(source: model_io.ModelLike) -> str | os.PathLike[str] | ir.Model:
    is_path = isinstance(source, str | os.PathLike)
    return source if is_path else model_io.load(source, normalise=False)  # type: ignore[return-value]


def _reading_of(choice: Choice | Plan, reading: Reading | None) -> Reading | None:
    if not isinstance(choice, Plan):
        return reading
    return replace(
        reading or Reading(),
        attention=choice.options.attention,
        free_outputs=choice.options.free_outputs,
    )


def _carry_out(
    analysis: Analysis, decided: Plan, samples: Samples | None, *, verify: bool
) -> tuple[ir.Model, Shapes, proofs.Proof | None, tuple[Corrected, ...]]:
    """Cut the analysed model in place as ``decided`` says, prove it, and correct what is left."""
    removed = pruning.removed_by(analysis, decided)
    model = analysis.model
    interface = proofs.interface(model)
    silenced = silence(analysis, removed) if verify else None
    original = model.clone() if samples is not None else None
    layers = correction.layers(analysis, removed) if samples is not None else []
    with proofs.blaming(silenced):
        changed = pruning.apply(analysis, removed)
        if silenced is not None:
            proofs.structure(model)
    shapes = replace(analysis.shapes, shape={**analysis.shapes.shape, **changed})
    proof = None
    if silenced is not None:
        proofs.same_interface(interface, model, freed=analysis.free_outputs)
        proof = proofs.prove(silenced, model)
    corrected: tuple[Corrected, ...] = ()
    if samples is not None and original is not None:
        corrected = tuple(correction.correct(original, model, layers, samples))
    pruning.record(model, decided)
    return model, shapes, proof, corrected


def check_output(source: model_io.ModelLike, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is the source, or cannot be written, before any work is done.

    Raises:
        UserError: As said.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.exists() and output.exists() and output.samefile(path):
        raise UserError(f"{output}: is the input itself; choose another output")
    model_io.check_writable(output, overwrite=overwrite)


def cut(source: model_io.ModelLike, decided: Plan) -> ir.Model:
    """Return ``source`` without the channels that a plan removes; see `passes.prune.cut`."""
    return pruning.cut(source, decided)


def verify(original: model_io.ModelLike, decided: Plan, pruned: model_io.ModelLike) -> proofs.Proof:
    """Prove that ``pruned`` is ``original`` after the plan.

    Raises:
        UserError: The plan was made for another model.
        ProofError: It is not.
    """
    analysis = inspect(original, _reading_of(decided, None))
    silenced = silence(analysis, pruning.removed_by(analysis, decided))
    return proofs.prove(silenced, model_io.load(pruned))
