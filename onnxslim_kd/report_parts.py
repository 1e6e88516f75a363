"""Parts of a report from what other commands leave behind: a pruning plan, a training log.

data = from_bench(found).model_copy(update={**plan_parts(plan), "learning": curves(log)})
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_kd.errors import UserError
from onnxslim_kd.plans import Plan
from onnxslim_kd.report import Curve, Layer, Plot, Refusal

POINTS = 300
"""Of a curve; more are averaged, for no screen shows them."""
_PLACE = frozenset({"event", "epoch", "step", "steps", "samples_per_second", "seconds", "lr"})
_Series = dict[str, dict[float, float]]


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
    return {"layers": tuple(layers.values()), "refusals": refusals, "notes": plan.notes}


def curves(path: str | os.PathLike[str]) -> tuple[Plot, ...]:
    """Return the curves of a training log: all losses in one plot, and every metric in its own.

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
    losses = (Plot(title="Losses", x_label="epoch", y_label="loss", curves=_drawn(steps)),)
    return (losses if steps else ()) + tuple(
        Plot(title=curve.name, x_label="epoch", y_label=curve.name, curves=(curve,))
        for curve in _drawn(epochs)
    )


def _events(path: str | os.PathLike[str]) -> Iterable[Mapping[str, Any]]:
    try:
        events = [json.loads(line) for line in Path(path).read_text().splitlines()]
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
