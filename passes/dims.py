"""Agree on the dimensions of inputs that two models share.

Every dimension is a number, a symbol of one of the models, or unknown. Sharing an input makes the
dimensions at the same position equal; numbers win over symbols, the student's symbols win over
the teacher's. What follows for the other values of both models is substituted everywhere.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.rename import values_of

Dim = int | str | None
"""None stands for an unknown dimension without a name."""
LONG = 16
"""Characters of a symbol above which it is a formula, and no help to a reader."""


def read(value: ir.Value) -> list[Dim] | None:
    """Return the dimensions of ``value`` with their symbols, None where the rank is unknown."""
    if value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def text(value: ir.Value) -> str:
    """Return dtype and shape for messages, as ``float32[N,3,224,224]``."""
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    dims = read(value)
    if dims is None:
        return f"{dtype}[unknown rank]"
    return f"{dtype}[{','.join('?' if d is None or len(str(d)) > LONG else str(d) for d in dims)}]"


def settled(shape: ir.Shape, inputs: Sequence[ir.Value]) -> ir.Shape:
    """Return ``shape`` in the symbols of ``inputs`` alone, for a further input beside them.

    Exporters give the dimensions of outputs names of their own, even one name to different sizes.
    A first dimension that nothing else is known of is the batch; others stay unknown.
    """
    found = [read(value) or [] for value in inputs]
    symbols = {dim for dims in found for dim in dims if isinstance(dim, str)}
    batches = {dims[0] for dims in found if dims}
    batch = batches.pop() if len(batches) == 1 else None
    own = [d if isinstance(d, int) else d.value for d in shape]
    known = [d if isinstance(d, int) or d in symbols else None for d in own]
    return ir.Shape([batch, *known[1:]] if known[:1] == [None] else known)


class Agreement:
    """Symbols that were found to be equal to numbers or to other symbols."""

    def __init__(self) -> None:
        self._known: dict[str, Dim] = {}

    def resolve(self, dim: Dim) -> Dim:
        """Return what ``dim`` stands for after all that was agreed."""
        while isinstance(dim, str) and dim in self._known:
            dim = self._known[dim]
        return dim

    def equate(self, student: Dim, teacher: Dim) -> bool:
        """Make two dimensions equal; False when they are different numbers."""
        ours, theirs = self.resolve(student), self.resolve(teacher)
        if ours == theirs or ours is None or theirs is None:
            return True
        if isinstance(theirs, str):
            self._known[theirs] = ours
        elif isinstance(ours, str):
            self._known[ours] = theirs
        else:
            return False
        return True

    def share(self, student: ir.Value, teacher: ir.Value) -> None:
        """Agree that both models read ``student`` where one had ``teacher``.

        Raises:
            UserError: The types or shapes contradict each other; the message names both.
        """
        if not fits(student, teacher, self):
            raise UserError(
                f"the teacher's input {teacher.name!r} is {text(teacher)} but the student's"
                f" {student.name!r} is {text(student)}; map another input with --map, or adapt it"
                f" with --adapt layout=, resize=, dtype="
            )
        if student.shape is None:
            student.shape = teacher.shape
        ours, theirs = read(student) or [], read(teacher) or []
        for a, b in zip(ours, theirs, strict=False):
            self.equate(a, b)
        if theirs:
            student.shape = ir.Shape(
                [b if a is None else a for a, b in zip(ours, theirs, strict=True)]
            )

    def apply(self, model: ir.Model) -> None:
        """Write what was agreed into every shape of ``model``."""
        if self._known:
            map_symbols(model, self.resolve)


def fits(student: ir.Value, teacher: ir.Value, agreed: Agreement) -> bool:
    """Tell whether the teacher could read the student's input as it is."""
    if None not in (student.dtype, teacher.dtype) and student.dtype != teacher.dtype:
        return False
    ours, theirs = read(student), read(teacher)
    if ours is None or theirs is None:
        return True
    trial = Agreement()
    trial._known = dict(agreed._known)
    return len(ours) == len(theirs) and all(map(trial.equate, ours, theirs))


def map_symbols(model: ir.Model, change: Callable[[str], Dim]) -> None:
    """Replace every named dimension of every value of ``model``, subgraphs included."""
    for graph in model.graphs():
        for value in values_of(graph):
            dims = read(value)
            if dims is not None and any(isinstance(d, str) for d in dims):
                value.shape = ir.Shape([change(d) if isinstance(d, str) else d for d in dims])
