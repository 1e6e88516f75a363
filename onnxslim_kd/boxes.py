"""Fold a graph into few boxes, for pictures: one lane for each model, one box for each module.

A lane is the student, one of the teachers, or the losses. Within a lane nodes fold by the module
paths that exporters leave, at the first level that shows structure; a graph without module paths
folds where the size of the map changes, or the channels where no size is known. Each loss term is
one box.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxslim_kd import roles
from onnxslim_kd.access import is_float
from onnxslim_kd.model import name_of
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.modules import scopes_of

MOST = 24
"""Boxes of a lane that still read well on one page."""
SMALL = 3
"""Nodes below which a module is not worth a box of its own."""
STUDENT, LOSSES = "student", "losses"
LOSS = "loss"
"""The box of the weighted sum."""


@dataclass
class Box:
    """Nodes that are drawn as one.

    Attributes:
        title: The module, the map size or the loss.
        lane: ``student``, ``losses`` or the name of a teacher.
        nodes: In the order of the graph.
        parameters: Numbers in the weights that only these nodes read.
    """

    title: str
    lane: str
    nodes: list[ir.Node] = field(default_factory=list)
    parameters: int = 0

    @property
    def operators(self) -> str:
        """The operators and how often, most frequent first."""
        counts = Counter(node.op_type for node in self.nodes).most_common()
        return ", ".join(op if n == 1 else f"{op} x{n}" for op, n in counts)


@dataclass(frozen=True)
class Folded:
    """A graph as boxes.

    Attributes:
        lanes: Lane -> its boxes from top to bottom; the student first, the losses second.
        edges: From box to box, with the values that flow.
        inputs: Graph input -> the boxes that read it.
        outputs: Graph output -> the box that computes it.
    """

    lanes: dict[str, list[Box]]
    edges: dict[tuple[int, int], list[ir.Value]]
    inputs: dict[ir.Value, list[int]]
    outputs: dict[ir.Value, int]

    @property
    def boxes(self) -> list[Box]:
        """All boxes; edges refer to their places here."""
        return [box for lane in self.lanes.values() for box in lane]


def fold(model: ir.Model, *, most: int = MOST) -> Folded:
    """Fold ``model``, merged or plain, into at most ``most`` boxes for each network."""
    record = roles.read(model)
    lanes = {
        lane: _fold_losses(nodes) if lane == LOSSES else _fold_network(lane, nodes, record, most)
        for lane, nodes in _lanes(model, record).items()
        if nodes
    }
    boxes = [box for lane in lanes.values() for box in lane]
    home = {node: i for i, box in enumerate(boxes) for node in box.nodes}
    _count_parameters(boxes, record.loss_parameters if record is not None else ())
    edges: dict[tuple[int, int], list[ir.Value]] = {}
    inputs: dict[ir.Value, list[int]] = {value: [] for value in model.graph.inputs}
    for index, box in enumerate(boxes):
        for value in _read_from_outside(box):
            producer = value.producer()
            if producer in home:
                edges.setdefault((home[producer], index), []).append(value)
            elif value in inputs:
                inputs[value].append(index)
    outputs = {v: home[p] for v in model.graph.outputs if (p := v.producer()) in home}
    return Folded(lanes, edges, inputs, outputs)


def _lanes(model: ir.Model, record: roles.Roles | None) -> dict[str, list[ir.Node]]:
    teachers = record.teachers if record is not None else ()
    lanes: dict[str, list[ir.Node]] = {STUDENT: [], LOSSES: []}
    lanes.update((teacher.name, []) for teacher in teachers)
    for node in model.graph:
        name = node.name or ""
        if roles.TERM in node.metadata_props:
            lanes[LOSSES].append(node)
            continue
        owner = next((t.name for t in teachers if name.startswith(t.prefix)), STUDENT)
        lanes[owner].append(node)
    return lanes


def _fold_losses(nodes: Iterable[ir.Node]) -> list[Box]:
    found: dict[str, Box] = {}
    for node in nodes:
        term = node.metadata_props[roles.TERM]
        found.setdefault(term, Box(term, LOSSES)).nodes.append(node)
    return list(found.values())


def _fold_network(
    lane: str, nodes: Sequence[ir.Node], record: roles.Roles | None, most: int
) -> list[Box]:
    prefix = next((t.prefix for t in record.teachers if t.name == lane), "") if record else ""
    paths = [[path for s in scopes_of(node) if (path := s.removeprefix(prefix))] for node in nodes]
    keys = _best_keys(paths, most)
    if len(set(keys)) < SMALL:
        return _fold_by_size(lane, nodes, most)
    return [Box(_title(key), lane, members) for key, members in _collect(nodes, keys)]


def _best_keys(paths: Sequence[Sequence[str]], most: int) -> list[str | None]:
    """The module of every node, at the first level with a third of ``most`` real modules."""
    best: list[str | None] = []
    for level in range(1, max(map(len, paths), default=0) + 1):
        keys = _keys(paths, level)
        sizes = Counter(keys)
        if len(sizes) > most:
            break
        best = keys
        if sum(size >= SMALL for size in sizes.values()) >= most // 3:
            break
    return best


def _keys(paths: Sequence[Sequence[str]], level: int) -> list[str | None]:
    """The module of every node at ``level``; one of a node or two counts as part of its parent."""
    sizes = Counter(module for path in paths for module in path)
    keys: list[str | None] = []
    for path in paths:
        inner = list(path[:level])
        if len(inner) > 1 and sizes[inner[-1]] < SMALL:
            inner.pop()
        keys.append(inner[-1] if inner else None)
    return keys


def _collect(
    nodes: Sequence[ir.Node], keys: Sequence[str | None]
) -> Iterable[tuple[str, list[ir.Node]]]:
    """Group by key; a node without one goes with the node before it."""
    found: dict[str, list[ir.Node]] = {}
    current = next(key for key in keys if key is not None)
    for node, key in zip(nodes, keys, strict=True):
        current = key or current
        found.setdefault(current, []).append(node)
    return found.items()


def _title(path: str) -> str:
    """The last parts of ``/layer1/layer1.0`` that say where it is; a dotted path stays whole."""
    parent, _, last = path.strip("/").rpartition("/")
    above = parent.rpartition("/")[2]
    return last if last.startswith(above) else f"{above}/{last}"


def _fold_by_size(lane: str, nodes: Sequence[ir.Node], most: int) -> list[Box]:
    """Begin a box where the size of the map changes; join the shortest until few are left."""
    runs: list[tuple[str, list[ir.Node]]] = []
    for node in nodes:
        size = _size(node)
        if runs and size in (None, runs[-1][0]):
            runs[-1][1].append(node)
        else:
            runs.append((size or "", [node]))
    while len(runs) > most:
        i = min(range(len(runs) - 1), key=lambda i: len(runs[i][1]) + len(runs[i + 1][1]))
        larger = max(runs[i : i + 2], key=lambda run: len(run[1]))
        runs[i : i + 2] = [(larger[0], runs[i][1] + runs[i + 1][1])]
    return [Box(size or lane, lane, members) for size, members in runs]


def _size(node: ir.Node) -> str | None:
    """The map size, else the channels or the rank, of what a node computes; None for integers."""
    value = node.outputs[0]
    shape = dims.read(value)
    if not shape or not is_float(value):
        return None
    if len(shape) != 4:
        return f"{len(shape)} dimensions"
    if all(isinstance(d, int) for d in shape[2:]):
        return f"{shape[2]} x {shape[3]}"
    return f"{shape[1]} channels" if isinstance(shape[1], int) else None


def _read_from_outside(box: Box) -> list[ir.Value]:
    inside = {value for node in box.nodes for value in node.outputs}
    read = [v for node in box.nodes for v in node.inputs if v is not None and v not in inside]
    return list(dict.fromkeys(read))


def _count_parameters(boxes: Sequence[Box], of_losses: Sequence[str]) -> None:
    """Count every weight once; of a loss what it trains, not its constants."""
    seen: set[str] = set()
    for box in boxes:
        for value in _read_from_outside(box):
            name = name_of(value)
            if value.const_value is None or name in seen:
                continue
            if box.lane != LOSSES or name in of_losses:
                seen.add(name)
                box.parameters += value.const_value.size
