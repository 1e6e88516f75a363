"""How much a metric loses when a share of one group's channels is silent; and ratios from that.

One session runs the model with masks as inputs, so that a point costs one evaluation and no
rebuilding. The file is written anew, whole, after every point: a killed run goes on where it was,
and ends with the same bytes as one that was not killed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, ValidationError

from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.model import write_text
from onnxslim_kd.passes.criteria import criterion
from onnxslim_kd.passes.groups import Analysis, Parameter
from onnxslim_kd.passes.masks import Masked, with_masks
from onnxslim_kd.passes.ratios import Amount, Candidate, Request, candidates
from onnxslim_kd.runtime import Array, Session
from onnxslim_kd.samples import Samples

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WATCHED = 1 << 16
"""Numbers of an output that are compared, evenly spread."""
FARTHEST = 1e6
"""Stands for outputs that are not finite."""
Score = Callable[[Session], float]
"""Runs a session over the data and gives one number."""


class Sensitivities(BaseModel):
    """The contents of a sensitivity file.

    Attributes:
        model: A fingerprint of the parameters' names and shapes.
        measure: What was measured: metric and data, as text.
        criterion: Which channels were silenced first.
        lower_is_better: Whether a smaller number is the better one.
        baseline: The number of the whole model.
        losses: Per parameter and ratio, the share of the baseline that was lost; negative where
            the metric grew.
        moved: Per parameter and ratio, the squared error of the outputs against the whole model's,
            over their squares. Where a count such as top-1 stands still, this does not.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    model: str
    measure: str
    criterion: str
    lower_is_better: bool = False
    baseline: float
    losses: dict[str, dict[str, float]] = {}
    moved: dict[str, dict[str, float]] = {}

    def text(self) -> str:
        """The file: sorted, so that the order of measuring leaves no trace."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"

    def curve(self, parameter: str) -> list[tuple[float, float]]:
        """The points of one parameter, by ratio."""
        return _sorted(self.losses.get(parameter, {}))

    def curves(self, *, moved: bool = False) -> dict[str, list[tuple[float, float]]]:
        """The points of all parameters.

        Args:
            moved: Those of the outputs instead of the metric's, if they were kept everywhere.
        """
        kept = all(self.moved.get(name, {}).keys() == p.keys() for name, p in self.losses.items())
        table = self.moved if moved and kept else self.losses
        return {name: _sorted(points) for name, points in table.items()}


def _sorted(points: Mapping[str, float]) -> list[tuple[float, float]]:
    return sorted((float(ratio), loss) for ratio, loss in points.items())


def load(path: str | os.PathLike[str]) -> Sensitivities:
    """Read a sensitivity file.

    Raises:
        UserError: It is missing or is none.
    """
    try:
        return Sensitivities.model_validate_json(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a sensitivity file; measure again") from error


def fingerprint(model: ir.Model) -> str:
    """Return a hash of the names and shapes of all parameters, not of their numbers."""
    rows = sorted(f"{name} {value.shape}" for name, value in model.graph.initializers.items())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------- measuring


class MaskedSession(Session):
    """A session whose masks are fed beside the inputs."""

    def __init__(self, masked: Masked, gone: Array, **options: Any) -> None:
        super().__init__(masked.model, **options)
        self._masked = masked
        self.masks = masked.feeds(gone)

    def silence(self, gone: Array) -> None:
        """Silence the ids that ``gone`` marks from now on."""
        self.masks = self._masked.feeds(gone)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return the outputs for ``feeds`` under the present masks."""
        return super().run({**feeds, **self.masks}, outputs)


class WatchedSession(MaskedSession):
    """Also tells how far the outputs are from the whole model's, which must be scored first."""

    def __init__(self, masked: Masked, gone: Array, **options: Any) -> None:
        super().__init__(masked, gone, **options)
        self._whole: list[dict[str, Array]] = []
        self._errors: list[float] | None = None

    def silence(self, gone: Array) -> None:
        """Silence the ids that ``gone`` marks, and begin to compare."""
        super().silence(gone)
        self._errors = []

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return the outputs for ``feeds``; every pass must feed the same in the same order."""
        found = super().run(feeds, outputs)
        seen = {name: _thinned(array) for name, array in found.items() if _is_float(array)}
        if self._errors is None:
            self._whole.append(seen)
        else:
            whole = self._whole[len(self._errors) % len(self._whole)]
            self._errors += [_error(whole, seen)]
        return found

    @property
    def moved(self) -> float:
        """The mean squared error over the squares, of the pass since `silence`."""
        mean = float(np.mean(self._errors)) if self._errors else 0.0
        return float(f"{mean:.6g}") if mean < FARTHEST else FARTHEST


def _is_float(output: object) -> bool:
    return isinstance(output, np.ndarray) and output.dtype.kind == "f"


def _thinned(array: Array) -> Array:
    return array.reshape(-1)[:: -(-max(array.size, 1) // WATCHED)].astype(np.float64)


def _error(whole: Mapping[str, Array], seen: Mapping[str, Array]) -> float:
    parts = [
        np.square(seen[name] - want).sum() / (np.square(want).sum() or 1.0)
        if seen[name].shape == want.shape
        else 1.0  # another number of things was found
        for name, want in whole.items()
    ]
    return float(np.mean(parts)) if parts else 0.0


@dataclass(frozen=True)
class Job:
    """What to measure.

    Raises:
        UserError: A ratio is outside of (0, 1).
    """

    analysis: Analysis
    parameters: Sequence[Parameter]
    score: Score
    measure: str
    """What ``score`` is, in words: two files with the same words can be merged."""
    lower_is_better: bool = False
    criterion: str = "l1"
    ratios: Sequence[float] = RATIOS
    samples: Samples | None = None
    """For the criteria that look at data."""

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise UserError(f"--ratios: {ratio:g} is not in (0, 1)")

    def groups(self) -> list[Candidate]:
        """One candidate per group, in the order in which the parameters were named."""
        free = [p for p in self.parameters if self.analysis.refusal(p) is None]
        requests = [Request(p, 0.0) for p in free]
        score = criterion(self.criterion, self.samples)
        return candidates(self.analysis, requests, score, "first")[0]


def run(job: Job, output: Path, **options: Any) -> Iterator[tuple[int, int]]:
    """Measure every point that ``output`` does not hold yet; yield (points done, points in all).

    Args:
        job: What to measure.
        output: The file to go on with, or to begin.
        options: For the session: provider, threads.

    Raises:
        UserError: The file belongs to another model or measurement.
        OperationError: The score is not a finite number.
    """
    masked = with_masks(job.analysis)
    nothing = np.zeros(len(job.analysis.components.label), bool)
    session = WatchedSession(masked, nothing, **options)
    found = _begun(job, output, session)
    points = [(c, ratio) for c in job.groups() for ratio in job.ratios]
    for done, (candidate, ratio) in enumerate(points):
        yield done, len(points)
        name = candidate.asked[0].name
        if f"{ratio:g}" in found.losses.get(name, {}):
            continue
        removed = np.zeros(job.analysis.components.count, bool)
        removed[Amount(round_to=1).removed(candidate, ratio)] = True
        session.silence(removed[job.analysis.components.label])
        value = finite(job.score(session), f"{name} at {ratio:g}")
        lost = (value - found.baseline) if job.lower_is_better else (found.baseline - value)
        scale = abs(found.baseline) or 1.0
        found.losses.setdefault(name, {})[f"{ratio:g}"] = lost / scale
        found.moved.setdefault(name, {})[f"{ratio:g}"] = session.moved
        write_text(output, found.text(), overwrite=True)
    yield len(points), len(points)


def _begun(job: Job, output: Path, session: Session) -> Sensitivities:
    """The file so far, or a new one with its baseline."""
    mark = fingerprint(job.analysis.model)
    before = load(output) if output.exists() else None
    if before is not None:
        _same(before, mark, job.measure, job.criterion, output)
    baseline = finite(job.score(session), "the whole model")  # the session watches
    if before is not None:
        return before
    found = Sensitivities(
        model=mark,
        measure=job.measure,
        criterion=job.criterion,
        lower_is_better=job.lower_is_better,
        baseline=baseline,
    )
    write_text(output, found.text())
    return found


def _same(found: Sensitivities, mark: str, measure: str, criterion: str, path: Path) -> None:
    for what, have, want in (
        ("model", found.model, mark),
        ("measurement", found.measure, measure),
        ("criterion", found.criterion, criterion),
    ):
        if have != want:
            raise UserError(
                f"{path}: was made with another {what} ({have}, now {want}); choose another file"
            )


def finite(value: float, where: str) -> float:
    """Return a number, or refuse what is none.

    Raises:
        OperationError: It is not finite.
    """
    if not isfinite(value):
        raise OperationError(f"the metric is {value} for {where}; it must be a finite number")
    return float(value)


def merge(files: Sequence[Path]) -> Sensitivities:
    """Join files that were measured apart; a later file wins where two hold the same point.

    Raises:
        UserError: They were made with different models or measurements.
    """
    first = load(files[0])
    for path in files[1:]:
        other = load(path)
        _same(other, first.model, first.measure, first.criterion, path)
        for name, points in other.losses.items():
            first.losses.setdefault(name, {}).update(points)
        for name, points in other.moved.items():
            first.moved.setdefault(name, {}).update(points)
    return first
