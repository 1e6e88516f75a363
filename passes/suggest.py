"""Propose values to distil: pairs that a loss accepts, at like positions, best first.

Candidates are the places where people tap networks: the outputs, what goes into a final softmax,
the last value at each resolution, and the values that several layers read (ends of blocks). A pair
is proposed only if the loss can really be built on its shapes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import onnx_ir as ir

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import ModelLike, load, name_of
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.losses import LOSSES, LossSpec, build
from onnxslim_kd.passes.scope import Scope
from onnxslim_kd.values import depths, tappable

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
    """

    kind: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    shapes: tuple[str, str]
    score: float

    @property
    def text(self) -> str:
        """The suggestion as ``--loss`` takes it."""
        return f"{self.kind}:{'+'.join(self.student)}={'+'.join(self.teacher)}"


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
        """Of the map; empty for vectors."""
        return (dims.read(self.value) or [])[2:]


def suggest(student: ModelLike, teacher: ModelLike, *, most: int = 3) -> list[Suggestion]:
    """Propose at most ``most`` ways to use each loss, the best ones first.

    Args:
        student: The model to train.
        teacher: The model to learn from.
        most: Suggestions per loss.
    """
    ours, theirs = taps(load(student)), taps(load(teacher))
    pairs = sorted(product(ours, theirs), key=lambda pair: (-_score(*pair), name_of(pair[0].value)))
    found = []
    for kind in LOSSES:
        proposals = _lists(ours, theirs) if LOSSES[kind].values == "lists" else _pairs(kind, pairs)
        fitting = (p for p in proposals if _builds(kind, *p))
        found += [_suggestion(kind, *p) for p, _ in zip(fitting, range(most), strict=False)]
    return sorted(found, key=lambda suggestion: -suggestion.score)


def taps(model: ir.Model) -> list[Tap]:
    """Return the candidates of one model, in the order of its graph."""
    depth = depths(model)
    outputs = {_logits(value) for value in model.graph.outputs}
    found = [value for value in tappable(model) if value in outputs or _is_end(value)]
    last = {str((dims.read(value) or [])[2:]): value for value in found}
    return [Tap(v, depth[v], v in outputs, v in last.values()) for v in found]


def _logits(output: ir.Value) -> ir.Value:
    """What goes into a final softmax, for losses do their own."""
    producer = output.producer()
    if producer is not None and producer.op_type in SQUASHING and producer.inputs[0] is not None:
        return producer.inputs[0]
    return output


def _is_end(value: ir.Value) -> bool:
    """Tell whether a block ends at ``value``: it feeds several layers, or the map shrinks next."""
    shape = dims.read(value)
    readers = {node for node, _ in value.uses()}
    if shape is None or len(shape) < 3 or not readers:
        return False
    if len([node for node in readers if node.op_type not in ("Shape", "Size")]) > 1:
        return True
    after = [dims.read(node.outputs[0]) for node in readers]
    return any(other is not None and other[2:] != shape[2:] for other in after)


def _score(student: Tap, teacher: Tap) -> float:
    """1 for the same place; ends of the same stage are one, whatever the depth of the stages."""
    if student.scores != teacher.scores:
        return 0.0
    apart = abs(student.depth - teacher.depth)
    if student.size != teacher.size:
        return round((1 - apart) / 2, 3)
    return round(1 - apart * (0.5 if student.last and teacher.last else 1), 3)


Proposal = tuple[Sequence[Tap], Sequence[Tap]]


def _pairs(kind: str, pairs: Sequence[tuple[Tap, Tap]]) -> Iterator[Proposal]:
    """Single pairs: class scores for losses on them, feature maps for the others."""
    for student, teacher in pairs:
        if kind in EITHER or (student.scores and teacher.scores) == (kind in ON_SCORES):
            yield [student], [teacher]


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
    return not tap.scores and len(tap.size) == 2 and tap.size != [1, 1]


def _builds(kind: str, student: Sequence[Tap], teacher: Sequence[Tap]) -> bool:
    """Try the loss on stand-ins of the same types and shapes."""
    stand_ins = [
        [ir.val(f"{side}{i}", type=t.value.type, shape=t.value.shape) for i, t in enumerate(taps_)]
        for side, taps_ in (("s", student), ("t", teacher))
    ]
    graph = ir.Graph([*stand_ins[0], *stand_ins[1]], [], nodes=[], opset_imports={"": 17})
    spec = LossSpec(kind, tuple("s" for _ in student), tuple("t" for _ in teacher))
    try:
        build(Scope(graph, kind), spec, *stand_ins)
    except UserError:
        return False
    return True


def _suggestion(kind: str, student: Sequence[Tap], teacher: Sequence[Tap]) -> Suggestion:
    scores = [_score(s, t) for s, t in zip(student, teacher, strict=False)]
    return Suggestion(
        kind,
        tuple(name_of(tap.value) for tap in student),
        tuple(name_of(tap.value) for tap in teacher),
        (_shapes(student), _shapes(teacher)),
        round(sum(scores) / len(scores), 3),
    )


def _shapes(taps_: Sequence[Tap]) -> str:
    first = dims.text(taps_[0].value)
    return first if len(taps_) == 1 else f"{first} and {len(taps_) - 1} more"


ON_SCORES = ("soft_label", "kl", "ce", "dml", "js", "dkd", "dist", "skd", "wsl", "pefd")
EITHER = ("l1", "l2", "smooth_l1", "cosine", "rkd_distance", "rkd_angle")
