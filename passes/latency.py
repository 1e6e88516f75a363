"""Choose widths by the latency that they save, as measured here.

1. Trace the model once: the seconds of every node, on this machine's runtime.
2. Measure how each layer that a group touches answers to narrower widths (`latency_layers`).
3. Walk from full widths to the floor along the best importance per second (`latency_path`).
4. For a latency: cut at the stop that should hold it, measure the whole model against the original,
   in turn, and correct along the walk until the measured ratio holds. For MACs, parameters or
   bytes: stop where that share is gone.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd import shapes as shape_sampling
from onnxslim_kd import staircase
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import groups, prune
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.latency_layers import WHOLE, Layer, Survey
from onnxslim_kd.passes.latency_measure import Clock, this_machine
from onnxslim_kd.passes.latency_path import Menu, Settled, Stop, descend, menu, settle
from onnxslim_kd.passes.ratios import Candidate
from onnxslim_kd.passes.targets import CLOSE, LatencyTarget, Quantity, Target, share_removed
from onnxslim_kd.plans import Plan
from onnxslim_kd.staircase import Table
from onnxslim_kd.workload import Shape, workloads

TRIES = 10
CONFIRM = 2
"""Measure that often again, in new sessions, before a ratio is believed to hold: the median
counts, for the first time may have been luck."""
BLOCKING = 3
"""Layers that stay whole, to name when a target is out of reach."""


@dataclass(frozen=True)
class Course:
    """All that was found out before the first cut, and the walk."""

    ranked: Sequence[Candidate]
    menus: Sequence[Menu]
    layers: Sequence[Layer]
    seconds: Mapping[str, float]
    """Of every node of the original."""
    stops: Sequence[Stop]
    scale: float = 1.0
    """By how much measurements were above what was expected."""

    @property
    def predicted(self) -> list[float]:
        """The latency ratio expected at every stop."""
        layers = sum(layer.seconds for layer in self.layers)
        fixed = max(sum(self.seconds.values()) - layers, 0.0)
        return [self.scale * (fixed + s.seconds) / (fixed + layers) for s in self.stops]

    def finer(self, bracket: tuple[int, int], scale: float = 1.0) -> "Course":
        """Walk again in smaller steps from the last stop above a target."""
        above, below = (self.stops[index] for index in bracket)
        most = (above.seconds - below.seconds) / 2
        stops = descend(self.menus, self.layers, start=above.levels, most=most)
        return replace(self, stops=stops, scale=self.scale * scale)

    def kept(self, index: int) -> float:
        """Return the share of the importance that is kept at a stop."""
        total = sum(m.total for m in self.menus)
        return 1 - self.stops[index].lost / total if total else 1.0

    def removed(self, index: int) -> list[Ids]:
        """Return the components that are gone at a stop."""
        levels = self.stops[index].levels
        return [m.removed[level] for m, level in zip(self.menus, levels, strict=True)]


@dataclass(frozen=True)
class Search:
    """Looks for the stop that holds a target."""

    analysis: Analysis
    clock: Clock
    shapes: Mapping[str, Shape]
    criterion: str

    def decided(self, course: Course, index: int) -> Plan:
        """Return the plan of a stop."""
        removed = course.removed(index)
        ranked = [
            replace(c, ratio=len(gone) / len(c.units))
            for c, gone in zip(course.ranked, removed, strict=True)
        ]
        mask = prune.mark(self.analysis, removed)
        return prune.describe(self.analysis, ranked, mask, self.criterion)

    def cut(self, decided: Plan) -> ir.Model:
        """Carry a plan out on a copy of the model, read at the same shapes."""
        again = groups.analyse(
            model_io.load(self.analysis.model),
            attention=self.analysis.channels.asked,
            free_outputs=self.analysis.free_outputs,
            inputs=self.analysis.given,
        )
        prune.apply(again, prune.removed_by(again, decided))
        return again.model

    def measure(self, course: Course, target: LatencyTarget, index: int) -> float:
        """Cut at a stop and measure; what seems to hold is measured again before it is believed."""
        made = self.cut(self.decided(course, index))
        found = [self.clock.ratio(self.analysis.model, made, self.shapes)]
        if target.holds(found[0]):
            again = range(CONFIRM)
            found += [self.clock.ratio(self.analysis.model, made, self.shapes) for _ in again]
        return median(found)

    def settle(self, course: Course, target: LatencyTarget) -> tuple[Course, Settled]:
        """Go along the walk until the target holds; where steps are too long, take finer ones."""
        tries, found = 0, []
        while True:
            settled = settle(
                course.predicted,
                partial(self.measure, course, target),
                target.share,
                tolerance=target.tolerance,
                tries=TRIES - tries,
            )
            tries += settled.tries
            found.append((course, replace(settled, tries=tries)))
            above, below = settled.bracket
            if settled.held or tries >= TRIES or above < 0 or below == len(course.stops):
                return min(found, key=lambda f: abs(f[1].ratio / target.share - 1))
            course = course.finer(settled.bracket, settled.scale)

    def gone(self, course: Course, index: int, quantity: Quantity) -> float:
        """Return the share of MACs, parameters or bytes that is gone at a stop."""
        removed = prune.mark(self.analysis, course.removed(index))
        return share_removed(self.analysis, quantity)(removed)

    def reach(self, course: Course, target: Target) -> tuple[Course, int]:
        """Find the first stop where the share is gone, in finer steps where they are too long."""
        for _ in range(TRIES):
            share = partial(self.gone, course, quantity=target.quantity)
            stops = range(len(course.stops))
            index = bisect_left(stops, target.share - CLOSE, key=share)
            if index in (0, len(stops)) or share(index) < target.share + CLOSE:
                break
            course = course.finer((index - 1, index))
        return course, min(index, len(stops) - 1)


def plan(analysis: Analysis, choice: prune.Choice, clock: Clock | None = None) -> Plan:
    """Decide by latency which channels go, until the target holds.

    A latency target is measured on the whole model; MACs, parameters and bytes are counted.

    Args:
        analysis: A model with its ties solved.
        choice: What to prune, its target and device; its ratio and amount play no role.
        clock: What measures; the choice's device unless given.

    Raises:
        UserError: The choice names nothing or wants to decide the widths, an input's size is not
            known, or the provider is not here.
    """
    _check(choice)
    ranked, refused, notes = prune.rank(analysis, choice)
    shapes = workloads(analysis.model, [analysis.given] if analysis.given else ())[0].shapes
    if not ranked:
        notes.append("nothing of what was chosen can go: the target is not reached")
        mask = prune.mark(analysis, [])
        kind = choice.criterion
        return prune.describe(analysis, (), mask, kind, refused=refused, notes=notes)
    clock = clock or this_machine(choice.device)
    search = Search(analysis, clock, shapes, choice.criterion)
    course = survey(analysis, ranked, clock, shapes)
    on = f"{choice.device.provider}, threads: {choice.device.setting.threads}"
    if isinstance(choice.target, LatencyTarget):
        course, settled = search.settle(course, choice.target)
        index = settled.index
        notes += _held(choice.target, course, settled, on)
    else:
        assert choice.target is not None
        course, index = search.reach(course, choice.target)
        share = search.gone(course, index, choice.target.quantity)
        notes += _reached(choice.target, course, index, share, on)
    notes += _tabled(course, index, clock.table)
    update = {"notes": tuple(notes), "refused": tuple(refused)}
    return search.decided(course, index).model_copy(update=update)


def _check(choice: prune.Choice) -> None:
    """Refuse what would be ignored."""
    decides = {
        "--round-to": choice.amount.round_to > 1,
        "--selector": choice.amount.selector != "share",
    }
    if given := [option for option, is_given in decides.items() if is_given]:
        raise UserError(
            f"latency decides which widths pay, and by itself: leave out {' and '.join(given)}"
        )


def survey(
    analysis: Analysis, ranked: Sequence[Candidate], clock: Clock, shapes: Mapping[str, Shape]
) -> Course:
    """Measure the layers and walk through the widths, without any cut."""
    block = staircase.block(clock.table)
    menus = [menu(candidate, block) for candidate in ranked]
    seconds = clock.trace(analysis.model, shapes)
    sampled = shape_sampling.sample(analysis.model, shapes)
    layers = Survey(analysis, menus, sampled).layers(seconds, clock.table)
    return Course(ranked, menus, layers, seconds, descend(menus, layers))


def _held(target: LatencyTarget, course: Course, settled: Settled, on: str) -> list[str]:
    """The notes on a latency: what was measured, and what stopped the search."""
    ratio, tries = settled.ratio, settled.tries
    notes = [f"measured {ratio:.3f} of the original's latency ({on}) after {tries} tries"]
    if not settled.held:
        notes.append(_stopped(target, course, settled))
    return notes


def _reached(target: Target, course: Course, index: int, share: float, on: str) -> list[str]:
    """The notes on a quantity that is counted."""
    expected = course.predicted[index]
    text = (
        f"widths by latency: {share:.1%} of the {target.quantity} is gone,"
        f" {expected:.2f} of the latency is expected ({on})"
    )
    if share >= target.share - CLOSE:
        return [text]
    return [f"{text}; {target.share:.1%} was asked for, and every group is at its floor"]


def _tabled(course: Course, index: int, table: Table) -> list[str]:
    """The notes on what both come from."""
    notes = [
        f"kept {course.kept(index):.1%} of the importance; measured {table.measured} layers anew"
    ]
    if table.foreign:
        notes.append(
            f"times in {table.path.name} from elsewhere were not used:"
            f" {'; '.join(sorted(table.foreign))}"
        )
    return notes


def _stopped(target: LatencyTarget, course: Course, settled: Settled) -> str:
    asked = f"a latency of {target.share:g} was asked for and not reached within"
    asked += f" {target.tolerance:.0%}"
    if settled.index < len(course.stops) - 1:
        return f"{asked}: the next widths are too far apart, or the machine is too noisy"
    touched = {layer.name for layer in course.layers}
    staying = {n: s for n, s in course.seconds.items() if n not in touched and n != WHOLE}
    names = sorted(staying, key=staying.__getitem__, reverse=True)[:BLOCKING]
    text = f"{asked}: every group is at its floor"
    if not names:
        return text
    share = sum(staying.values()) / sum(course.seconds.values())
    most = ", ".join(names)
    return f"{text}, and what no group touches takes {share:.0%} of the time (most of it {most})"
