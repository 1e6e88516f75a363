"""Propose values to distil: pairs that a loss accepts, at like positions, best first.

Candidates are the places where people tap networks: the outputs, what goes into a final softmax,
the last value at each resolution, and the values that several layers read (ends of blocks). A pair
is proposed only if the loss can really be built on its shapes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, product

import onnx_ir as ir

from onnxslim_kd.errors import PassError, UserError
from onnxslim_kd.model import OPSET, ModelLike, load, name_of
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.losses import LOSSES, LossSpec, build
from onnxslim_kd.passes.scope import Scope
from onnxslim_kd.values import depths, tappable

TRIES = 50
"""Proposals that are looked at for each loss; the rest is farther apart."""
MOVES = ("Shape", "Size", "Reshape", "Transpose", "Flatten", "Unsqueeze")
"""Readers that say nothing about where a block ends."""
SQUASHING = ("Softmax", "Sigmoid", "LogSoftmax")


@dataclass(frozen=True)
class Suggestion:
    """A loss that fits.

    Attributes:
        kind: Of the loss.
        student: Its values in the student.
        teacher: Its values in the teacher.
        shapes: Of these values, for reading.
        score: 1 for the same position in both networks, less the farther apart.
        align: How the loss makes the channels alike, where they differ.
    """

    kind: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    shapes: tuple[str, str]
    score: float
    align: str | None = None

    @property
    def text(self) -> str:
        """The suggestion as ``--loss`` takes it."""
        parts = [f"{self.kind}:{'+'.join(self.student)}"]
        if self.teacher:
            parts.append(f"={'+'.join(self.teacher)}")
        if self.align is not None:
            parts.append(f",align={self.align}")
        return "".join(parts)


@dataclass(frozen=True)
class Tap:
    """A candidate: a value, and where it is.

    Attributes:
        value: The value.
        depth: How much of the network lies before it, 0 to 1.
        scores: Whether it is an output, or goes into the softmax that is.
        last: Whether it is the last candidate of its map size.
    """

    value: ir.Value
    depth: float
    scores: bool
    last: bool

    @property
    def size(self) -> list[dims.Dim]:
        """Of the map or the sequence; empty for vectors."""
        return _size(self.value)


def suggest(student: ModelLike, teacher: ModelLike, *, most: int = 3) -> list[Suggestion]:
    """Propose at most ``most`` ways to use each loss, the best ones first.

    Args:
        student: The model to train.
        teacher: The model to learn from.
        most: Suggestions per loss.
    """
    ours, theirs = taps(load(student)), taps(load(teacher))
    pairs = sorted(
        product(ours, theirs),
        key=lambda pair: (-_score(*pair), pair[0].value.name != pair[1].value.name),
    )
    found: list[Suggestion] = []
    for kind in LOSSES:
        tries = islice(_proposals(kind, ours, theirs, pairs), TRIES)
        fitting = (s for p in tries if (s := _suggestion(kind, *p)) is not None)
        found += islice(fitting, most)
    return sorted(found, key=lambda suggestion: -suggestion.score)


def taps(model: ir.Model) -> list[Tap]:
    """Return the candidates of one model, in the order of its graph."""
    depth, batches = depths(model), {(dims.read(v) or [None])[0] for v in model.graph.inputs}
    scores = _scores(model)
    candidates = [v for v in tappable(model) if _is_end(v) and _has_batch(v, batches)]
    candidates.sort(key=lambda v: (depth[v], v.is_graph_output()))
    ends = {depth[v]: v for v in candidates}  # one at a depth: the activation, not its input
    found = [v for v in tappable(model) if v in scores or v in ends.values()]
    last = {str(_size(value)): value for value in found}
    return [Tap(v, depth[v], v in scores, v in last.values()) for v in found]


def _size(value: ir.Value) -> list[dims.Dim]:
    shape = dims.read(value) or []
    return shape[2:] if len(shape) == 4 else shape[1:-1]


def _scores(model: ir.Model) -> set[ir.Value]:
    """The outputs of the lowest rank: beside class scores a model may give hidden states."""
    outputs = [value for value in model.graph.outputs if value.shape is not None]
    lowest = min((len(dims.read(value) or []) for value in outputs), default=0)
    return {_logits(value) for value in outputs if len(dims.read(value) or []) == lowest}


def _logits(output: ir.Value) -> ir.Value:
    """What goes into a final softmax, for losses do their own."""
    producer = output.producer()
    if producer is not None and producer.op_type in SQUASHING and producer.inputs[0] is not None:
        return producer.inputs[0]
    return output


def _is_end(value: ir.Value) -> bool:
    """Tell whether a block ends at ``value``: it feeds several layers, or the map shrinks next."""
    shape = dims.read(value)
    if shape is None or len(shape) not in (3, 4) or shape[2:] == [1, 1]:
        return False
    if not isinstance(shape[1 if len(shape) == 4 else -1], int):
        return False  # the channels are not known
    readers = {node for node, _ in value.uses() if node.op_type not in MOVES}
    resized = any(_size(node.outputs[0]) != _size(value) for node in readers)
    return value.is_graph_output() or len(readers) > 1 or resized


def _has_batch(value: ir.Value, batches: set[dims.Dim]) -> bool:
    """Tell whether samples come first; with windows or time steps first it is no map."""
    first = (dims.read(value) or [None])[0]
    return first in batches or (isinstance(first, str) and not _all_fixed(batches))


def _all_fixed(batches: set[dims.Dim]) -> bool:
    return all(isinstance(batch, int) for batch in batches)


def _score(student: Tap, teacher: Tap) -> float:
    """1 for the same place; ends of the same stage are one, whatever the depth of the stages."""
    if student.scores != teacher.scores:
        return 0.0
    apart = abs(student.depth - teacher.depth)
    if student.size != teacher.size:
        return round((1 - apart) / 2, 3)
    return round(1 - apart * (0.5 if student.last and teacher.last else 1), 3)


Proposal = tuple[Sequence[Tap], Sequence[Tap]]


def _proposals(
    kind: str, ours: Sequence[Tap], theirs: Sequence[Tap], pairs: Sequence[tuple[Tap, Tap]]
) -> Iterable[Proposal]:
    """What to try for a loss, most likely first."""
    loss = LOSSES[kind]
    if loss.values == "lists":
        return _lists(ours, theirs)
    if loss.alone:
        return (([tap], []) for tap in ours if tap.scores)
    wanted = {"features": [False], "both": [True, False]}.get(loss.on, [True])
    fitting = (pair for pair in pairs if all(tap.scores for tap in pair) in wanted)
    return (([s], [t]) for s, t in fitting if loss.on != "vectors" or not (s.size or t.size))


def _lists(ours: Sequence[Tap], theirs: Sequence[Tap]) -> Iterator[Proposal]:
    """The ends of all stages, of all blocks, and of two stages, for losses that take several."""
    maps = [[tap for tap in side if _is_map(tap)] for side in (ours, theirs)]
    ends = [[tap for tap in side if tap.last] for side in maps]
    if not all(ends):
        return
    yield ends[0], ends[1]
    yield maps[0], maps[1]
    yield from zip(pairwise(ends[0]), pairwise(ends[1]), strict=False)


def _is_map(tap: Tap) -> bool:
    known = all(isinstance(dim, int) for dim in tap.size)
    return not tap.scores and len(tap.size) == 2 and known


def _suggestion(kind: str, student: Sequence[Tap], teacher: Sequence[Tap]) -> Suggestion | None:
    align = next((way for way in _ways(kind, student) if _builds(kind, student, teacher, way)), "")
    if align == "":
        return None
    scores = [_score(s, t) for s, t in zip(student, teacher, strict=False)] or [1.0]
    return Suggestion(
        kind,
        tuple(name_of(tap.value) for tap in student),
        tuple(name_of(tap.value) for tap in teacher),
        (_shapes(student), _shapes(teacher)),
        round(sum(scores) / len(scores), 3),
        align,
    )


def _ways(kind: str, student: Sequence[Tap]) -> list[str | None]:
    """As they are; feature maps also with a trained layer to the teacher's channels."""
    if LOSSES[kind].on != "both" or student[0].scores:
        return [None]
    return [None, "conv" if len(student[0].size) == 2 else "linear"]


def _builds(kind: str, student: Sequence[Tap], teacher: Sequence[Tap], align: str | None) -> bool:
    """Try the loss on stand-ins of the same types and shapes."""
    stand_ins = [
        [ir.val(f"{side}{i}", type=t.value.type, shape=t.value.shape) for i, t in enumerate(taps_)]
        for side, taps_ in (("s", student), ("t", teacher))
    ]
    graph = ir.Graph([*stand_ins[0], *stand_ins[1]], [], nodes=[], opset_imports={"": OPSET})
    ours, theirs = (tuple(name_of(value) for value in side) for side in stand_ins)
    options = {"align": align} if align is not None else {}
    try:
        build(Scope(graph, kind), LossSpec(kind, ours, theirs, options=options), *stand_ins)
    except (UserError, PassError):
        return False
    return True


def _shapes(taps_: Sequence[Tap]) -> str:
    return ", ".join(dict.fromkeys(dims.text(tap.value) for tap in taps_)) or "the label"
