"""Prune in steps: a part of the way, look at what is left again, go on.

Channels are chosen on the original throughout: what went in an earlier step counts as the least
important of its group, so that the result is one plan, relative to the original, like any other.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import prune
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.criteria import criterion
from onnxslim_kd.passes.groups import Analysis, Parameter, analyse
from onnxslim_kd.passes.importance import Criterion, Scores
from onnxslim_kd.passes.ratios import Candidate
from onnxslim_kd.plans import Plan

GONE = -1.0
"""Below every score, for criteria are not negative."""


def plan(analysis: Analysis, choice: prune.Choice) -> Plan:
    """Decide in ``choice.steps`` steps which channels go.

    Raises:
        UserError: As `prune.plan`; or the steps do not go with the target or the selector.
    """
    if choice.amount.selector != "share" or choice.spread == "latency":
        raise UserError(
            "--steps goes neither with --selector energy nor with widths chosen by latency"
        )
    removed = np.zeros(analysis.components.count, bool)
    seen: list[Scores] = []
    for step in range(1, choice.steps + 1):
        part = _part(choice, step / choice.steps)
        score = criterion(choice.criterion, choice.samples)
        if step > 1:
            score = _of_the_rest(analysis, removed, score)
        ranked, refused, notes = prune.rank(analysis, part, score)
        ranked = [_sunk(c, removed) for c in ranked]
        seen = _kept_scores(ranked, removed, seen)
        ranked, removed, more = prune.decide(analysis, part, ranked)
    notes += [*more, f"scored anew before each of {choice.steps} steps"]
    final = [replace(c, scores=s) for c, s in zip(ranked, seen, strict=True)]
    return prune.describe(analysis, final, removed, choice.criterion, refused=refused, notes=notes)


def _part(choice: prune.Choice, share: float) -> prune.Choice:
    """The same choice, asking for a share of it."""
    target, loss = choice.target, choice.max_loss
    return replace(
        choice,
        steps=1,
        ratio=choice.ratio * share,
        ratios={name: ratio * share for name, ratio in (choice.ratios or {}).items()} or None,
        target=replace(target, share=target.share * share) if target is not None else None,
        max_loss=None if loss is None else loss * share,
    )


def _of_the_rest(analysis: Analysis, removed: Ids, score: Criterion) -> Criterion:
    """A criterion that scores the channels left on the model without the others."""
    settings = {"attention": analysis.channels.asked, "free_outputs": analysis.free_outputs}
    work = analyse(analysis.model.clone(), inputs=analysis.given, **settings)  # type: ignore[arg-type]
    prune.apply(work, removed)
    cut = analyse(work.model, inputs=analysis.given, **settings)  # type: ignore[arg-type]
    known = {(p.name, p.axis): p for p in cut.parameters if p.produces}

    def rest(_: Analysis, parameter: Parameter) -> Scores:
        left = ~removed[analysis.labels(parameter.birth)]
        scores = np.zeros(parameter.birth.size)
        here = known.get((parameter.name, parameter.axis))
        if here is not None and left.sum() > 1:  # the last channel stays, whatever its score
            scores[left] = score(cut, here)
        return scores

    return rest


def _sunk(candidate: Candidate, removed: Ids) -> Candidate:
    """Put the units that are gone already below all others."""
    scores = np.where(removed[candidate.units], GONE, candidate.scores)
    blocks = tuple(b[np.argsort(scores[b], kind="stable")] for b in candidate.blocks)
    return replace(candidate, scores=scores, blocks=blocks)


def _kept_scores(ranked: Sequence[Candidate], removed: Ids, seen: Sequence[Scores]) -> list[Scores]:
    """The latest score of every unit: for one that is gone, the one it went with."""
    if not seen:
        return [c.scores for c in ranked]
    return [np.where(removed[c.units], s, c.scores) for c, s in zip(ranked, seen, strict=True)]
