"""Prune: decide (`plan`) here, slice in `cut`; the two never mix.

Before: ``Conv(W[64, 3, 3, 3]) -> BatchNormalization(64) -> Conv(W[128, 64, 3, 3])``
After:  ``Conv(W[32, 3, 3, 3]) -> BatchNormalization(32) -> Conv(W[128, 32, 3, 3])``

1. What lives and dies together comes from `ties`; a group is cut as a whole or not at all.
2. A parameter that was asked for and stays is in the plan, with its reason.
3. Weights are sliced, numbers that count channels are repaired (`fixups`), shapes are inferred
   again and must agree with the plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import get_args

import numpy as np

from onnxslim_kd.errors import UserError, insist_on
from onnxslim_kd.memory import collection_paused
from onnxslim_kd.passes import heads
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.criteria import COMPARABLE, FROM_DATA, criterion
from onnxslim_kd.passes.cut import apply, cut, mark, record, removed_by
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.importance import Criterion
from onnxslim_kd.passes.matching import find, keeping, match
from onnxslim_kd.passes.ratios import (
    Amount,
    Candidate,
    GroupScore,
    Request,
    candidates,
    machine_block,
)
from onnxslim_kd.passes.targets import (
    Allocation,
    Allocator,
    Curves,
    Device,
    Found,
    LatencyTarget,
    Target,
    allocator,
    by_loss,
    cheapest,
    curve_of,
    search,
)
from onnxslim_kd.plans import Group, Member, Options, Plan, Refusal
from onnxslim_kd.samples import Samples

__all__ = [
    "Choice",
    "apply",
    "cut",
    "decide",
    "describe",
    "mark",
    "plan",
    "rank",
    "record",
    "removed_by",
    "resolved",
]


@dataclass(frozen=True)
class Choice:
    """What to prune and how; the fields are the options of the command.

    Raises:
        UserError: A field is out of range; the message names the option.
    """

    pattern: str | None = None
    ratio: float = 0.5
    ratios: Mapping[str, float] | None = None
    ignore: str | None = None
    criterion: str = "l1"
    group_score: GroupScore = "first"
    amount: Amount = field(default_factory=lambda: Amount(round_to=0))
    target: Target | LatencyTarget | None = None
    """Instead of a ratio: find the strength that removes this share of MACs, ..., or measure."""
    allocation: Allocation | None = None
    """``uniform``, unless the target or the sensitivities ask for another."""
    device: Device = field(default_factory=Device)
    """For an allocation by latency: what it is measured on."""
    sensitivity: Curves | None = None
    """Per parameter, the loss by ratio; the ratios then come from it."""
    max_loss: float | None = None
    """The loss that each group may cost, as a share of the metric; or give a target."""
    samples: Samples | None = None
    """For the criteria that look at data."""
    steps: int = 1
    """Go there in that many steps, scoring anew before each."""

    def __post_init__(self) -> None:
        criterion(self.criterion, self.samples)
        insist_on("group-score", self.group_score, get_args(GroupScore))
        if self.allocation is not None:
            insist_on("allocation", self.allocation, get_args(Allocation))
        if (self.pattern is None) == (not self.ratios):
            raise UserError("give either a pattern (with a ratio) or a ratio per parameter")
        for name, ratio in {"ratio": self.ratio, **(self.ratios or {})}.items():
            if not (isfinite(ratio) and 0 <= ratio < 1):
                raise UserError(f"{name}: a ratio must be in [0, 1), got {ratio:g}")
        if self.amount.round_to < 0:
            raise UserError(f"round-to must be 1 or more, got {self.amount.round_to}")
        if self.steps < 1:
            raise UserError(f"--steps must be 1 or more, got {self.steps}")
        if self.max_loss is not None and not (isfinite(self.max_loss) and self.max_loss >= 0):
            raise UserError(f"--max-loss must be 0 or more, got {self.max_loss:g}")
        if (self.sensitivity is None) != (self.max_loss is None) and self.target is None:
            raise UserError("--sensitivity goes with --max-loss or a target, and the other way")
        self._check_allocation()

    def _check_allocation(self) -> None:
        by_latency = isinstance(self.target, LatencyTarget)
        if self.allocation == "sensitivity" and self.sensitivity is None:
            raise UserError("--allocation sensitivity needs what was measured: --sensitivity FILE")
        if self.sensitivity is not None and self.spread != "sensitivity":
            raise UserError(f"--sensitivity decides itself: leave out --allocation {self.spread}")
        if self.allocation == "latency" and self.target is None:
            raise UserError(
                "--allocation latency needs to know how far: give --target-latency, or"
                " --target-macs, --target-params or --target-size"
            )
        if by_latency and self.spread != "latency":
            raise UserError(
                f"--target-latency measures which widths pay, and decides itself: leave out"
                f" --allocation {self.spread}"
            )

    @property
    def spread(self) -> Allocation:
        """How the removal is spread over the groups: as said, or as follows from the rest."""
        if self.allocation is not None:
            return self.allocation
        if self.sensitivity is not None:
            return "sensitivity"
        return "latency" if isinstance(self.target, LatencyTarget) else "uniform"

    def requests(self, analysis: Analysis) -> list[Request]:
        """Return the parameters asked for, with their ratios.

        Raises:
            NotFoundError: A pattern or name matches nothing.
        """
        if self.pattern is not None:
            chosen = match(analysis, self.pattern, self.ignore)
            return [Request(p, self.ratio) for p in chosen]
        return [Request(find(analysis, name), r) for name, r in (self.ratios or {}).items()]


def plan(analysis: Analysis, choice: Choice) -> Plan:
    """Decide which channels go.

    Args:
        analysis: A model with its ties solved (`groups.analyse`).
        choice: What to prune and how.

    Raises:
        UserError: The choice names nothing, or its criterion cannot score a parameter.
    """
    if choice.steps > 1:
        from onnxslim_kd.passes import steps  # it ranks and cuts again, with what is below

        return steps.plan(analysis, choice)
    if choice.spread == "latency":
        from onnxslim_kd.passes import latency  # it cuts and measures, with what is below

        return latency.plan(analysis, choice)
    return _at_once(analysis, choice)


@collection_paused()
def _at_once(analysis: Analysis, choice: Choice) -> Plan:
    ranked, refused, notes = rank(analysis, choice)
    ranked, removed, more = decide(analysis, choice, ranked)
    notes += more
    return describe(analysis, ranked, removed, choice.criterion, refused=refused, notes=notes)


def decide(
    analysis: Analysis, choice: Choice, ranked: Sequence[Candidate]
) -> tuple[list[Candidate], Ids, list[str]]:
    """Return the groups with the ratio that was found, the mask over components, and notes."""
    notes: list[str] = []
    allocate = _allocate(analysis, choice, ranked, notes)
    if not isinstance(choice.target, Target):
        strength = choice.ratio if choice.max_loss is None else choice.max_loss
        return list(ranked), mark(analysis, allocate(strength)), notes
    found = search(analysis, allocate, choice.target)
    notes.append(_searched(choice.target, found))
    return [replace(c, ratio=found.strength) for c in ranked], found.removed, notes


def _allocate(
    analysis: Analysis, choice: Choice, ranked: Sequence[Candidate], notes: list[str]
) -> Allocator:
    """Return how a strength is spread: a ratio, a threshold, or a loss."""
    amount = resolved(choice.amount)
    if not ranked:
        return lambda _: []
    if choice.sensitivity is not None:
        curves = [curve_of(choice.sensitivity, c) for c in ranked]
        notes += [
            f"{c.asked[0].name} is not in the sensitivity file and stays"
            for c, curve in zip(ranked, curves, strict=True)
            if not curve
        ]
        if isinstance(choice.target, Target):
            return cheapest(analysis, ranked, curves, amount, choice.target.quantity)
        return by_loss(ranked, curves, amount)
    if choice.spread == "uniform" and choice.target is None:
        return lambda _: [amount.removed(c, c.ratio) for c in ranked]
    return allocator(choice.spread, analysis, ranked, amount)


def _searched(target: Target, found: Found) -> str:
    what = {"macs": "MACs", "params": "parameters", "size": "bytes"}[target.quantity]
    text = f"a common strength of {found.strength:g} removes {found.share:.1%} of the {what}"
    if found.reached:
        return text
    if found.coarse:
        return (
            f"{text}, the nearest to the {target.share:.1%} asked for: channels go in whole blocks"
            f" (--round-to 1 cuts finer)"
        )
    return (
        f"{text}; {target.share:.1%} was asked for and cannot be reached: what was chosen holds"
        f" too little of it (see what was left alone)"
    )


def resolved(amount: Amount) -> Amount:
    """Replace ``round_to=0`` by this machine's block."""
    return amount if amount.round_to else Amount(machine_block(), amount.selector)


@collection_paused()
def rank(
    analysis: Analysis, choice: Choice, score: Criterion | None = None
) -> tuple[list[Candidate], list[Refusal], list[str]]:
    """Return the groups asked for with their units ranked, the refusals, and notes.

    Args:
        analysis: The solved model.
        choice: What to prune and how.
        score: Instead of the criterion that the choice names.
    """
    requests = choice.requests(analysis)
    if choice.ignore is not None:
        analysis = keeping(analysis, choice.ignore)
    refused, free = [], []
    for request in requests:
        reason = analysis.refusal(request.parameter)
        if reason is None:
            free.append(request)
        else:
            refused.append(Refusal(parameter=request.parameter.name, reason=reason))
    score = score or criterion(choice.criterion, choice.samples)
    ranked, notes = candidates(analysis, free, score, choice.group_score)
    notes = [*analysis.notes, *heads.notes(analysis.by_dims), *notes]
    if choice.samples is not None and choice.criterion in FROM_DATA:
        notes.append(f"{choice.criterion} was measured on {choice.samples.name}")
    if choice.criterion == "taylor" and not (choice.samples and choice.samples.labelled):
        notes.append("the data has no labels: gradients are those of half the mean squared output")
    if choice.criterion in COMPARABLE:
        ranked = [replace(c, comparable=True) for c in ranked]
    return ranked, refused, notes


@collection_paused()
def describe(
    analysis: Analysis,
    ranked: Sequence[Candidate],
    removed: Ids,
    criterion: str,
    *,
    refused: Sequence[Refusal] = (),
    notes: Sequence[str] = (),
) -> Plan:
    """Write the decision down as a `Plan`."""
    owner = np.full(analysis.components.count, -1)
    for index, candidate in enumerate(ranked):
        owner[candidate.units] = index
    members = _members(analysis, owner, removed, len(ranked))
    approximate = _approximate(analysis, owner, removed)
    groups = [
        Group(
            asked_by=tuple(dict.fromkeys(p.name for p in c.asked)),
            ratio=c.ratio,
            units=len(c.units),
            removed=int(removed[c.units].sum()),
            members=tuple(members[i]),
            importance=tuple(c.scores.tolist()),
            approximate=tuple(approximate.get(i, ())),
        )
        for i, c in enumerate(ranked)
    ]
    return Plan(
        options=Options(attention=analysis.channels.asked, free_outputs=analysis.free_outputs),
        criterion=criterion,
        groups=tuple(groups),
        refused=tuple(refused),
        notes=tuple(notes),
        macs_before=analysis.macs(),
        macs_after=analysis.macs(removed),
    )


def _members(analysis: Analysis, owner: Ids, removed: Ids, count: int) -> list[list[Member]]:
    """The members of every group, for the group of each component."""
    members: list[list[Member]] = [[] for _ in range(count)]
    produced = {p.birth.start for p in analysis.parameters if p.produces}
    of_id = owner[analysis.components.label]
    gone = removed[analysis.components.label]
    low, high = (analysis.over_births(f, of_id).tolist() for f in (np.minimum, np.maximum))
    for birth, lost, a, b in zip(analysis.births, analysis.lost(gone), low, high, strict=True):
        if b < 0:
            continue
        own = slice(birth.start, birth.start + birth.size)
        member = Member(
            parameter=birth.value.name or "?",
            axis=birth.axis,
            node=birth.node.name or "?",
            before=birth.size,
            after=birth.size - lost,
            kept=tuple((~gone[own]).nonzero()[0].tolist()) if birth.start in produced else None,
        )
        for index in [a] if a == b else _owners(of_id[own]):
            members[index].append(member)
    return members


def _owners(owners: Ids) -> list[int]:
    """The groups among ``owners``, in which -1 stands for none."""
    found: list[int] = np.bincount(owners + 1)[1:].nonzero()[0].tolist()
    return found


def _approximate(analysis: Analysis, owner: Ids, removed: Ids) -> dict[int, list[str]]:
    """Per group, where removal differs from masking."""
    found: dict[int, list[str]] = {}
    for node, ids, reason in analysis.channels.approximate:
        label = analysis.components.label[ids]
        for index in _owners(owner[label[removed[label]]]):
            found.setdefault(index, []).append(f"{node.name}: {reason}")
    return found
