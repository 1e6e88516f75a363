"""The criteria by name, whether they look at weights or at data."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.activations import activation, reconstruction, taylor
from onnxslim_kd.passes.groups import Analysis, Parameter
from onnxslim_kd.passes.importance import IMPORTANCES, OVERALL, Criterion, Overall, Scores
from onnxslim_kd.samples import Samples


@dataclass
class ByComponent:
    """A criterion that scores all components of a model at once."""

    name: str
    overall: Overall
    _seen: tuple[Analysis, Scores] | None = None

    def __call__(self, analysis: Analysis, parameter: Parameter) -> Scores:
        """Return the scores of the components that a parameter's channels belong to.

        Raises:
            UserError: None of them has a score.
        """
        if self._seen is None or self._seen[0] is not analysis:
            self._seen = analysis, self.overall(analysis)
        own = self._seen[1][analysis.labels(parameter.birth)]
        if np.isnan(own).all():
            raise UserError(
                f"criterion {self.name} finds nothing that it could measure around"
                f" {parameter.name}; leave it out with --ignore or use --criterion l1"
            )
        return np.nan_to_num(own)


def criterion(name: str, samples: Samples | None = None) -> Criterion:
    """Return the criterion of this name.

    Args:
        name: A key of one of the tables.
        samples: For the criteria that look at data.

    Raises:
        UserError: There is none, or it needs data and got none.
    """
    if name in IMPORTANCES:
        return IMPORTANCES[name]
    if name in OVERALL:
        return ByComponent(name, OVERALL[name])
    if name not in FROM_DATA:
        raise UserError(f"criterion {name!r} is not one of {', '.join(NAMES)}")
    if samples is None:
        raise UserError(f"criterion {name} looks at data: give it with --data")
    measure, given = FROM_DATA[name], samples
    return ByComponent(name, lambda analysis: measure(analysis, given))


FROM_DATA: dict[str, Callable[[Analysis, Samples], Scores]] = {
    "taylor": taylor,
    "activation": activation,
    "reconstruction": reconstruction,
}
NAMES = (*IMPORTANCES, *OVERALL, *FROM_DATA)
COMPARABLE = frozenset({"lamp"})
"""Criteria whose scores mean the same in every layer; others are divided by their group's mean
before layers compete."""
