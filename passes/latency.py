"""Prune to a latency that is measured, not computed.

1. Trace the model once: the seconds of every node, on this machine's runtime.
2. Measure how each layer that a group touches answers to narrower widths (`latency_layers`).
3. Walk from full widths to the floor along the best importance per second (`latency_path`).
4. Cut at the stop that should hold the target, measure the whole model against the original, in
   turn, and correct along the walk until the measured ratio holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

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
from onnxslim_kd.passes.targets import LatencyTarget
from onnxslim_kd.plans import Plan
from onnxslim_kd.staircase import Table
from onnxslim_kd.workload import Shape, workloads

TRIES = 10
SHARPEN = 2
"""Measure that often before a ratio is believed to hold: the first time may have been luck."""
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

    def finer(self, settled: Settled) -> "Course":
        """Walk again in smaller steps from the last stop that measured above the target."""
        above, below = (self.stops[index] for index in settled.bracket)
        most = (above.seconds - below.seconds) / 2
        stops = descend(self.menus, self.layers, start=above.levels, most=most)
        return replace(self, stops=stops, scale=self.scale * settled.scale)

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
    """Looks for the stop that measures the target."""

    analysis: Analysis
    target: LatencyTarget
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
            attention=self.analysis.channels.attention,
            free_outputs=self.analysis.free_outputs,
            inputs=self.analysis.given,
        )
        prune.apply(again, prune.removed_by(again, decided))
        return again.model

    def measure(self, course: Course, index: int) -> float:
        """Cut at a stop and measure; what seems to hold is measured again before it is believed."""
        made, ratio = self.cut(self.decided(course, index)), 0.0
        for _ in range(SHARPEN):
            ratio = self.clock.ratio(self.analysis.model, made, self.shapes)
            if abs(ratio / self.target.share - 1) > self.target.tolerance:
                break
        return ratio

    def settle(self, course: Course) -> tuple[Course, Settled]:
        """Go along the walk until the target holds; where steps are too long, take finer ones."""
        tries, found = 0, []
        while True:
            settled = settle(
                course.predicted,
                partial(self.measure, course),
                self.target.share,
                tolerance=self.target.tolerance,
                tries=TRIES - tries,
            )
            tries += settled.tries
            found.append((course, replace(settled, tries=tries)))
            above, below = settled.bracket
            if settled.held or tries >= TRIES or above < 0 or below == len(course.stops):
                return min(found, key=lambda f: abs(f[1].ratio / self.target.share - 1))
            course = course.finer(settled)


def plan(
    analysis: Analysis, choice: prune.Choice, target: LatencyTarget, clock: Clock | None = None
) -> Plan:
    """Decide which channels go so that the model measures ``target.share`` of its latency.

    Args:
        analysis: A model with its ties solved.
        choice: What to prune; its ratio and amount play no role.
        target: The latency to reach, and on what.
        clock: What measures; this machine unless given.

    Raises:
        UserError: The choice names nothing or wants to decide the widths, an input's size is not
            known, or the provider is not here.
    """
    _check(choice)
    ranked, refused, notes = prune.rank(analysis, choice)
    clock = clock or this_machine(target)
    shapes = workloads(analysis.model, [analysis.given] if analysis.given else ())[0].shapes
    search = Search(analysis, target, clock, shapes, choice.criterion)
    course, settled = search.settle(survey(analysis, ranked, clock, shapes))
    notes += _said(target, course, settled, clock.table)
    update = {"notes": tuple(notes), "refused": tuple(refused)}
    return search.decided(course, settled.index).model_copy(update=update)


def _check(choice: prune.Choice) -> None:
    """Refuse what would be ignored."""
    decides = {
        "--allocation": choice.allocation != "uniform",
        "--round-to": choice.amount.round_to > 1,
        "--selector": choice.amount.selector != "share",
        "--sensitivity": choice.sensitivity is not None,
    }
    if given := [option for option, is_given in decides.items() if is_given]:
        raise UserError(
            f"--target-latency measures which widths pay, and decides itself:"
            f" leave out {' and '.join(given)}"
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


def _said(target: LatencyTarget, course: Course, settled: Settled, table: Table) -> list[str]:
    """The notes of a plan: what was measured, and what stopped the search."""
    on = f"{target.provider}, threads: {target.setting.threads}"
    text = (
        f"measured {settled.ratio:.3f} of the original's latency ({on}) after {settled.tries}"
        f" tries; kept {course.kept(settled.index):.1%} of the importance;"
        f" measured {table.measured} layers anew"
    )
    notes = [text]
    if table.foreign:
        notes.append(
            f"times in {table.path.name} from elsewhere were not used:"
            f" {'; '.join(sorted(table.foreign))}"
        )
    if not settled.held:
        notes.append(_stopped(target, course, settled))
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
