"""Search for the strength that removes a given share of MACs, parameters or bytes.

The tutorials' semantics: a target of 0.5 removes half of the *MACs*; one common strength is found
by bisection, starting at 0.5, and a share within 0.01 of the target is good enough.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from onnxslim_kd.access import bytes_of, extents_of
from onnxslim_kd.bench import Setting
from onnxslim_kd.cost import is_weight
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.cut import mark
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.importance import Scores
from onnxslim_kd.passes.ratios import Amount, Candidate

Quantity = Literal["macs", "params", "size"]
Allocation = Literal["uniform", "global", "isomorphic", "sensitivity", "latency"]
CLOSE = 1e-2
"""How near to the target is near enough, as a share (PaddleSlim's UniformPruneStrategy)."""
STEPS = 40


@dataclass(frozen=True)
class Target:
    """Remove this share of a quantity.

    Raises:
        UserError: The share is not in (0, 1).
    """

    quantity: Quantity
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(
                f"--target-{self.quantity}: the share to remove must be in (0, 1),"
                f" got {self.share:g}"
            )


@dataclass(frozen=True)
class Device:
    """What latency is measured on."""

    provider: str = "cpu"
    threads: int = 0
    """Threads inside an operator; 0 stands for the cores that this process may use."""
    cache: Path | None = None
    """The folder of measured layers; the platform's place for such files unless given."""

    @property
    def setting(self) -> Setting:
        """How a whole model is measured."""
        return Setting(self.provider, self.threads, rounds=40, seconds=6.0)


@dataclass(frozen=True)
class LatencyTarget:
    """Keep this share of the latency, as measured on this machine (see `passes.latency`).

    Raises:
        UserError: The share is not in (0, 1).
    """

    share: float
    tolerance: float = 0.02
    """How near the measured ratio must be, as a share of ``share``; measured again it then holds
    within 3 %."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(
                f"--target-latency: the share to keep must be in (0, 1), got {self.share:g}"
            )

    def holds(self, ratio: float) -> bool:
        """Return whether a measured ratio is what was asked for."""
        return abs(ratio / self.share - 1) <= self.tolerance


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    strength: float
    """The common ratio, or for a global threshold the share of all units below it."""
    removed: Ids
    """A mask over components."""
    share: float
    """The share of the quantity that goes."""
    reached: bool
    coarse: bool = False
    """Whether a larger share than the target's can go: only blocks of channels are in the way."""


Allocator = Callable[[float], list[Ids]]
"""From a strength in [0, 1) to the components that go, per group."""


def allocator(
    kind: Allocation, analysis: Analysis, ranked: Sequence[Candidate], amount: Amount
) -> Allocator:
    """Return how a strength is spread over the groups.

    Args:
        kind: ``uniform``: the same share of every group; ``global``: one threshold over the
            scores of all groups, each divided by the mean of its group unless they are comparable;
            ``isomorphic``: a threshold for each kind of group, over the scores as they are.
        analysis: The solved model.
        ranked: The groups.
        amount: How a share becomes a number of channels.
    """
    if kind == "uniform":
        return lambda strength: [amount.removed(c, strength) for c in ranked]
    if kind == "global":
        scores = [c.scores if c.comparable else _normalised(c) for c in ranked]
        return partial(_below, ranked, scores, [0] * len(ranked), amount)
    kinds = [shape_of(analysis, c) for c in ranked]
    return partial(_below, ranked, [c.scores for c in ranked], kinds, amount)


def _below(
    ranked: Sequence[Candidate],
    scores: Sequence[Scores],
    kinds: Sequence[object],
    amount: Amount,
    strength: float,
) -> list[Ids]:
    """What scores below the threshold that leaves ``strength`` of all units of a kind below."""
    threshold = {}
    for kind in set(kinds):
        rivals = [s for s, other in zip(scores, kinds, strict=True) if other == kind]
        everything = np.sort(np.concatenate(rivals))
        threshold[kind] = everything[min(int(strength * len(everything)), len(everything) - 1)]
    return [
        amount.weakest(c, [int((s[b] < threshold[kind]).sum()) for b in c.blocks])
        for c, s, kind in zip(ranked, scores, kinds, strict=True)
    ]


def shape_of(analysis: Analysis, candidate: Candidate) -> tuple[object, ...]:
    """Say what one unit of a group is made of: equal for groups that can compete as they are.

    As Fang et al. 2024 (Isomorphic Pruning): the operators, their axes, and the size of the slice
    that one channel has in each weight.
    """
    inside = np.zeros(analysis.components.count, bool)
    inside[candidate.units] = True
    parts = []
    for birth in analysis.births:
        shape = analysis.shapes.shape[birth.value]
        if len(shape) > 1 and inside[analysis.labels(birth)].any():
            rest = tuple(size for axis, size in enumerate(shape) if axis != birth.axis)
            parts.append((birth.node.op_type, birth.operand or -1, birth.axis, rest))
    return tuple(sorted(parts))


Curve = Sequence[tuple[float, float]]
"""Points (ratio, loss), as a share of the metric."""
Curves = Mapping[str, Curve]


def curve_of(curves: Curves, candidate: Candidate) -> Curve:
    """Return the curve of the first parameter of a group that was measured, or nothing."""
    return next((curves[p.name] for p in candidate.asked if curves.get(p.name)), ())


def by_loss(ranked: Sequence[Candidate], curves: Sequence[Curve], amount: Amount) -> Allocator:
    """Spread a loss: every group goes as far as it costs that much by its curve."""
    return lambda loss: [
        amount.removed(c, ratio_for(curve, loss)) for c, curve in zip(ranked, curves, strict=True)
    ]


def cheapest(
    analysis: Analysis,
    ranked: Sequence[Candidate],
    curves: Sequence[Curve],
    amount: Amount,
    quantity: Quantity,
) -> Allocator:
    """Spread a removal so that what is lost in all is least: by loss per quantity saved.

    The knapsack's relaxation: units go in the order of the slopes of their groups' curves, made
    convex, by what a unit saves. No group goes beyond what was measured, and one without a curve
    stays.
    """
    whole = measure(analysis, None, quantity)
    slopes, places = [], []
    for candidate, curve in zip(ranked, curves, strict=True):
        size = len(candidate.units)
        gone = np.zeros(analysis.components.count, bool)
        gone[candidate.units[1:]] = True
        saved = (whole - measure(analysis, gone, quantity)) / max(size - 1, 1)
        place = _places(candidate)
        slopes.append(_slopes(curve, size, place) / max(saved, 1e-9))
        places.append(place)
    flat, along = np.concatenate(slopes), np.concatenate(places)
    rank = np.empty(len(flat))
    rank[np.lexsort((along, flat))] = np.arange(len(flat))
    rank[np.isinf(flat)] = np.inf
    scores = np.split(rank, np.cumsum([len(s) for s in slopes])[:-1])
    return partial(_below, ranked, scores, [0] * len(ranked), amount)


def _places(candidate: Candidate) -> Scores:
    """How far along its block every unit is, the least important at 0."""
    places = np.empty(len(candidate.units))
    for block in candidate.blocks:
        places[block] = np.arange(len(block)) / len(block)
    return places


def _slopes(curve: Curve, size: int, places: Scores) -> Scores:
    """The loss of every unit by a convex curve below the points; beyond them, infinite."""
    from scipy.optimize import isotonic_regression  # slow to import, and few ask for it

    ratios, losses = np.array([(0.0, 0.0), *sorted(curve)]).T
    shares = np.arange(size + 1) / size
    rises = np.diff(np.interp(shares, ratios, np.maximum.accumulate(np.maximum(losses, 0))))
    inside = int((shares[1:] <= ratios[-1] + 1e-9).sum())
    found = np.full(size, np.inf)
    if inside:
        found[:inside] = isotonic_regression(rises[:inside]).x
    return np.asarray(found[np.minimum((places * size).astype(int), size - 1)])


def ratio_for(curve: Curve, loss: float) -> float:
    """Return the largest ratio whose loss stays within ``loss``, between the points linearly.

    As PaddleSlim's get_ratios_by_loss: points are scanned from the largest ratio; 0 when even the
    smallest loses more.
    """
    points = sorted(curve, reverse=True)
    for index, (ratio, lost) in enumerate(points):
        if lost <= loss:
            if index == 0:
                return ratio
            above, lost_above = points[index - 1]
            return ratio + (above - ratio) * (loss - lost) / (lost_above - lost)
    return 0.0


def _normalised(candidate: Candidate) -> Scores:
    mean = float(candidate.scores[candidate.scores >= 0].mean())  # negative: gone already
    return np.asarray(candidate.scores / mean if mean else candidate.scores)


def search(analysis: Analysis, allocate: Allocator, target: Target) -> Found:
    """Bisect the strength until the share that goes is the target.

    Never runs without end: what cannot be reached (everything asked for is cut to the floor, or
    the groups are too coarse) ends with the nearest that can.
    """
    share_of = share_removed(analysis, target.quantity)
    low, high, strength = 0.0, 1.0, 0.5
    best: Found | None = None
    for _ in range(STEPS):
        removed = mark(analysis, allocate(strength))
        share = share_of(removed)
        found = Found(strength, removed, share, abs(share - target.share) < CLOSE)
        if best is None or abs(share - target.share) < abs(best.share - target.share):
            best = found
        if found.reached:
            break
        low, high = (strength, high) if share < target.share else (low, strength)
        strength = (low + high) / 2
    assert best is not None
    return replace(best, coarse=not best.reached and high < 1)


def share_removed(analysis: Analysis, quantity: Quantity) -> Callable[[Ids], float]:
    """Return what tells the share of a quantity that goes with a mask over components.

    It is 0 where the model has nothing of the quantity.
    """
    whole = measure(analysis, None, quantity)
    return lambda removed: 1 - measure(analysis, removed, quantity) / whole if whole else 0.0


def measure(analysis: Analysis, removed: Ids | None, quantity: Quantity) -> int:
    """Return MACs, parameters or bytes after the components in ``removed`` are gone."""
    if quantity == "macs":
        return analysis.macs(removed)
    changed = {} if removed is None else analysis.new_shapes(removed)
    total = 0
    for value in analysis.model.graph.initializers.data.values():
        tensor = value.const_value
        if tensor is None or (quantity == "params" and not is_weight(tensor)):
            continue
        before = prod(extents_of(tensor))
        after = prod(changed[value]) if value in changed else before
        total += after if quantity == "params" else bytes_of(tensor) * after // max(before, 1)
    return total
