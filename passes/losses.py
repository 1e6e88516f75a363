"""Distillation losses as ONNX nodes: `LOSSES` is the whole of what there is, at the bottom.

A loss is a function that takes a `Scope` and float values, appends standard ONNX nodes and returns
a scalar; its keyword-only arguments are its options, and their annotations say what is allowed. To
add one, write such a function in the file of its family, put it in the table, and add a golden or a
formula to the tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import Parameter, signature
from typing import Annotated, Any, Literal, TypeAlias, cast, get_type_hints

import onnx_ir as ir
from pydantic import BeforeValidator, Field, NonNegativeInt, TypeAdapter, ValidationError

from onnxslim_kd.access import is_float
from onnxslim_kd.errors import NotFoundError, UserError, near_misses
from onnxslim_kd.model import dims
from onnxslim_kd.passes.losses_align import Align, aligned
from onnxslim_kd.passes.losses_custom import custom
from onnxslim_kd.passes.losses_detection import yolov3
from onnxslim_kd.passes.losses_features import at, cosine, cwd, fsp, l1, l2, smooth_l1
from onnxslim_kd.passes.losses_labels import ce, dkd, skd, wsl
from onnxslim_kd.passes.losses_logits import dist, dml, js, kl, soft_label
from onnxslim_kd.passes.losses_relations import rkd_angle, rkd_distance
from onnxslim_kd.passes.losses_trained import afd, mgd, overhaul, pefd
from onnxslim_kd.passes.scope import Scope

Builder: TypeAlias = Callable[..., ir.Value]
Names: TypeAlias = Annotated[
    tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Weight: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class LossSpec:
    """One loss term: what, between which values, how much and when.

    Attributes:
        kind: A key of `LOSSES`.
        student: Value names in the student.
        teacher: Value names in the teacher; empty for a loss on ground truth alone.
        name: Of the term; None for ``kind``.
        weight: Of the term in the sum.
        start_epoch: The first epoch with this term.
        end_epoch: The first epoch without it; None for never.
        options: Of the loss itself, checked.
    """

    kind: str
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    name: str | None = None
    weight: float = 1.0
    start_epoch: int = 0
    end_epoch: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """An entry of the table.

    Attributes:
        build: ``(scope, student, teacher, **options) -> scalar``.
        values: ``pairs``: one value of each side, several pairs are summed; ``lists``: the builder
            gets all values of each side at once.
        same: What a pair must share: its ``shape``, its ``map`` (all but the channels, axis 1) or
            nothing but the ``batch``.
        rank: What all values must have: 2 for logits, 4 for maps; None for any.
        on: What `suggest` tries it on: inner ``features``, final ``scores``, ``both``, or only
            ``vectors`` of scores, for its layers would be as large as the square of a map.
        alone: Whether the teacher's side may be empty.
        weight: The default weight of the term.
    """

    build: Builder
    values: Literal["pairs", "lists"] = "pairs"
    same: Literal["shape", "map", "batch"] = "shape"
    rank: Literal[2, 4] | None = None
    on: Literal["features", "scores", "both", "vectors"] = "features"
    alone: bool = False
    weight: float = 1.0


# ------------------------------------------------------------------------------ parse


def parse(text: str) -> LossSpec:
    """Read ``kind[:s1+s2=t1+t2][,weight=1,start=0,end=5,name=...,option=...]``.

    Raises:
        UserError: The text has another form, or an option's value is not allowed.
        NotFoundError: The kind or an option does not exist; near misses are listed.
    """
    head, *settings = text.split(",")
    kind, _, values = head.partition(":")
    entries: dict[str, object] = {"kind": kind}
    if values:
        student, found, teacher = values.partition("=")
        entries["student"] = student.split("+")
        entries["teacher"] = teacher.split("+") if found else []
        if "" in student.split("+") or (found and "" in teacher.split("+")) or "=" in teacher:
            raise UserError(f"--loss {text}: {values!r} is not s1+s2=t1+t2; name the values")
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found or not key:
            raise UserError(f"--loss {text}: {setting!r} is not option=value")
        if key in entries:
            raise UserError(f"--loss {text}: {key} is given twice")
        entries[key] = None if value.lower() in ("none", "null") else value
    return from_mapping(entries)


def from_mapping(entries: Mapping[str, object]) -> LossSpec:
    """Read a loss from YAML: kind, student, teacher (a name or a list) and the options.

    Raises:
        UserError: An option's value is not allowed.
        NotFoundError: The kind or an option does not exist; near misses are listed.
    """
    rest = dict(entries)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in LOSSES:
        raise NotFoundError(
            f"loss {kind!r} is not one of {', '.join(LOSSES)}{near_misses(str(kind), LOSSES)}"
        )
    settings: dict[str, Any] = {}
    allowed = options_of(kind)
    options: dict[str, object] = {}
    for key, value in rest.items():
        if key in FIELDS:
            field_name, adapter = FIELDS[key]
            if field_name in settings:
                raise UserError(f"loss {kind}: {field_name} is given twice")
            settings[field_name] = _checked(kind, key, adapter, value)
        elif key in allowed:
            options[key] = _checked(kind, key, allowed[key].adapter, value)
        elif LOSSES[kind].build is custom:
            options[key] = value
        else:
            known = [*FIELDS, *allowed]
            raise NotFoundError(
                f"loss {kind} has no option {key!r}{near_misses(key, known)}; it takes"
                f" {', '.join([*allowed, 'weight', 'start', 'end', 'name'])}"
            )
    settings.setdefault("weight", LOSSES[kind].weight)
    spec = LossSpec(kind=kind, options=options, **settings)
    if spec.end_epoch is not None and spec.end_epoch <= spec.start_epoch:
        raise UserError(
            f"loss {kind}: it ends at epoch {spec.end_epoch} and starts at {spec.start_epoch}; end"
            f" is the first epoch without it"
        )
    return spec


@dataclass(frozen=True)
class Option:
    """An option of a loss."""

    adapter: TypeAdapter[Any]
    annotation: Any
    default: object


@cache
def options_of(kind: str) -> dict[str, Option]:
    """Return the options of a loss, from its builder's keyword-only arguments."""
    build = LOSSES[kind].build
    hints = get_type_hints(build, include_extras=True)
    found = {
        name: Option(TypeAdapter(hints[name]), hints[name], parameter.default)
        for name, parameter in signature(build).parameters.items()
        if parameter.kind == Parameter.KEYWORD_ONLY
    }
    if LOSSES[kind].values == "pairs":
        found["align"] = Option(TypeAdapter(Align | None), Align | None, None)
    return found


def _checked(kind: str, key: str, adapter: TypeAdapter[Any], value: object) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        why = "; ".join(str(e["msg"]) for e in error.errors())
        raise UserError(f"loss {kind}: {key} cannot be {value!r}: {why}") from error


# ------------------------------------------------------------------------------ build


def build(
    scope: Scope, spec: LossSpec, student: Sequence[ir.Value], teacher: Sequence[ir.Value]
) -> ir.Value:
    """Append the loss to the scope's graph and return its unweighted scalar.

    Args:
        scope: Named after the term; afterwards it knows the parameters, masks and labels.
        spec: What `parse` or `from_mapping` returned.
        student: The values that ``spec.student`` names.
        teacher: The values that ``spec.teacher`` names.

    Raises:
        UserError: The number of values, their types or their shapes do not fit.
        ModelError: A shape that must be known is not.
    """
    loss, options = LOSSES[spec.kind], dict(spec.options)
    how = cast("str | None", options.pop("align", None))
    _check_count(spec, loss, len(student), len(teacher))
    for value in (*student, *teacher):
        _check_value(spec, value, loss.rank)
    # even what the graph calls float32: under mixed precision it is less, and squares overflow
    ours, theirs = ([scope.float32(v) for v in side] for side in (student, teacher))
    if loss.values == "lists":
        return loss.build(scope, ours, theirs, **options)
    terms = []
    for index, one in enumerate(ours):
        with scope.numbered(index if len(ours) > 1 else None):
            other = theirs[index] if theirs else None
            if other is not None:
                one = aligned(scope, one, other, how)
                _check_shapes(spec, loss.same, (student[index], teacher[index]), (one, other))
            terms.append(loss.build(scope, one, other, **options))
    return scope.total(terms)


def _check_count(spec: LossSpec, loss: Loss, students: int, teachers: int) -> None:
    if not students:
        raise UserError(f"loss {spec.kind} names no student value; write {spec.kind}:s=t")
    if not teachers and not loss.alone:
        raise UserError(
            f"loss {spec.kind} names no teacher value; write {spec.kind}:{'+'.join(spec.student)}=t"
        )
    if loss.values == "pairs" and teachers and students != teachers:
        raise UserError(
            f"loss {spec.kind} compares pairs, got {students} student and {teachers} teacher values"
        )


def _check_value(spec: LossSpec, value: ir.Value, rank: int | None) -> None:
    if not is_float(value):
        kind = "of unknown type" if value.type is None else str(value.type)
        raise UserError(f"loss {spec.kind}: {value.name!r} is {kind}; a loss needs floats")
    if rank is not None and len(dims(value)) != rank:
        what = "logits [N, C]" if rank == 2 else "maps [N, C, H, W]"
        raise UserError(f"loss {spec.kind} needs {what}, {value.name!r} is {value.shape}")


def _check_shapes(
    spec: LossSpec, same: str, names: tuple[ir.Value, ir.Value], pair: tuple[ir.Value, ir.Value]
) -> None:
    """Refuse shapes that cannot agree; what is not known is left to the run."""
    one, other = dims(pair[0]), dims(pair[1])
    ranks = bool(one and other) if same == "batch" else len(one) == len(other)
    axes = {"shape": range(len(one)), "map": (0, *range(2, len(one))), "batch": (0,)}[same]
    if ranks and all(None in (one[a], other[a]) or one[a] == other[a] for a in axes):
        return
    free = " besides the channels" if same == "map" else ""
    raise UserError(
        f"loss {spec.kind}: {names[0].name!r} is {names[0].shape} and {names[1].name!r} is"
        f" {names[1].shape}, which must agree{free}; choose other values or pass"
        f" align=conv, linear, pool or resize (or two of them, as conv+pool)"
    )


FIELDS: dict[str, tuple[str, TypeAdapter[Any]]] = {
    "student": ("student", TypeAdapter(Names)),
    "teacher": ("teacher", TypeAdapter(Names)),
    "name": ("name", TypeAdapter(Name)),
    "weight": ("weight", TypeAdapter(Weight)),
    **dict.fromkeys(("start", "start_epoch"), ("start_epoch", TypeAdapter(NonNegativeInt))),
    **dict.fromkeys(("end", "end_epoch"), ("end_epoch", TypeAdapter(NonNegativeInt | None))),
}
"""What every loss takes besides its own options: the field of `LossSpec`, and what is allowed."""

LOSSES: dict[str, Loss] = {
    # values and maps
    "l1": Loss(l1, on="both"),
    "l2": Loss(l2, on="both"),
    "smooth_l1": Loss(smooth_l1, on="both"),
    "cosine": Loss(cosine, on="both"),
    "fsp": Loss(fsp, values="lists", rank=4),
    "at": Loss(at, same="map", rank=4),
    "cwd": Loss(cwd, same="map", rank=4),
    # logits
    "soft_label": Loss(soft_label, on="scores"),
    "kl": Loss(kl, on="scores"),
    "js": Loss(js, on="scores"),
    "dml": Loss(dml, on="scores"),
    "dist": Loss(dist, rank=2, on="scores"),
    # logits, with ground truth
    "ce": Loss(ce, on="scores", alone=True),
    "dkd": Loss(dkd, on="scores"),
    "skd": Loss(skd, on="scores"),
    "wsl": Loss(wsl, on="scores"),
    # relations between samples
    "rkd_distance": Loss(rkd_distance, same="batch", on="both"),
    "rkd_angle": Loss(rkd_angle, same="batch", on="both"),
    # with parameters of their own
    "mgd": Loss(mgd, same="map", rank=4),
    "pefd": Loss(pefd, same="batch", on="vectors"),
    "overhaul": Loss(overhaul, same="map", rank=4),
    "afd": Loss(afd, values="lists", rank=4),
    # detection
    "yolov3": Loss(yolov3, rank=4, weight=1000.0),
    # the user's own
    "custom": Loss(custom, values="lists", alone=True),
}
