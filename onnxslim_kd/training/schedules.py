"""The learning rate as a function of the step: nothing to save, nothing to restore."""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["constant", "piecewise", "cosine", "linear", "poly"]


class Schedule(BaseModel):
    """How the learning rate moves; lengths are in epochs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind = "cosine"
    warmup: float = Field(default=0.0, ge=0)
    """Epochs over which the rate rises from 0 to what the schedule then begins with."""
    boundaries: tuple[float, ...] = ()
    """piecewise: the epochs at which the next value begins."""
    values: tuple[float, ...] = ()
    """piecewise: learning rates, one more than boundaries; empty for a tenth at each boundary."""
    final: float = Field(default=0.0, ge=0, le=1)
    """cosine, linear, poly: the last rate as a part of the first."""
    power: float = Field(default=0.9, gt=0)
    """poly: the exponent."""

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.kind == "piecewise" and not self.boundaries:
            raise ValueError("piecewise needs boundaries, for instance [30, 60, 90]")
        if list(self.boundaries) != sorted(self.boundaries):
            raise ValueError("boundaries must rise")
        if self.values and len(self.values) != len(self.boundaries) + 1:
            raise ValueError(f"values must be one more than boundaries: {len(self.boundaries) + 1}")
        return self

    def rate(self, lr: float, epoch: float, epochs: int) -> float:
        """Return the learning rate at ``epoch`` (with its fraction) of ``epochs``."""
        begun = max(epoch, self.warmup)
        done = (begun - self.warmup) / max(epochs - self.warmup, 1e-9)
        rate = SHAPES[self.kind](self, lr, begun, min(done, 1.0))
        return rate if epoch >= self.warmup else rate * epoch / self.warmup


def _piecewise(schedule: Schedule, lr: float, epoch: float, done: float) -> float:
    index = bisect_right(schedule.boundaries, epoch)
    return schedule.values[index] if schedule.values else lr * 0.1**index


def _falling(part: Callable[[Schedule, float], float]) -> Callable[..., float]:
    """Make a shape that goes from 1 to 0 go from lr to lr * final."""
    return lambda schedule, lr, epoch, done: (
        lr * (schedule.final + (1 - schedule.final) * part(schedule, done))
    )


SHAPES: dict[str, Callable[[Schedule, float, float, float], float]] = {
    "constant": lambda schedule, lr, epoch, done: lr,
    "piecewise": _piecewise,
    "cosine": _falling(lambda schedule, done: (1 + math.cos(math.pi * done)) / 2),
    "linear": _falling(lambda schedule, done: 1 - done),
    "poly": _falling(lambda schedule, done: (1 - done) ** schedule.power),
}
