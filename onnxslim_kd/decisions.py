"""The same decisions for two models, so that rounding cannot send them different ways.

A TopK, an ArgMax or a comparison turns the last digit of a score into another answer: two queries
change places, and all that follows differs as a whole. To compare two models through one, both are
given what the first of them decides, and what it decides by is compared instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxslim_kd.compare import Reference
from onnxslim_kd.model import name_of
from onnxslim_kd.runtime import Session


@dataclass(frozen=True)
class Decisions:
    """Names of values in both models."""

    answers: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    """What the answers follow from, where that is no answer itself."""


def find(graph: ir.Graph, is_whole: Callable[[ir.Value], bool] = lambda value: True) -> Decisions:
    """Return the decisions of a graph.

    Args:
        graph: Its nodes are looked at, not those of bodies.
        is_whole: Whether a value has the same shape in both models.
    """
    answers, scores = [], []
    for node in graph:
        answer = None if node.domain else _ANSWER.get(node.op_type)
        if answer is not None and is_whole(node.outputs[answer]):
            answers.append(name_of(node.outputs[answer]))
            computed = [v for v in node.inputs if v is not None and v.producer() is not None]
            scores += [name_of(v) for v in computed if is_whole(v)]
    return Decisions(tuple(answers), tuple(dict.fromkeys(s for s in scores if s not in answers)))


def hold(
    decisions: Decisions, reference: Reference, first: ir.Model, second: ir.Model
) -> Reference:
    """Make the answers of ``first`` inputs of both models, in place.

    Args:
        decisions: Of both.
        reference: What ``first`` computes.
        first: Gains outputs as well: its scores.
        second: Gains the same.

    Returns:
        The reference with the answers among its inputs, and the scores among its outputs.
    """
    one, other = (ir.convenience.create_value_mapping(model.graph) for model in (first, second))
    answers = [name for name in decisions.answers if name in one and name in other]
    scores = [name for name in decisions.scores if name in one and name in other]
    _show(first, [one[name] for name in (*answers, *scores)])
    _show(second, [other[name] for name in scores])
    session = Session(first, optimise=False, spin=False)
    feeds, outputs = [], []
    for feed, known in zip(reference.feeds, reference.outputs, strict=True):
        found = session.run(feed, [*answers, *scores])
        feeds.append({**feed, **{_given(name): found[name] for name in answers}})
        outputs.append(
            {name: known[name] for name in known if name not in answers}
            | {name: found[name] for name in scores}
        )
    for name in answers:
        kind = ir.DataType.from_numpy(feeds[0][_given(name)].dtype)
        for model, values in ((first, one), (second, other)):
            shape = ir.Shape([None] * feeds[0][_given(name)].ndim)
            given = ir.Value(name=_given(name), type=ir.TensorType(kind), shape=shape)
            model.graph.inputs.append(given)
            for use in list(values[name].uses()):
                use.node.replace_input_with(use.idx, given)
    return Reference(tuple(feeds), tuple(outputs))


def _show(model: ir.Model, values: Sequence[ir.Value]) -> None:
    model.graph.outputs.extend(value for value in values if not value.is_graph_output())


def _given(name: str) -> str:
    return f"{name}.given"


_ANSWER = {
    "ArgMax": 0,
    "ArgMin": 0,
    "Ceil": 0,
    "Equal": 0,
    "Floor": 0,
    "Greater": 0,
    "GreaterOrEqual": 0,
    "Less": 0,
    "LessOrEqual": 0,
    "NonMaxSuppression": 0,
    "Round": 0,
    "Sign": 0,
    "TopK": 1,
}
"""The output of an operator that is not continuous in its inputs."""
