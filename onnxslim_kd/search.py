"""Search for the ratios of all groups under a budget, by any metric.

The optimiser (optuna's TPE) proposes how hard each group is cut relative to the others; the
strength common to all is then set so that the budget holds, so that no trial is spent on models
that are too big. A trial silences channels by masks and builds no model. The file is written after
every trial, and trial k depends only on the trials before it: a killed run goes on and ends with
the bytes of one that was not killed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from onnxslim_kd.budgets import Budget
from onnxslim_kd.errors import UserError
from onnxslim_kd.model import write_text
from onnxslim_kd.passes import prune
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.masks import with_masks
from onnxslim_kd.passes.ratios import Candidate
from onnxslim_kd.plans import Plan, Refusal
from onnxslim_kd.sensitivity import MaskedSession, Score, fingerprint, finite

LEAST = 0.02
"""The smallest weight of a group: none is left out for good."""


class Trial(BaseModel):
    """One proposal: the weight of every group, the metric, and what it kept of the budget."""

    model_config = ConfigDict(extra="forbid")

    weights: dict[str, float]
    value: float
    spent: float
    """The share of the budgeted quantity that is kept."""


class Study(BaseModel):
    """The contents of a study file."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    model: str
    measure: str
    criterion: str
    budget: str
    lower_is_better: bool
    baseline: float
    trials: list[Trial] = []

    @property
    def best(self) -> Trial:
        """The best trial, the first of equals."""
        return (min if self.lower_is_better else max)(self.trials, key=lambda t: t.value)


# ------------------------------------------------------------------------- searching


@dataclass(frozen=True)
class Job:
    """What to search for."""

    analysis: Analysis
    ranked: Sequence[Candidate]
    budget: Budget
    score: Score
    measure: str
    lower_is_better: bool = False
    criterion: str = "l1"

    @property
    def names(self) -> list[str]:
        """The first parameter of every group."""
        return [c.asked[0].name for c in self.ranked]


def run(job: Job, output: Path, trials: int, **options: Any) -> Iterator[tuple[int, int]]:
    """Carry out trials until the file holds that many; yield (trials done, trials in all).

    Args:
        job: What to search for.
        output: The file to go on with, or to begin.
        trials: How many trials in all.
        options: For the session: provider, threads.

    Raises:
        UserError: optuna is missing, the file belongs to another search, nothing can be cut, or
            the budget cannot be reached.
        OperationError: The metric is not a finite number.
    """
    optuna = _optuna()
    if not job.ranked:
        raise UserError("nothing can be removed: every channel asked for must stay")
    job.budget.fit([1.0] * len(job.ranked))  # refuse what cannot be reached before measuring
    nothing = np.zeros(len(job.analysis.components.label), bool)
    session = MaskedSession(with_masks(job.analysis), nothing, **options)
    study = _begun(job, output, session)
    while len(study.trials) < trials:
        yield len(study.trials), trials
        study.trials.append(_trial(optuna, job, study, session))
        write_text(output, _text(study), overwrite=True)
    yield len(study.trials), trials


def _trial(optuna: Any, job: Job, study: Study, session: MaskedSession) -> Trial:
    number = len(study.trials)
    weights = _proposal(optuna, job, study) if number else dict.fromkeys(job.names, 0.5)
    removed, spent = job.budget.fit([weights[name] for name in job.names])
    session.silence(removed[job.analysis.components.label].astype(bool))
    value = finite(job.score(session), f"trial {number}")
    return Trial(weights=weights, value=value, spent=spent)


def _proposal(optuna: Any, job: Job, study: Study) -> dict[str, float]:
    """Ask the optimiser, which is told all trials anew: its state is the file."""
    ranges = {n: optuna.distributions.FloatDistribution(LEAST, 1.0) for n in job.names}
    sampler = optuna.samplers.TPESampler(seed=len(study.trials), n_startup_trials=8)
    direction = "minimize" if study.lower_is_better else "maximize"
    asked = optuna.create_study(sampler=sampler, direction=direction)
    for trial in study.trials:
        asked.add_trial(
            optuna.trial.create_trial(params=trial.weights, distributions=ranges, value=trial.value)
        )
    params: dict[str, float] = asked.ask(ranges).params
    return params


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("search needs optuna: pip install 'onnxslim-kd[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def plan(job: Job, study: Study, refused: Sequence[Refusal] = ()) -> Plan:
    """Return the plan of the best trial, which really keeps to the budget."""
    best = study.best
    removed, _, held = job.budget.hold([best.weights[name] for name in job.names])
    ranked = [replace(c, ratio=float(removed[c.units].mean())) for c in job.ranked]
    note = (
        f"the best of {len(study.trials)} trials ({study.measure}): {best.value:g}, the whole"
        f" model {study.baseline:g}; {held} ({study.budget})"
    )
    return prune.describe(
        job.analysis, ranked, removed, job.criterion, refused=refused, notes=[note]
    )


# ------------------------------------------------------------------------------ file


def load(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: It is missing or is none.
    """
    try:
        return Study.model_validate_json(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a study file; search again") from error


def _begun(job: Job, output: Path, session: MaskedSession) -> Study:
    """The study so far, or a new one with its baseline."""
    begun = Study(
        model=fingerprint(job.analysis.model),
        measure=job.measure,
        criterion=job.criterion,
        budget=job.budget.text,
        lower_is_better=job.lower_is_better,
        baseline=inf,
    )
    if output.exists():
        found = load(output)
        for what in ("model", "measure", "criterion", "budget"):
            have, want = getattr(found, what), getattr(begun, what)
            if have != want:
                raise UserError(
                    f"{output}: was made with another {what} ({have}, now {want}); choose another"
                    f" file"
                )
        return found
    begun.baseline = finite(job.score(session), "the whole model")
    write_text(output, _text(begun))
    return begun


def _text(study: Study) -> str:
    return json.dumps(study.model_dump(), indent=1, sort_keys=True) + "\n"
