"""Importance from data: what flows through a channel, and what the loss says of its weights.

Activations are looked at where channels are *consumed*, behind normalisation and activation
function: there stands what the next layer sees of a channel. Means are computed inside the graph,
so that no activation leaves the runtime.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import is_float
from onnxslim_kd.errors import UserError
from onnxslim_kd.model import name_of
from onnxslim_kd.passes.channels import Birth, Ids
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.importance import SCALES, Scores, rows
from onnxslim_kd.passes.scope import Scope
from onnxslim_kd.runtime import Session
from onnxslim_kd.samples import Samples


class Site(NamedTuple):
    """One axis of a computed value along which a layer computes over channels."""

    value: ir.Value
    axis: int
    ids: Ids
    weights: tuple[Birth, ...]
    """The axes of weights that meet the channels there; none where both sides are computed."""


def activation(analysis: Analysis, samples: Samples) -> Scores:
    """Mean absolute activation of a channel where it is consumed, over the mean of its site."""
    found = list(sites(analysis))
    means = observed(analysis.model, found, samples, "Abs")
    return _spread(analysis, [(s.ids, m) for s, m in zip(found, means, strict=True)])


def reconstruction(analysis: Analysis, samples: Samples) -> Scores:
    """Share of the next layers' outputs that a channel makes: its activation times their weights.

    The root of the sum over the layers that read it of E[x²]·|w|² over that of all their channels,
    the structured form of Wanda (Sun et al. 2024).
    """
    found = list(sites(analysis))
    squares = observed(analysis.model, found, samples, "Mul")
    parts = [(s.ids, m * _squared(analysis, s)) for s, m in zip(found, squares, strict=True)]
    return np.sqrt(_spread(analysis, parts, total=True))


def taylor(analysis: Analysis, samples: Samples) -> Scores:
    """Sum of |w * dL/dw| over everything that goes with a channel (Molchanov et al. 2019).

    Raises:
        UserError: The loss reaches no weight that can be pruned.
    """
    from onnxslim_kd.training import gradients  # torch takes seconds to import

    moved = gradients.taylor(analysis.model, samples)
    scores = np.full(analysis.components.count, np.nan)
    for birth in analysis.births:
        of = moved.get(birth.value.name or "") if birth.operand is not None else None
        if of is None or (of.ndim == 1 and (birth.node.op_type, birth.operand) not in SCALES):
            continue
        lines = np.moveaxis(of, birth.axis, 0).reshape(birth.size, -1).sum(axis=1)
        _add(scores, analysis.labels(birth), lines)
    if not np.nansum(scores) > 0:
        raise UserError("criterion taylor: the loss reaches no weight; use --criterion l1")
    return scores


# ------------------------------------------------------------------------- observing


def sites(analysis: Analysis) -> Iterator[Site]:
    """Give every place where channels of a computed value are consumed."""
    births = {(birth.value, birth.axis): birth for birth in analysis.births}
    for consumption in analysis.channels.consumed:
        places = []
        for index, axis in consumption.axes:
            value = consumption.node.inputs[index]
            if value is not None and value in analysis.shapes.shape:
                places.append((value, axis % len(analysis.shapes.shape[value])))
        weights = tuple(births[place] for place in places if place in births)
        for value, axis in places:
            ids = None if value.is_initializer() else _ids(analysis, value, axis)
            if ids is not None:
                yield Site(value, axis, ids, weights)


def _ids(analysis: Analysis, value: ir.Value, axis: int) -> Ids | None:
    if not is_float(value):
        return None
    layout = analysis.channels.layout.get(value, ())
    return next((block.ids for block in layout if block.axes == (axis,)), None)


def observed(model: ir.Model, found: list[Site], samples: Samples, kind: str) -> list[Scores]:
    """Return, per site and channel, the mean of |x| (``Abs``) or of x² (``Mul``)."""
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    scope = Scope(copy.graph, "observed")
    outputs: dict[tuple[str, int], ir.Value] = {}
    for site in found:
        key = (name_of(site.value), site.axis)
        if key not in outputs:
            x = scope.op("Cast", values[key[0]], to=int(ir.DataType.FLOAT))
            magnitude = scope.op("Abs", x) if kind == "Abs" else scope.op("Mul", x, x)
            rank = len(site.value.shape or ())
            outputs[key] = scope.mean(magnitude, [a for a in range(rank) if a != site.axis])
    copy.graph.outputs.extend(outputs.values())
    session, names = Session(copy), [name_of(v) for v in outputs.values()]
    sums: dict[str, Scores] = dict.fromkeys(names, np.zeros(()))
    for feeds in samples.feeds:
        for name, mean in session.run(feeds, names).items():
            sums[name] = sums[name] + mean.astype(np.float64)
    return [sums[name_of(outputs[name_of(s.value), s.axis])] / len(samples.feeds) for s in found]


def _squared(analysis: Analysis, site: Site) -> Scores:
    """The squared weights that each channel of a site meets; 1 where it meets no weight."""
    squares = np.zeros(analysis.components.count)
    for birth in site.weights:
        if (array := rows(birth)) is not None:
            np.add.at(squares, analysis.labels(birth), np.square(array).sum(axis=1))
    own = squares[analysis.components.label[site.ids]]
    return own if own.any() else np.ones(len(site.ids))


def _spread(analysis: Analysis, parts: list[tuple[Ids, Scores]], *, total: bool = False) -> Scores:
    """Add up the parts per component, each over its mean (or its sum); NaN where there is none."""
    scores = np.full(analysis.components.count, np.nan)
    for ids, numbers in parts:
        scale = float(numbers.sum() if total else numbers.mean()) or 1.0
        _add(scores, analysis.components.label[ids], numbers / scale)
    return scores


def _add(scores: Scores, labels: Ids, numbers: Scores) -> None:
    """Add to components that may have nothing yet."""
    scores[labels] = np.nan_to_num(scores[labels])
    np.add.at(scores, labels, numbers)
