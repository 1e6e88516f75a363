"""Parts of a report from what commands leave behind: times, a pruning plan, a training log.

data = from_bench(found).model_copy(update={**plan_parts(plan), "learning": curves(log)})
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_kd import bench
from onnxslim_kd.errors import UserError
from onnxslim_kd.plans import Plan
from onnxslim_kd.profile import Change, by_node, by_type
from onnxslim_kd.report import (
    Curve,
    Latencies,
    Layer,
    Metric,
    OperatorTime,
    Plot,
    Refusal,
    ReportData,
    Timing,
)

POINTS = 300
"""Of a curve; more are averaged, for no screen shows them."""
NODES = 15
"""Nodes of a profile that are shown; the JSON file of `bench` has all."""
_PLACE = frozenset({"event", "epoch", "step", "steps", "samples_per_second", "seconds", "lr"})
_Series = dict[str, dict[float, float]]


def from_bench(found: bench.Report) -> ReportData:
    """Show what `onnxslim_kd.bench.bench` found; the headline is the last model's."""
    first, last = found.models[0], found.models[-1]
    environment = found.environment
    threads = f"{found.setting.threads} thread{'s' * (found.setting.threads != 1)}"
    case = found.cases[0]
    profiles = [row.operators for row in case.rows]
    against = "" if len(found.models) < 3 else f"{last.name} against {first.name}; "
    return ReportData(
        title=" vs ".join(model.name for model in found.models),
        summary=f"{against}{found.ran_on}, {threads}, {environment.cpu}",
        metrics=() if first is last else _headline(found),
        latencies=tuple(map(_latencies, found.cases)),
        operators=_times(by_type(profiles)),
        nodes=_times(by_node(profiles)[:NODES]) if first is not last else (),
        operator_models=tuple(row.model for row in case.rows),
        versions=environment.versions,
    )


def _times(changes: Iterable[Change]) -> tuple[OperatorTime, ...]:
    return tuple(
        OperatorTime(name=c.name, milliseconds=c.milliseconds, count=c.count) for c in changes
    )


def _headline(found: bench.Report) -> tuple[Metric, ...]:
    first, last = found.models[0], found.models[-1]
    before, after = found.cases[0].rows[0], found.cases[0].rows[-1]
    ratio = after.ratio
    return (
        Metric(
            name="Latency",
            before=before.latency.median,
            after=after.latency.median,
            unit="ms",
            ratio=ratio.median,
            interval=(ratio.low, ratio.high),
        ),
        Metric(name="Size", before=first.bytes / 1e6, after=last.bytes / 1e6, unit="MB"),
        Metric(name="MACs", before=before.macs / 1e6, after=after.macs / 1e6, unit="M"),
        Metric(name="Parameters", before=first.parameters, after=last.parameters),
    )


def _latencies(case: bench.Case) -> Latencies:
    rows = tuple(
        Timing(
            model=row.model,
            median=row.latency.median,
            p90=row.latency.p90,
            p99=row.latency.p99,
            ratio=row.ratio.median,
            interval=(row.ratio.low, row.ratio.high),
            verdict=row.verdict if index else "",
            milliseconds=row.milliseconds,
        )
        for index, row in enumerate(case.rows)
    )
    sizes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in case.shapes.items())
    return Latencies(title=sizes, rows=rows, notes=case.notes)


# ------------------------------------------------------------------ from a plan, from a log


def plan_parts(plan: Plan) -> dict[str, Any]:
    """Return the fields of `ReportData` that a pruning plan fills."""
    layers: dict[str, Layer] = {}
    for group in plan.groups:
        for member in group.members:
            if member.kept is not None and member.node not in layers:  # a bias is no second layer
                layers[member.node] = Layer(
                    name=member.parameter, before=member.before, after=member.after
                )
    refusals = tuple(Refusal(name=r.parameter, reason=r.reason) for r in plan.refused)
    return {"layers": tuple(layers.values()), "refusals": refusals, "plan_notes": plan.notes}


def curves(path: str | os.PathLike[str]) -> tuple[Plot, ...]:
    """Return the curves of a training log: all losses in one plot, top1 and top5 in another, ...

    Of a log that holds several runs the last one counts; what a resumed run did again counts once.

    Raises:
        UserError: The file is missing or is no training log.
    """
    steps: _Series = {}
    epochs: _Series = {}
    fresh = False
    for event in _events(path):
        kind = event["event"]
        if kind in ("start", "resume"):
            fresh = kind == "start"
        elif kind in ("step", "epoch"):
            if fresh:  # another run in the same log, not the rest of the one before
                steps, epochs, fresh = {}, {}, False
            if kind == "step":
                _add(steps, event["epoch"] + event["step"] / event["steps"], event)
            else:
                _add(epochs, event["epoch"], event)
    terms = {name: points for name, points in steps.items() if points != steps.get("loss")}
    losses = {"loss": steps["loss"]} | terms if "loss" in steps else terms
    plots = [_plot("Losses", losses)] if losses else []
    families: dict[str, _Series] = {}
    for name, points in epochs.items():
        families.setdefault(re.sub(r"\d+$", "", name), {})[name] = points
    return (*plots, *(_plot(", ".join(family), family) for family in families.values()))


def _plot(title: str, series: _Series) -> Plot:
    return Plot(title=title, x_label="epoch", y_label="", curves=_drawn(series))


def _events(path: str | os.PathLike[str]) -> Iterable[Mapping[str, Any]]:
    try:
        events = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        if not all(isinstance(event, dict) and "event" in event for event in events):
            raise ValueError("a line is no event")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a training log: {error}") from error
    return events


def _add(series: _Series, x: float, event: Mapping[str, Any]) -> None:
    for name, value in event.items():
        if name not in _PLACE and isinstance(value, float):
            series.setdefault(name, {})[x] = value


def _drawn(series: _Series) -> tuple[Curve, ...]:
    return tuple(Curve(name=name, points=_thinned(p)) for name, p in series.items())


def _thinned(points: Mapping[float, float]) -> tuple[tuple[float, float], ...]:
    ordered = np.array(sorted(points.items()))
    pieces = np.array_split(ordered, min(POINTS, len(ordered)))
    return tuple((float(x), float(y)) for x, y in (piece.mean(axis=0) for piece in pieces))
