"""How far the outputs of two models lie apart, so that a fast wrong model is not called fast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Outputs = Mapping[str, Any]
SAME = 1e-2
"""The share of an output's range up to which two outputs count as the same."""


@dataclass(frozen=True)
class Difference:
    """Outputs against the reference's, over all samples."""

    agreement: float | None
    """Share of positions whose largest entry along the class axis is the same; None: no classes."""
    largest: float
    """The largest absolute difference."""
    relative: float
    """The largest difference as a share of the largest absolute value of that output."""
    problem: str | None = None
    """Why outputs could not be compared, or must not be trusted."""

    @property
    def same(self) -> bool:
        """Whether the outputs are the same up to rounding."""
        return self.problem is None and self.relative <= SAME

    def __str__(self) -> str:
        if self.problem is not None:
            return self.problem
        apart = f"largest difference {self.largest:.2g} ({self.relative:.2%} of the range)"
        return apart if self.agreement is None else f"top-1 agreement {self.agreement:.1%}, {apart}"


def difference(reference: Sequence[Outputs], other: Sequence[Outputs]) -> Difference:
    """Compare the outputs of two models, one mapping per sample."""
    largest = relative = 0.0
    hits: list[float] = []
    for expected, found in zip(reference, other, strict=True):
        for name, wanted in expected.items():
            got = found[name]
            problem = _problem(name, wanted, got)
            if problem is not None:
                return Difference(None, 0.0, 0.0, problem)
            if wanted.size:
                a, b = np.asarray(wanted, np.float64), np.asarray(got, np.float64)
                apart = float(np.abs(a - b).max())
                largest = max(largest, apart)
                relative = max(relative, apart / max(float(np.abs(a).max()), 1e-12))
                hits += _hits(a, b) if wanted.dtype.kind == "f" else []
    return Difference(float(np.mean(hits)) if hits else None, largest, relative)


def _problem(name: str, wanted: Any, got: Any) -> str | None:
    if not isinstance(wanted, np.ndarray) or wanted.dtype.kind in "OUS":
        return f"output {name} is no tensor of numbers: not compared"
    if wanted.shape != got.shape:
        return f"output {name} has shape {got.shape} instead of {wanted.shape}"
    if wanted.dtype.kind == "f" and not np.isfinite(got).all():
        return f"output {name} holds values that are not finite"
    return None


def _hits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> list[float]:
    """Return where both have the same class: axis 1 of (N, C) and (N, C, H, W)."""
    if a.ndim not in (2, 4) or a.shape[1] < 2:
        return []
    return list(np.ravel(a.argmax(1) == b.argmax(1)).astype(float))
