"""Student, teachers and losses as one ordinary ONNX graph.

Before::

    x -> student -> y            x -> teacher -> y

After (one file; the teacher's names begin with ``teacher_``)::

    x -> student -> y ----+------------> y       the student's outputs come first
    |                     +--> l2 -----> l2      one scalar per loss term, unweighted
    +--> teacher -> teacher_y     +----> loss    their weighted sum

1. All models are raised to the newest opset among them, never lowered.
2. Teacher inputs become student inputs: as told, by name, or by the only one that fits; types,
   shapes and symbols must agree, or the user says how to adapt them.
3. Losses are appended; what they need (labels, masks, align layers) becomes inputs and
   initializers of the graph.
4. Who is who is recorded in the metadata (`onnxslim_kd.roles`); no later pass parses names.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxslim_kd import roles
from onnxslim_kd.errors import NotFoundError, UserError
from onnxslim_kd.model import ModelLike, infer_shapes, name_of
from onnxslim_kd.passes import losses
from onnxslim_kd.passes.adapters import Adapter
from onnxslim_kd.passes.join import Joined, Teachers, join
from onnxslim_kd.passes.losses import LossSpec
from onnxslim_kd.passes.scope import Labels, Scope

LOSS = "loss"
"""The output that holds the weighted sum of all terms."""


def merge(
    student: ModelLike,
    teachers: Teachers,
    terms: Sequence[str | LossSpec],
    *,
    inputs_map: Mapping[str, str] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    seed: int = 0,
) -> ir.Model:
    """Merge a student with its teachers and add distillation losses.

    Args:
        student: A path or a model; a given object is copied, not changed.
        teachers: One model, called ``teacher``, or several by name; a name and ``_`` is the
            prefix of everything that comes from that teacher.
        terms: Losses, as `LossSpec` or as text: ``l2:STUDENT_VALUE=TEACHER_VALUE,weight=0.5``.
        inputs_map: Teacher input -> student input, where names differ and shapes do not decide.
        adapters: Teacher input ("" for its only image) -> what its layout, size, normalisation
            or type needs.
        seed: Of the initial weights of trainable loss parameters.

    Returns:
        The merged model: the student's outputs, ``loss``, and one scalar per term.

    Raises:
        UserError: A request that cannot be met; the message names what does not fit.
        ModelError: One of the models cannot be read or is not supported.
    """
    if not isinstance(teachers, Mapping):
        teachers = {"teacher": teachers}
    specs = [losses.parse(term) if isinstance(term, str) else term for term in terms]
    if not specs:
        raise UserError("a merge needs at least one loss; give --loss KIND:STUDENT=TEACHER")
    joined = join(student, teachers, inputs_map or {}, adapters or {})
    add_losses(joined, specs, seed)
    infer_shapes(joined.model)
    return joined.model


def add_losses(joined: Joined, specs: Sequence[LossSpec], seed: int) -> None:
    """Append the losses and their outputs to a joined graph, and record the roles.

    Raises:
        UserError: A value that is not there or does not fit its loss; two terms of one name.
    """
    graph = joined.model.graph
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    names = _term_names(joined, specs)
    scalars, weighted = [], []
    parameters: list[str] = []
    masks: list[roles.Mask] = []
    labels, known = Labels(graph), set(graph)
    for name, spec in zip(names, specs, strict=True):
        scope = Scope(graph, name, labels=labels, seed=seed)
        student = [v for w in spec.student for v in _student(joined, spec, w)]
        teacher = [v for w in spec.teacher for v in _teacher(joined, w)]
        scalar = scope.op("Identity", losses.build(scope, spec, student, teacher))
        scalar.name = name
        scalars.append(scalar)
        weighted.append(scope.op("Mul", scalar, spec.weight))
        _mark_new(graph, known, name)
        parameters += scope.parameters
        masks += scope.masks
    graph.outputs.append(_total(graph, weighted))
    _mark_new(graph, known, LOSS)
    graph.outputs.extend(scalars)
    roles.write(
        joined.model,
        roles.Roles(
            student_inputs=tuple(map(name_of, inputs)),
            student_outputs=tuple(map(name_of, outputs)),
            student_shapes=joined.shapes,
            teachers=tuple(joined.records),
            loss=LOSS,
            terms=tuple(_term(name, spec) for name, spec in zip(names, specs, strict=True)),
            labels=tuple(labels.roles),
            masks=tuple(masks),
            loss_parameters=tuple(parameters),
        ),
    )


def _term(name: str, spec: LossSpec) -> roles.Term:
    return roles.Term(
        name=name,
        kind=spec.kind,
        output=name,
        weight=spec.weight,
        start_epoch=spec.start_epoch,
        end_epoch=spec.end_epoch,
    )


def _term_names(joined: Joined, specs: Sequence[LossSpec]) -> list[str]:
    """The given names, else the kind, numbered where it would stand twice."""
    taken = {LOSS, *joined.student.values}
    asked = [spec.name for spec in specs if spec.name]
    for name in asked:
        if asked.count(name) > 1:
            raise UserError(f"two losses are called {name!r}; give each its own name=")
        if name in taken:
            raise UserError(f"a loss cannot be called {name!r}: a value has that name; use name=")
    if LOSS in joined.student.values:
        raise UserError(f"the student has a value called {LOSS!r}, the name of the merged output")
    taken.update(asked)
    names = []
    for spec in specs:
        name, extra = spec.name or spec.kind, 1
        while not spec.name and name in taken:
            extra += 1
            name = f"{spec.kind}_{extra}"
        taken.add(name)
        names.append(name)
    return names


def _student(joined: Joined, spec: LossSpec, wanted: str) -> list[ir.Value]:
    """Find a student's value; a loss on ground truth alone may stand on a teacher's, too.

    That is for mutual learning, where all networks learn from the labels.
    """
    if losses.LOSSES[spec.kind].alone and not spec.teacher and wanted not in joined.student.values:
        found = _prefixed(joined, wanted)
        if found is not None:
            return [found]
    return joined.student.find(wanted, joined.teachers.values())


def _teacher(joined: Joined, wanted: str) -> list[ir.Value]:
    """Find a teacher's value, by its own name or by its name with the prefix."""
    prefixed = _prefixed(joined, wanted)
    if prefixed is not None:
        return [prefixed]
    branches = list(joined.teachers.values())
    if not branches:
        raise UserError(f"a loss reads the teacher's value {wanted!r}, and there is no teacher")
    if len(branches) == 1:
        return branches[0].find(wanted, [joined.student])
    found = {}
    for name, branch in joined.teachers.items():
        try:
            found[name] = branch.find(wanted)
        except NotFoundError:
            continue
    if len(found) > 1:
        options = ", ".join(f"{name}_{wanted}" for name in found)
        raise UserError(f"several teachers have a value {wanted!r}; write one of {options}")
    if not found:
        return branches[0].find(wanted, [joined.student, *branches])
    return found.popitem()[1]


def _prefixed(joined: Joined, wanted: str) -> ir.Value | None:
    """The teacher's value that ``wanted`` names with the teacher's prefix."""
    for name, branch in joined.teachers.items():
        own = wanted.removeprefix(f"{name}_")
        if own != wanted and own in branch.values:
            return branch.values[own]
    return None


def _mark_new(graph: ir.Graph, known: set[ir.Node], term: str) -> None:
    """Record at the nodes added since the last call whose term they are."""
    for node in graph:
        if node not in known:
            node.metadata_props[roles.TERM] = term
            known.add(node)


def _total(graph: ir.Graph, parts: Sequence[ir.Value]) -> ir.Value:
    node = ir.node("Sum", parts, name=LOSS)
    graph.append(node)
    (output,) = node.outputs
    output.name = LOSS
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    return output
