"""Put teachers beside a student in one graph: shared inputs, prefixed names, no losses yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import onnx_ir as ir

from onnxslim_kd import roles
from onnxslim_kd.errors import ModelError, UserError
from onnxslim_kd.model import ModelLike, infer_shapes, load, name_of, raise_opset
from onnxslim_kd.passes import adapters as adapt
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.adapters import Adapter
from onnxslim_kd.passes.rename import add_prefix, values_of
from onnxslim_kd.passes.taps import Branch
from onnxslim_kd.roles import Teacher

Teachers: TypeAlias = "Mapping[str, ModelLike] | ModelLike"
"""One teacher, which is called ``teacher``, or several by name."""


@dataclass
class Joined:
    """Student and teachers in one graph, with what is needed to name their values."""

    model: ir.Model
    """The student, with the teachers' nodes behind its own."""
    student: Branch
    teachers: dict[str, Branch] = field(default_factory=dict)
    """By the teacher's name."""
    records: list[Teacher] = field(default_factory=list)
    shapes: dict[str, tuple[dims.Dim, ...]] = field(default_factory=dict)
    """Of the student's inputs and outputs by name, as they were alone."""


def join(
    student: ModelLike,
    teachers: Mapping[str, ModelLike],
    inputs_map: Mapping[str, str],
    adapters: Mapping[str, Adapter],
) -> Joined:
    """Load all models, raise them to one opset, and move the teachers into the student's graph.

    Args:
        student: Any model that `load` takes; a given object is copied, not changed.
        teachers: By name; the name and ``_`` is the prefix of all that comes from the teacher.
        inputs_map: Teacher input -> student input, where names differ.
        adapters: Teacher input -> what to do with the student's input first.

    Raises:
        UserError: Inputs that do not fit, names that collide, a model merged before.
    """
    base = _plain(student, "the student")
    guests = {name: _plain(source, f"teacher {name!r}") for name, source in teachers.items()}
    version = max(m.graph.opset_imports[""] for m in (base, *guests.values()))
    for model in (base, *guests.values()):
        raise_opset(model, version)
    joined = Joined(base, Branch.of("student", base), shapes=_interface(base))
    _refuse_unused(guests, inputs_map, "--map")
    _refuse_unused(guests, adapters, "--adapt")
    for name, guest in guests.items():
        _join_one(joined, name, guest, inputs_map, adapters)
    infer_shapes(base)
    return joined


def _interface(model: ir.Model) -> dict[str, tuple[dims.Dim, ...]]:
    values = (*model.graph.inputs, *model.graph.outputs)
    shapes = {name_of(value): dims.read(value) for value in values}
    return {name: tuple(shape) for name, shape in shapes.items() if shape is not None}


def _plain(source: ModelLike, title: str) -> ir.Model:
    model = load(source)
    if roles.read(model) is not None:
        raise UserError(
            f"{title} is a merged model already; merge the models it was made of,"
            f" with all teachers at once"
        )
    return model


def _refuse_unused(
    guests: Mapping[str, ir.Model], given: Mapping[str, object], option: str
) -> None:
    known = [name_of(v) for guest in guests.values() for v in guest.graph.inputs]
    for name in given:
        if name and name not in known:
            inputs = ", ".join(dict.fromkeys(known))
            raise UserError(
                f"{option} {name}: no teacher has an input of that name; inputs: {inputs}"
            )


def _join_one(
    joined: Joined,
    name: str,
    guest: ir.Model,
    inputs_map: Mapping[str, str],
    adapters: Mapping[str, Adapter],
) -> None:
    base, prefix = joined.model, f"{name}_"
    title = "teacher" if name == "teacher" else f"teacher {name!r}"
    branch = Branch.of(title, guest)
    own = {value: name_of(value) for value in guest.graph.inputs}
    dims.map_symbols(guest, lambda symbol: prefix + symbol)
    agreed = dims.Agreement()
    pairs = _pair_inputs(base, guest, inputs_map, _adapted(guest, adapters), agreed)
    add_prefix(guest, prefix)
    _refuse_collisions(base, guest, prefix)
    agreed.apply(guest)
    agreed.apply(base)
    sources: dict[ir.Value, ir.Value] = {}
    for value, (source, adapter) in pairs.items():
        if adapter is not None:
            source = adapt.apply(base, source, adapter, name_of(value))
        sources[value] = source
    outputs = tuple(name_of(sources.get(v, v)) for v in guest.graph.outputs)
    guest.graph.outputs.clear()  # an input may be one, and what feeds it an output of the student
    for value, source in sources.items():
        value.replace_all_uses_with(source)
    feeds = {own[value]: source for value, source in sources.items()}
    _move(guest, base, prefix)
    # a loss on the teacher's input, as in an autoencoder, reads what feeds it
    joined.teachers[name] = replace(branch, values={**branch.values, **feeds})
    inputs = {own_name: name_of(source) for own_name, source in feeds.items()}
    joined.records.append(Teacher(name=name, prefix=prefix, inputs=inputs, outputs=outputs))


def _adapted(guest: ir.Model, adapters: Mapping[str, Adapter]) -> dict[ir.Value, Adapter]:
    """Give every adapter its input; one without a name is for the only image-like input."""
    found = {v: adapters[name_of(v)] for v in guest.graph.inputs if name_of(v) in adapters}
    if "" in adapters:
        images = [v for v in guest.graph.inputs if v.shape is not None and len(v.shape) == 4]
        if len(images) != 1:
            names = ", ".join(name_of(v) for v in guest.graph.inputs)
            raise UserError(
                f"--adapt needs the name of the input, for {len(images)} of the teacher's inputs"
                f" have 4 dimensions; write --adapt NAME:..., with one of {names}"
            )
        found[images[0]] = adapters[""]
    return found


Pairs = dict[ir.Value, tuple[ir.Value, Adapter | None]]


def _pair_inputs(
    base: ir.Model,
    guest: ir.Model,
    inputs_map: Mapping[str, str],
    adapters: Mapping[ir.Value, Adapter],
    agreed: dims.Agreement,
) -> Pairs:
    """Find the student's input for each of the teacher's: as told, by name, by the only fit."""
    sources = {name_of(v): v for v in base.graph.inputs}
    pairs: Pairs = {}
    for value in guest.graph.inputs:
        name = inputs_map.get(name_of(value), name_of(value))
        if name in sources:
            pairs[value] = (sources[name], adapters.get(value))
        elif name_of(value) in inputs_map:
            raise UserError(
                f"--map {name_of(value)}={name}: the student has no input {name!r};"
                f" its inputs are {', '.join(sources)}"
            )
    taken = {source for source, _ in pairs.values()}
    for value in [v for v in guest.graph.inputs if v not in pairs]:
        free = [v for v in base.graph.inputs if v not in taken]
        source = _only_fit(value, free, adapters.get(value), agreed)
        taken.add(source)
        pairs[value] = (source, adapters.get(value))
    for value, (source, adapter) in pairs.items():
        if adapter is None:
            agreed.share(source, value)
        else:
            adapt.check(source, value, adapter, agreed)
    return pairs


def _only_fit(
    value: ir.Value, free: list[ir.Value], adapter: Adapter | None, agreed: dims.Agreement
) -> ir.Value:
    if adapter is None:
        fitting = [v for v in free if dims.fits(v, value, agreed)]
    else:
        fitting = [v for v in free if v.shape is not None and len(v.shape) == 4]
    if len(fitting) == 1:
        return fitting[0]
    have = ", ".join(f"{v.name} {dims.text(v)}" for v in fitting or free) or "none is left"
    what = f"the teacher's input {value.name!r} {dims.text(value)}"
    if fitting:
        raise UserError(f"{what} fits several inputs of the student ({have}); choose with --map")
    raise UserError(
        f"nothing feeds {what}: no input of the student has its name or fits ({have});"
        f" choose one with --map, or adapt it with --adapt"
    )


def _refuse_collisions(base: ir.Model, guest: ir.Model, prefix: str) -> None:
    taken = _names(base)
    for name in _names(guest):
        if name in taken:
            raise UserError(
                f"prefix {prefix!r} gives a name that is there already, {name!r};"
                f" choose another with --prefix"
            )


def _names(model: ir.Model) -> dict[str, None]:
    """All names of values and nodes, in the order of the graph."""
    found: dict[str, None] = {}
    for graph in model.graphs():
        found.update((v.name, None) for v in values_of(graph) if v.name)
        found.update((node.name, None) for node in graph if node.name)
    return found


def _move(guest: ir.Model, base: ir.Model, prefix: str) -> None:
    """Move nodes, weights and metadata of ``guest`` into ``base``; nothing is copied."""
    graph = guest.graph
    graph.inputs.clear()
    graph.outputs.clear()
    nodes, weights = list(graph), list(graph.initializers.values())
    graph.initializers.clear()
    graph.remove(nodes)
    base.graph.initializers.update((name_of(v), v) for v in weights)
    base.graph.extend(nodes)
    for domain, version in guest.graph.opset_imports.items():
        have = base.graph.opset_imports.setdefault(domain, version)
        if have != version:
            raise ModelError(
                f"student and teacher need operator domain {domain!r} in different versions"
                f" ({have} and {version}); export both with the same tools"
            )
    base.ir_version = max(base.ir_version, guest.ir_version)
    base.metadata_props.update((prefix + key, text) for key, text in guest.metadata_props.items())
