"""Budgets that a search keeps to in every trial: MACs and the like, or latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import latency, prune, targets
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.latency import Course
from onnxslim_kd.passes.latency_measure import Clock, this_machine
from onnxslim_kd.passes.latency_path import Menu
from onnxslim_kd.passes.ratios import Amount, Candidate
from onnxslim_kd.passes.targets import Allocator, Device, LatencyTarget, Target
from onnxslim_kd.workload import workloads

STEPS = 30
"""Of the bisection, and of the walk beyond it."""
TRIES = 5
"""How often the whole model is measured at most."""


class Budget(Protocol):
    """What every trial must keep to."""

    @property
    def text(self) -> str:
        """Say what it is."""

    def fit(self, weights: Sequence[float]) -> tuple[Ids, float]:
        """Return the mask over components that keeps to the budget, and the share kept.

        Raises:
            UserError: Not even the strongest cut does.
        """

    def hold(self, weights: Sequence[float]) -> tuple[Ids, float, str]:
        """Return the same for the last word, measured where `fit` only expects, and say how.

        Raises:
            UserError: As for `fit`.
        """


def strengths(weights: Sequence[float], cut: Callable[[int, float], Ids]) -> Allocator:
    """Return how a common strength in [0, 1) scales the weights: 0.5 as they are, 1 cuts all."""
    return lambda strength: [
        cut(i, min(1.0, weight * strength / max(1 - strength, 1e-9)))
        for i, weight in enumerate(weights)
    ]


@dataclass(frozen=True)
class Macs:
    """Remove a share of the MACs, parameters or bytes."""

    analysis: Analysis
    ranked: Sequence[Candidate]
    target: Target
    amount: Amount

    @property
    def text(self) -> str:
        """Say what it is."""
        return f"remove {self.target.share:g} of the {self.target.quantity}"

    def fit(self, weights: Sequence[float]) -> tuple[Ids, float]:
        """See `Budget`."""
        allocate = strengths(weights, lambda i, r: self.amount.removed(self.ranked[i], r))
        found = targets.search(self.analysis, allocate, self.target)
        if found.share < self.target.share - targets.CLOSE:
            found = self._beyond(allocate, found.strength)
        return found.removed, 1 - found.share

    def hold(self, weights: Sequence[float]) -> tuple[Ids, float, str]:
        """See `Budget`; what is counted needs no measuring."""
        removed, kept = self.fit(weights)
        return removed, kept, f"{kept:.1%} of the {self.target.quantity} is kept"

    def _beyond(self, allocate: Allocator, strength: float) -> targets.Found:
        """Widths are coarse: take the next ones that hold the budget."""
        share_of, share = targets.share_removed(self.analysis, self.target.quantity), 0.0
        for further in [*np.linspace(strength, 1, STEPS, endpoint=False), 1.0]:
            removed = prune.mark(self.analysis, allocate(float(further)))
            share = share_of(removed)
            if share >= self.target.share - targets.CLOSE:
                return targets.Found(float(further), removed, share, reached=True)
        raise UserError(
            f"{self.text}: what was chosen holds too little, at most {share:.1%} can go; choose"
            f" more parameters or a smaller share"
        )


@dataclass(frozen=True)
class Seconds:
    """Keep a share of the latency: in trials by the measured times of single layers."""

    analysis: Analysis
    course: Course
    share: float
    measure: Callable[[Ids], float]
    """The latency of the whole model without these components, over the original's."""

    @classmethod
    def of(
        cls,
        analysis: Analysis,
        ranked: Sequence[Candidate],
        target: LatencyTarget,
        device: Device,
        clock: Clock | None = None,
    ) -> "Seconds":
        """Measure the layers of the candidates on ``device``, or by ``clock``."""
        clock = clock or this_machine(device)
        shapes = workloads(analysis.model, [analysis.given] if analysis.given else ())[0].shapes
        course = latency.survey(analysis, ranked, clock, shapes)
        search = latency.Search(analysis, clock, shapes, "")

        def measured(removed: Ids) -> float:
            cut = search.cut(prune.describe(analysis, ranked, removed, ""))
            return clock.ratio(analysis.model, cut, shapes)

        return cls(analysis, course, target.share, measured)

    @property
    def text(self) -> str:
        """Say what it is."""
        return f"keep {self.share:g} of the latency"

    def fit(self, weights: Sequence[float]) -> tuple[Ids, float]:
        """See `Budget`."""
        low, high, kept = 0.0, 1.0, self._kept(weights, 1.0)
        if kept > self.share:
            raise UserError(
                f"{self.text}: with every group at its floor {kept:.1%} is expected; choose more"
                f" parameters or a larger share"
            )
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self._kept(weights, middle) > self.share else (low, middle)
            )
        levels = self._levels(weights, high)
        removed = [m.removed[at] for m, at in zip(self.course.menus, levels, strict=True)]
        return prune.mark(self.analysis, removed), self._kept(weights, high)

    def hold(self, weights: Sequence[float]) -> tuple[Ids, float, str]:
        """See `Budget`: measure the whole model, correct what is expected, and measure again."""
        found, scale = [], 1.0
        for _ in range(TRIES):
            removed, expected = replace(self, share=min(self.share / scale, 1.0)).fit(weights)
            found.append((removed, self.measure(removed)))
            if LatencyTarget(self.share).holds(found[-1][1]):
                break
            scale = found[-1][1] / expected
        removed, ratio = min(found, key=lambda f: abs(f[1] - self.share))
        text = f"measured {ratio:.3f} of the original's latency after {len(found)} tries"
        if not LatencyTarget(self.share).holds(ratio):
            text += f"; {self.share:g} was asked for: the next widths are too far apart"
        return removed, ratio, text

    def _levels(self, weights: Sequence[float], strength: float) -> list[int]:
        factor = strength / max(1 - strength, 1e-9)
        pairs = zip(self.course.menus, weights, strict=True)
        return [_level(menu, min(1.0, weight * factor)) for menu, weight in pairs]

    def _kept(self, weights: Sequence[float], strength: float) -> float:
        levels = self._levels(weights, strength)
        layers = sum(layer.seconds for layer in self.course.layers)
        now = sum(layer.at(levels) for layer in self.course.layers)
        fixed = max(sum(self.course.seconds.values()) - layers, 0.0)
        return (fixed + now) / (fixed + layers)


def _level(menu: Menu, share: float) -> int:
    """The level of a menu that is nearest to removing ``share`` of what it can remove."""
    whole, floor = menu.kept[0], menu.kept[-1]
    wanted = whole - share * (whole - floor)
    return int(np.argmin([abs(kept - wanted) for kept in menu.kept]))
