"""How many units of a group go: a share of it, rounded to what runs fast, never all of them."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from onnxslim_kd.errors import UserError, insist_on
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.groups import Analysis, Parameter
from onnxslim_kd.passes.importance import Criterion, Scores

GroupScore = Literal["first", "mean", "max"]
Selector = Literal["share", "energy"]


@dataclass(frozen=True)
class Request:
    """A parameter that was asked for, and the share of it that should go."""

    parameter: Parameter
    ratio: float


@dataclass(frozen=True)
class Candidate:
    """A group that was asked for, its units ranked."""

    group: int
    ratio: float
    asked: tuple[Parameter, ...]
    units: Ids
    """Components, in the order of the graph."""
    scores: Scores
    """One per unit."""
    blocks: tuple[Ids, ...]
    """Positions in ``units``, the least important first; the ratio holds for every block."""
    width: int
    """Channels of the parameter that one unit holds: more than 1 for heads and groups."""
    comparable: bool = False
    """Whether the scores can be held against those of other groups as they are."""


@dataclass(frozen=True)
class Amount:
    """How a share becomes a number of units."""

    round_to: int = 1
    """Channels kept are a multiple of this where a block has at least twice as many."""
    selector: Selector = "share"
    """``share``: that share of the units; ``energy``: the units below the threshold at which the
    squared scores sum to that share (PaddleSlim's optimal_threshold)."""

    def __post_init__(self) -> None:
        insist_on("selector", self.selector, get_args(Selector))

    def removed(self, candidate: Candidate, ratio: float) -> Ids:
        """Return the components of ``candidate`` that go for ``ratio``."""
        if self.selector == "energy":
            counts = [_below_threshold(candidate.scores[b], ratio) for b in candidate.blocks]
        else:
            counts = [round(len(b) * ratio) for b in candidate.blocks]  # half to even
        return self.weakest(candidate, counts)

    def weakest(self, candidate: Candidate, counts: Sequence[int]) -> Ids:
        """Return the components of the ``counts`` weakest units of every block, rounded."""
        gone = [
            candidate.units[block[: self._rounded(len(block), count, candidate.width)]]
            for block, count in zip(candidate.blocks, counts, strict=True)
        ]
        return np.concatenate(gone)

    def _rounded(self, size: int, count: int, width: int) -> int:
        """A layer keeps at least one unit, and a multiple of the runtime's block."""
        count = min(max(count, 0), size - 1)
        step = max(1, self.round_to // width)
        if count and size >= 2 * step:
            kept = max(step, step * round((size - count) / step))
            count = size - min(kept, size)
        return count


def _below_threshold(ranked: Scores, share: float) -> int:
    """Count the ranked scores below PaddleSlim's energy threshold."""
    energy = np.cumsum(np.square(ranked)) / (np.square(ranked).sum() or 1.0)
    first = int(np.argmax(energy > share)) if (energy > share).any() else len(ranked)
    if first == 0:
        return 0
    threshold = (ranked[first - 1] + ranked[min(first, len(ranked) - 1)]) / 2
    return int((ranked < threshold).sum())


@cache
def machine_block() -> int:
    """Channels that ONNX Runtime computes at once here: 16 with AVX-512, else 8 (NCHWc block)."""
    flags = Path("/proc/cpuinfo")
    if platform.machine() in ("x86_64", "AMD64") and flags.is_file():
        return 16 if "avx512f" in flags.read_text() else 8
    return 16 if platform.system() == "Windows" else 8


def candidates(
    analysis: Analysis,
    requests: Sequence[Request],
    criterion: Criterion,
    group_score: GroupScore,
) -> tuple[list[Candidate], list[str]]:
    """Rank the units of every group asked for.

    Args:
        analysis: The solved model.
        requests: In the order in which they were listed: the first one of a group wins.
        criterion: Scores the channels of one parameter.
        group_score: Whose scores count: the first listed parameter's, or mean or max of all.

    Returns:
        The groups, and a note for every request that an earlier one overruled.

    Raises:
        UserError: The criterion cannot score a parameter.
    """
    asked: dict[int, list[Request]] = {}
    for request in requests:
        for group in analysis.groups_of(request.parameter):
            asked.setdefault(group, []).append(request)
    members: dict[int, list[Parameter]] = {}
    for p, group in zip(analysis.parameters, analysis.group_of, strict=True):
        if p.produces and group in asked:
            members.setdefault(group, []).append(p)
    found, notes = [], []
    for group, wanted in asked.items():
        producers = members.get(group, [])
        named = [r.parameter for r in wanted if r.parameter.produces]
        first = named or [r.parameter for r in wanted]
        taken = {id(p) for p in first}  # by identity: comparing parameters is slow in large groups
        order = [*first, *[p for p in producers if id(p) not in taken]]
        units = _units(analysis, order, group)
        if not len(units):
            continue
        ratio = wanted[0].ratio
        notes += [
            f"{r.parameter.name} shares channels with {wanted[0].parameter.name}:"
            f" its ratio {r.ratio:g} gives way to {ratio:g}, which was named first"
            for r in wanted[1:]
            if r.ratio != ratio
        ]
        scores = _scores(analysis, units, order, criterion, group_score)
        width = max(1, round(order[0].birth.size / len(units)))
        asked_by = tuple(dict.fromkeys(r.parameter for r in wanted))
        blocks = _blocks(analysis, units, scores)
        found.append(Candidate(group, ratio, asked_by, units, scores, blocks, width))
    return found, notes


def _units(analysis: Analysis, producers: Sequence[Parameter], group: int) -> Ids:
    """The components of a group that can go, each where it comes first."""
    joined = np.concatenate([analysis.labels(p.birth) for p in producers])
    free = joined[~analysis.stays[joined]]
    free = free[analysis.belongs(free, group)]
    place = np.arange(len(free))
    first = np.empty(analysis.components.count, np.int64)  # no more of it is touched than free
    first[free[::-1]] = place[::-1]  # the last one written stands
    return np.asarray(free[first[free] == place])


def _scores(
    analysis: Analysis,
    units: Ids,
    producers: Sequence[Parameter],
    criterion: Criterion,
    group_score: GroupScore,
) -> Scores:
    """One score per unit: the mean over its channels in a parameter, then over parameters."""
    labels = analysis.labels(producers[0].birth)
    if group_score == "first" and np.array_equal(labels, units):
        raw = np.asarray(criterion(analysis, producers[0]), np.float64)
        if not np.isnan(raw).any():
            return raw
    rows: list[Scores] = []
    scored = np.zeros(len(units), bool)
    position = np.full(analysis.components.count, -1)
    position[units] = np.arange(len(units))
    refused: UserError | None = None
    for parameter in producers:
        if group_score == "first" and scored.all():
            break
        where = position[analysis.labels(parameter.birth)]
        inside = where >= 0
        try:
            raw = criterion(analysis, parameter)[inside]
        except UserError as error:
            if parameter is producers[0] and group_score == "first":
                raise
            refused = refused or error
            continue
        count = np.bincount(where[inside], minlength=len(units))
        total = np.bincount(where[inside], raw, minlength=len(units))
        with np.errstate(invalid="ignore"):
            rows.append(total / count)
        scored |= ~np.isnan(rows[-1])
    if not scored.all():  # a unit without a score must not pass for the weakest
        raise refused or UserError(f"the criterion gives no number for {producers[0].name}")
    table = np.array(rows)
    if group_score == "first":
        first = np.argmax(~np.isnan(table), axis=0)
        return np.asarray(table[first, np.arange(len(units))])
    reduce: Callable[..., Scores] = np.nanmean if group_score == "mean" else np.nanmax
    return reduce(table, axis=0)


def _blocks(analysis: Analysis, units: Ids, scores: Scores) -> tuple[Ids, ...]:
    """Positions of the units by block, the least important first."""
    signature = analysis.signature[units]
    if (signature == signature[0]).all():
        return (np.argsort(scores, kind="stable"),)
    blocks = []
    for word in dict.fromkeys(signature.tolist()):
        inside = np.flatnonzero(signature == word)
        blocks.append(inside[np.argsort(scores[inside], kind="stable")])
    return tuple(blocks)
