"""A pruning plan: what goes, who asked for it, what stays and why. Frozen JSON, no weights."""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import write_text


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Member(_Frozen):
    """One axis of one parameter in a group."""

    parameter: str
    axis: int
    node: str
    """The node that reads the parameter, or makes it up."""
    before: int
    after: int
    kept: tuple[int, ...] | None = None
    """The indices kept, for an output axis; None for what only follows."""


class Group(_Frozen):
    """Channels that share an output axis, and are therefore chosen together."""

    asked_by: tuple[str, ...]
    """The parameters that a pattern or a list named."""
    ratio: float
    """The share of the group that was asked for."""
    units: int
    """The smallest removable things in the group: a channel, a head, a channel of every group."""
    removed: int
    """How many of them go."""
    members: tuple[Member, ...]
    importance: tuple[float, ...]
    """The score of every unit, the least important go."""
    approximate: tuple[str, ...] = ()
    """Why removal differs from masking, where it does: a norm or softmax runs over the group."""


class Refusal(_Frozen):
    """A parameter that was asked for and stays."""

    parameter: str
    reason: str


class Options(_Frozen):
    """How the graph was read; a replay reads it the same way."""

    attention: Literal["auto", "heads", "dims"] = "heads"
    free_outputs: tuple[str, ...] = ()


class Plan(_Frozen):
    """Everything `cut` needs, and everything a reader asks."""

    version: Literal[1] = 1
    options: Options = Options()
    criterion: str
    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    macs_before: int = 0
    macs_after: int = 0

    @property
    def approximate(self) -> bool:
        """Whether any group is removed where only masking would be exact."""
        return any(group.approximate and group.removed for group in self.groups)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the plan as JSON.

        Raises:
            UserError: The folder is missing, or the file exists and ``overwrite`` is False.
        """
        write_text(path, self.model_dump_json(indent=1) + "\n", overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            UserError: The file is missing or is no plan.
        """
        try:
            return cls.model_validate_json(Path(path).read_text("utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValidationError, UnicodeDecodeError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not text"
            raise UserError(f"{path}: not a pruning plan: {detail}") from error
