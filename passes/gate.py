"""Apply steps that must not change what a model computes, and keep only those that do not.

All steps are applied first and the outputs are compared once: that is enough for nearly every model
and costs one session. Where a step raises, or the outputs differ, the steps are applied again one
by one, each with its own comparison, and the guilty ones are left out with a note.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxslim_kd.access import graphs


@dataclass(frozen=True)
class Step:
    """One change of the graph, in place."""

    name: str
    apply: Callable[[ir.Model], object]


@dataclass(frozen=True)
class Gated:
    """The model after the steps that were right.

    Attributes:
        model: The model, changed.
        removed: By how many nodes each step made the graph smaller, by its name.
        notes: One sentence for each step that was left out.
    """

    model: ir.Model
    removed: dict[str, int]
    notes: list[str]


def apply(
    model: ir.Model,
    steps: Sequence[Step],
    differs: Callable[[ir.Model], str | None],
    *,
    again: Callable[[], ir.Model],
) -> Gated:
    """Apply ``steps`` to ``model``, in place.

    Args:
        model: The model; use the one that is returned.
        steps: In this order; a name may come twice.
        differs: Says what is wrong with a changed model, or None.
        again: Makes the model once more, for a wrong step has spoilt it.
    """
    together = _together(model, steps)
    if together is not None and differs(together.model) is None:
        return together
    return _one_by_one(again(), steps, differs)


def _together(work: ir.Model, steps: Sequence[Step]) -> Gated | None:
    removed, before = dict.fromkeys((step.name for step in steps), 0), size(work)
    for step in steps:
        try:
            step.apply(work)
        except Exception:  # any bug of a library's pass: found and named one by one
            return None
        after = size(work)
        removed[step.name] += before - after
        before = after
    return Gated(work, removed, [])


def _one_by_one(
    kept: ir.Model, steps: Sequence[Step], differs: Callable[[ir.Model], str | None]
) -> Gated:
    removed, notes = dict.fromkeys((step.name for step in steps), 0), []
    for step in steps:
        work = kept.clone()
        try:
            step.apply(work)
            wrong = differs(work)
        except Exception as error:  # a library's pass may raise anything on a model it mistakes
            wrong = f"it failed: {error}"
        if wrong is None:
            removed[step.name] += size(kept) - size(work)
            kept = work
        else:
            notes.append(f"{step.name}: left out, {wrong}")
    return Gated(kept, removed, notes)


def size(model: ir.Model) -> int:
    """Count the nodes of all graphs."""
    return sum(map(len, graphs(model)))
