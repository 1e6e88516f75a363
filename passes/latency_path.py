"""From the whole model to its floor, always giving up the least importance per second saved.

This is the multiple-choice knapsack of latency pruning: every group has a *menu* of widths, of
which one is chosen, each with the importance it gives up; seconds depend on the widths of all
groups that meet in a layer. `descend` walks down the efficient side of the menus and evaluates
every step with the widths as they are by then, so that a layer between two groups is never counted
twice. Each point of the walk is the answer for one budget, and correcting a budget after measuring
is a move along it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.ratios import Amount, Candidate

FLOOR = 0.25
"""Share of its channels that a group keeps at the least; a scale of scores says too little about
the last channels of a layer."""
FEW = 4
"""Blocks up to which a group also tries widths between the blocks."""
LEAST_GAIN = 1e-4
"""Share of the layers' time below which a step saves nothing."""

WORTH = 0.5
"""How much of a step's seconds per importance a stop within it must pay: widths off the edges of
the staircase do not."""


@dataclass(frozen=True)
class Menu:
    """The widths that a group can have, the widest first."""

    kept: tuple[int, ...]
    """Channels kept of the widest block, by level."""
    removed: tuple[Ids, ...]
    """The components that are gone, by level."""
    lost: tuple[float, ...]
    """The importance that is gone, by level."""
    total: float
    """The importance of all its units."""


class Layer(Protocol):
    """What `descend` needs to know of a layer."""

    @property
    def groups(self) -> frozenset[int]:
        """The groups that it depends on."""

    def at(self, levels: Sequence[int], /) -> float:
        """Return its seconds at the levels of all groups."""


@dataclass(frozen=True)
class Stop:
    """One point of the walk."""

    levels: tuple[int, ...]
    seconds: float
    """Of the layers that depend on groups."""
    lost: float


def menu(candidate: Candidate, block: int) -> Menu:
    """Return the widths of a group: whole blocks, and for narrow groups a few between.

    The importance of a unit is what ``--allocation global`` compares; the weakest of every block
    go first.
    """
    sizes = [len(b) for b in candidate.blocks]
    widest, step = max(sizes), max(1, block // candidate.width)
    if widest <= FEW * step:
        step = max(1, step // 2)
    least = max(min(widest, max(1, block // candidate.width)), int(np.ceil(FLOOR * widest)))
    floor = -(-least // step) * step
    kept = [widest, *(k for k in range((widest - 1) // step * step, floor - 1, -step))]
    value = worth(candidate)
    removed, amount = [], Amount()
    for width in kept:
        counts = [size - max(1, round(size * width / widest)) for size in sizes]
        removed.append(amount.weakest(candidate, counts))
    lost = tuple(float(sum(value[u] for u in units.tolist())) for units in removed)
    channels = tuple(width * candidate.width for width in kept)
    return Menu(channels, tuple(removed), lost, float(sum(value.values())))


def worth(candidate: Candidate) -> dict[int, float]:
    """Return the importance of every unit: its score by the mean of its group."""
    mean = float(np.abs(candidate.scores).mean()) or 1.0
    return dict(zip(candidate.units.tolist(), candidate.scores / mean, strict=True))


def kept_importance(candidates: Sequence[Candidate], removed: Ids) -> float:
    """Return the share of the importance of all candidates that stays.

    Args:
        candidates: The groups.
        removed: A mask over components.
    """
    values = [worth(c) for c in candidates]
    total = sum(sum(value.values()) for value in values)
    left = sum(v for value in values for unit, v in value.items() if not removed[unit])
    return float(left / total) if total else 1.0


def descend(
    menus: Sequence[Menu],
    layers: Sequence[Layer],
    *,
    start: Sequence[int] | None = None,
    most: float = float("inf"),
) -> list[Stop]:
    """Walk from the full widths to the narrowest; seconds fall at every stop.

    Args:
        menus: The widths of every group.
        layers: What depends on them.
        start: The levels to start at, instead of the full widths.
        most: Seconds that one step may save, for a walk in small steps.
    """
    levels = list(start or [0] * len(menus))
    touching = [[layer for layer in layers if g in layer.groups] for g in range(len(menus))]
    meets = [frozenset().union(*(x.groups for x in t)) if t else frozenset() for t in touching]
    seconds = sum(layer.at(levels) for layer in layers)
    bounds = LEAST_GAIN * seconds, most
    lost = sum(m.lost[level] for m, level in zip(menus, levels, strict=True))
    stops = [Stop(tuple(levels), seconds, lost)]
    best = {g: _best(g, menus[g], touching[g], levels, bounds) for g in range(len(menus))}
    while moves := [(move, g) for g, move in best.items() if move is not None]:
        (pay, target), group = max(moves)
        before = sum(layer.at(levels) for layer in touching[group])
        here = levels[group]
        for level in range(here + 1, target + 1):  # stops between serve budgets between
            levels[group] = level
            now = seconds - before + sum(layer.at(levels) for layer in touching[group])
            gone = lost + menus[group].lost[level] - menus[group].lost[here]
            last = stops[-1]
            if level == target or last.seconds - now > WORTH * pay * (gone - last.lost) > 0:
                stops.append(Stop(tuple(levels), now, gone))
        seconds, lost = stops[-1].seconds, stops[-1].lost
        for g in meets[group]:
            best[g] = _best(g, menus[g], touching[g], levels, bounds)
    return stops


def _best(
    group: int,
    menu: Menu,
    layers: Sequence[Layer],
    levels: Sequence[int],
    bounds: tuple[float, float],
) -> tuple[float, int] | None:
    """The level of a group that saves the most seconds per importance given up, from here."""
    trial, here = list(levels), levels[group]
    before = sum(layer.at(trial) for layer in layers)
    found = []
    for level in range(here + 1, len(menu.removed)):
        trial[group] = level
        saved = before - sum(layer.at(trial) for layer in layers)
        given = max(menu.lost[level] - menu.lost[here], 1e-12)
        if bounds[0] < saved <= bounds[1]:
            found.append((saved / given, level))
    return max(found, default=None)


@dataclass(frozen=True)
class Settled:
    """Where a search along the walk ended."""

    index: int
    ratio: float
    """Measured."""
    held: bool
    """Whether the measured ratio is within the tolerance of what was asked for."""
    bracket: tuple[int, int]
    """The last stop that measured above the target, and the first one below; -1 and the number of
    stops where there is none."""
    scale: float
    """Measured over predicted, at the last stop measured."""
    tries: int


def settle(
    predicted: Sequence[float],
    measure: Callable[[int], float],
    target: float,
    *,
    tolerance: float,
    tries: int,
) -> Settled:
    """Find the stop that *measures* ``target``: measure, correct the budget, go on from there.

    Args:
        predicted: The ratio expected at every stop, falling.
        measure: The ratio measured at a stop.
        target: The ratio asked for.
        tolerance: How near is near enough, as a share of ``target``.
        tries: How often to measure at most.
    """
    above, below, scale = -1, len(predicted), 1.0
    tried: list[tuple[int, float]] = []
    while len(tried) < tries and below - above > 1:
        hits = [i for i, p in enumerate(predicted) if p * scale <= target]
        index = min(max(hits[0] if hits else len(predicted) - 1, above + 1), below - 1)
        ratio = measure(index)
        tried.append((index, ratio))
        scale = ratio / predicted[index]
        if abs(ratio / target - 1) <= tolerance:
            break
        above, below = (index, below) if ratio > target else (above, index)
    index, ratio = min(tried, key=lambda t: abs(t[1] / target - 1))
    held = abs(ratio / target - 1) <= tolerance
    return Settled(index, ratio, held, (above, below), scale, len(tried))
