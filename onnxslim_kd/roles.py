"""Who is who in a merged graph: written once by merge, read by train and infer-prune.

The roles are JSON in the model's metadata, so that no later pass parses names.
"""

from typing import Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, ValidationError

from onnxslim_kd.errors import ModelError

KEY = "onnxslim_kd.roles"
TERM = "onnxslim_kd.term"
"""Node metadata: the loss term that a node computes, ``loss`` for their sum."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Teacher(_Frozen):
    """One teacher inside the graph."""

    name: str
    prefix: str
    """Of every name that came from the teacher."""
    inputs: dict[str, str] = {}
    """The teacher's own input -> the value of the graph that feeds it."""
    outputs: tuple[str, ...]
    """The teacher's own outputs, prefixed; they are values of the graph, not graph outputs."""


class Term(_Frozen):
    """One loss term."""

    name: str
    kind: str
    """The key in LOSSES, or ``custom``."""
    output: str
    """The graph output that holds the unweighted scalar."""
    weight: float = 1.0
    start_epoch: int = 0
    end_epoch: int | None = None
    """The first epoch without this term; None for never."""


class Mask(_Frozen):
    """A graph input that the trainer fills with seeded noise (MGD masks, dropout)."""

    input: str
    keep: float
    """The probability of a 1; every element is 0 or 1."""


class Label(_Frozen):
    """A graph input for ground truth."""

    input: str
    kind: Literal["class", "mask", "boxes", "soft", "ratios"] = "class"
    scores: str = ""
    """The value whose classes it tells: its shape is that of the label but for ``axis``."""
    axis: int | None = None
    """The classes' axis in ``scores``; None where there is a label for every element."""


class Roles(_Frozen):
    """The roles of a merged graph's parts."""

    version: Literal[1] = 1
    student_inputs: tuple[str, ...]
    student_outputs: tuple[str, ...]
    student_shapes: dict[str, tuple[int | str | None, ...]] = {}
    """Of its inputs and outputs, as they were alone: a teacher of one size may have fixed them."""
    teachers: tuple[Teacher, ...]
    loss: str
    """The graph output that holds the weighted sum of the terms."""
    terms: tuple[Term, ...]
    labels: tuple[Label, ...] = ()
    masks: tuple[Mask, ...] = ()
    loss_parameters: tuple[str, ...] = ()
    """Initializers that belong to losses and train with the student (align convs, ...)."""


def write(model: ir.Model, roles: Roles) -> None:
    """Record ``roles`` in the model's metadata."""
    model.metadata_props[KEY] = roles.model_dump_json()


def read(model: ir.Model) -> Roles | None:
    """Return the roles that merge recorded, or None for a plain model.

    Raises:
        ModelError: The record is there but damaged.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return None
    try:
        return Roles.model_validate_json(text)
    except ValidationError as error:
        raise ModelError(f"metadata {KEY} is damaged: {error}; merge again") from error
