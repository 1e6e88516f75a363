"""Whether two models take and give the same, and may be compared."""

from typing import Any

from onnxslim_kd.errors import UserError
from onnxslim_kd.runtime import Session


def check_interface(first: str, reference: Session, second: str, other: Session) -> None:
    """Refuse to compare models that do not take and give the same.

    Raises:
        UserError: Names, types or ranks differ; the message says which.
    """
    for kind, expected, found in (
        ("input", reference.inputs, other.inputs),
        ("output", reference.results, other.results),
    ):
        wanted, got = {v.name: v for v in expected}, {v.name: v for v in found}
        for name in wanted | got:
            if name not in got or name not in wanted:
                has, lacks = (first, second) if name in wanted else (second, first)
                raise UserError(
                    f"{first} and {second} cannot be compared: {has} has the {kind} {name},"
                    f" {lacks} has not"
                )
            if _signature(kind, wanted[name]) != _signature(kind, got[name]):
                raise UserError(
                    f"{first} and {second} cannot be compared: {kind} {name} is"
                    f" {_describe(wanted[name])} in {first} and {_describe(got[name])} in {second}"
                )


def _signature(kind: str, value: Any) -> tuple[object, ...]:
    """Return what must be equal: type and rank, and of inputs the fixed sizes as well."""
    if kind == "output" or not value.shape:
        return value.type, len(value.shape or ())
    return value.type, *(d if isinstance(d, int) else None for d in value.shape)


def _describe(value: Any) -> str:
    return f"{value.type} {list(value.shape or ())}"
