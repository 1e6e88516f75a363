"""Channel identities: what travels with the data while `ties` walks the graph.

A *channel* is one index along one axis of one value, and has a number, its id. Ids are born at the
axes of weights and move with the data: sliced by Slice, joined by Concat, permuted by Transpose.
An axis that no weight touches (batch, pixels, tokens) has none and costs nothing.

The ids of a value are its *layout*: blocks on disjoint axes. A block on one axis is the usual
case, an array of ids along that axis. A block on several axes is a *grid*, what Reshape makes of
one axis: (heads x dims) in attention, (groups x width) in a channel shuffle. Operators that only
move data take grids along; one that needs a plain axis collapses the grid to it, which ties what
must then live and die together.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxslim_kd.shapes import Shape, Shapes

Ids = npt.NDArray[np.int64]
Attention = Literal["auto", "heads", "dims"]


class Block(NamedTuple):
    """Ids along ``axes`` of a value; ``ids.shape`` is the size of those axes."""

    axes: tuple[int, ...]
    ids: Ids


Layout = tuple[Block, ...]


class Birth(NamedTuple):
    """Where a run of ids comes from: an axis of a weight, or of a tensor made up by a node."""

    start: int
    size: int
    value: ir.Value
    axis: int
    node: ir.Node
    operand: int | None
    """Which input of ``node`` the weight is; None where ``node`` makes the tensor up."""


class Tie(NamedTuple):
    """``a[i]`` is removed if and only if ``b[i]`` is, because of ``node``."""

    node: ir.Node | None
    a: Ids
    b: Ids


class Consumption(NamedTuple):
    """``node`` computes over the same channels along one axis of each of some inputs."""

    node: ir.Node
    axes: tuple[tuple[int, int], ...]
    """(which input, which axis), for every input that has the channels."""
    out_axis: int | None
    """The axis of the first output that still has them, if any."""


class Shuffle(NamedTuple):
    """A permutation of one axis, spelled Reshape, Transpose, Reshape."""

    axis: int
    order: Ids
    path: tuple[ir.Node, ...]
    """The nodes from the source to the last Reshape, without it."""


@dataclass(slots=True)
class Operand:
    """One input of a node, as a rule sees it."""

    value: ir.Value
    layout: Layout
    shape: Shape
    constant: bool

    @property
    def name(self) -> str:
        """The value's name, for messages."""
        return self.value.name or "?"


@dataclass(frozen=True)
class Components:
    """The smallest sets of channels that can be removed."""

    label: Ids
    """The component of every id."""
    count: int
    pinned: dict[int, str]
    """Why a component must stay, for each that must."""


@dataclass
class Channels:
    """The state of one walk over a graph."""

    shapes: Shapes
    asked: Attention = "heads"
    by_dims: frozenset[ir.Node] = frozenset()
    """Where dims go although heads were to go: there no head could."""
    layout: dict[ir.Value, Layout] = field(default_factory=dict)
    births: list[Birth] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    producers: list[tuple[ir.Node, Ids]] = field(default_factory=list)
    """The ids that a weight's output axis gives birth to: what a pattern chooses."""
    approximate: list[tuple[ir.Node, Ids, str]] = field(default_factory=list)
    """Where a norm or softmax runs over channels, so that removal is not masking."""
    shuffles: dict[ir.Node, Shuffle] = field(default_factory=dict)
    """Reshapes that end a channel shuffle."""
    consumed: list[Consumption] = field(default_factory=list)
    """Where channels end: summed over by a layer, reduced, normalised over."""
    whole: dict[ir.Value, str] = field(default_factory=dict)
    """Weights that something without a rule reads, and that must stay whole for this reason."""
    heads: list[Ids] = field(default_factory=list)
    """Grids of heads x dims of which only whole heads can go."""
    pieces: list[Ids] = field(default_factory=list)
    """What a node takes out of an axis: something of it must stay."""
    choices: set[ir.Node | None] = field(default_factory=set)
    """Where it makes a difference whether heads go or dims."""
    node: ir.Node | None = None
    _next: int = 0
    _pins: dict[int, str] = field(default_factory=dict)
    _born: dict[object, Layout] = field(default_factory=dict)

    def heads_go(self) -> bool:
        """Tell whether heads go at the present node, not dims; asked only where that matters."""
        self.choices.add(self.node)
        return self.attention_at(self.node) == "heads"

    def attention_at(self, node: ir.Node | None) -> Literal["heads", "dims"]:
        """Whether whole heads go at a node, or dimensions inside all heads."""
        return "dims" if self.asked == "dims" or node in self.by_dims else "heads"

    # ---- ids

    def _fresh(self, size: int) -> Ids:
        self._next += size
        return np.arange(self._next - size, self._next)

    def loose(self, shape: Shape) -> Ids:
        """Ids for what stands beside channels and goes with them, such as the padding of a head."""
        return self._fresh(prod(shape)).reshape(shape)

    def pin(self, reason: str) -> int:
        """Return a new id that must stay, for ``reason``."""
        self._pins[self._next] = reason
        return int(self._fresh(1)[0])

    def tie(self, a: Ids, b: Ids | int) -> None:
        """Let ``a[i]`` and ``b[i]`` live and die together; shapes broadcast.

        Raises:
            Unsupported: They do not broadcast: the graph contradicts itself.
        """
        if a is b:
            return
        if not isinstance(b, np.ndarray) or a.shape != b.shape:
            try:
                a, b = np.broadcast_arrays(a, np.asarray(b))
            except ValueError as error:
                raise Unsupported(f"axes of {len(a)} and {np.size(b)} channels meet") from error
        self.ties.append(Tie(self.node, a.ravel(), b.ravel()))

    def freeze(self, layout: Iterable[Block], reason: str) -> None:
        """Let all channels of ``layout`` stay."""
        for block in layout:  # a pin each, so that blocks do not answer for one another
            if block.ids.size:
                self.tie(block.ids, self.pin(reason))

    def made_up(self, value: ir.Value, axis: int, size: int) -> Ids:
        """Ids for an axis that the present node makes up, so that it can make up less."""
        assert self.node is not None
        ids = self._fresh(size)
        self.births.append(Birth(int(ids[0]), size, value, axis, self.node, None))
        return ids

    def is_made_up(self, ids: Ids) -> bool:
        """Tell whether the first of ``ids`` was born in a tensor that a node makes up."""
        first = int(ids.flat[0])
        birth = self.births[bisect_right(self.births, first, key=lambda b: b.start) - 1]
        return birth.operand is None and first < birth.start + birth.size

    # ---- operands

    def operand(self, index: int) -> Operand | None:
        """Return input ``index`` of the present node; None if absent or of unknown shape."""
        assert self.node is not None
        inputs = self.node.inputs
        value = inputs[index] if index < len(inputs) else None
        if value is None or (shape := self.shapes.of(value)) is None:
            return None
        if value.is_initializer() and not value.is_graph_input():
            return Operand(value, self._weight(value, shape, index), shape, constant=True)
        return Operand(value, self.layout.get(value, ()), shape, constant=False)

    def need(self, index: int) -> Operand:
        """Return input ``index``; raise `Unsupported` where it is absent or of unknown shape."""
        operand = self.operand(index)
        if operand is None:
            raise Unsupported("the shape of an input is not known")
        return operand

    def _weight(self, value: ir.Value, shape: Shape, index: int) -> Layout:
        """Ids of a weight: its own, or its use's for vectors, which exporters share by accident."""
        assert self.node is not None
        key: object = value if len(shape) > 1 else (self.node, index)
        if key not in self._born:
            blocks = []
            for axis, size in enumerate(shape):
                if size > 1:
                    ids = self._fresh(size)
                    self.births.append(Birth(int(ids[0]), size, value, axis, self.node, index))
                    blocks.append(Block((axis,), ids))
            self._born[key] = tuple(blocks)
            if value in self.whole:
                self.freeze(blocks, self.whole[value])
        return self._born[key]

    def born(self, value: ir.Value) -> Layout:
        """Return the layout of a weight that has ids of its own, for all its uses."""
        return self._born.get(value, ())

    def keep_whole(self, value: ir.Value, reason: str) -> None:
        """Let a weight stay whole for all its uses, earlier and later ones."""
        self.whole.setdefault(value, reason)
        self.freeze(self._born.get(value, ()), reason)

    # ---- layouts

    def set(self, index: int, layout: Iterable[Block]) -> None:
        """Give output ``index`` of the present node its layout, if the node has that output.

        Raises:
            Unsupported: Its shape is not known.
        """
        assert self.node is not None
        has_it = index < len(self.node.outputs) and self.node.outputs[index].name
        if has_it and (blocks := tuple(layout)):
            self.out_shape(index)
            self.layout[self.node.outputs[index]] = blocks

    def out_shape(self, index: int = 0) -> Shape:
        """Return the shape of output ``index``; raise `Unsupported` where it is not known."""
        assert self.node is not None
        shape = self.shapes.of(self.node.outputs[index])
        if shape is None:
            raise Unsupported("the shape of its output is not known")
        return shape

    def ids(self, operand: Operand, axis: int) -> Ids | None:
        """Return the ids along one axis, collapsing a grid to it; None where there are none."""
        axis %= max(len(operand.shape), 1)
        for block in operand.layout:
            if axis in block.axes:
                if len(block.axes) == 1:
                    return block.ids
                return self.collapse(operand, block, axis).ids
        return None

    def collapse(self, operand: Operand, block: Block, keep: int) -> Block:
        """Tie a grid so that only whole slices along axis ``keep`` can go."""
        grid = np.moveaxis(block.ids, block.axes.index(keep), 0).reshape(
            block.ids.shape[block.axes.index(keep)], -1
        )
        self.tie(grid[:, 1:], grid[:, :1])
        if self.attention_at(self.node) == "heads":
            self.heads.append(grid[:, 0])
        plain = Block((keep,), grid[:, 0])
        operand.layout = tuple(plain if b is block else b for b in operand.layout)
        if not operand.constant:
            self.layout[operand.value] = operand.layout
        return plain

    def collapse_all(self, operand: Operand, *, first: bool) -> None:
        """Collapse every grid of ``operand``, to its first axis or to its last."""
        for block in operand.layout:
            if len(block.axes) > 1:
                self.collapse(operand, block, min(block.axes) if first else max(block.axes))

    def ids_inside(self, operand: Operand, axis: int) -> Ids | None:
        """Return the ids along an axis that is computed over, for which heads need not be split.

        A norm inside each head computes over a grid's dims: with heads to remove, it keeps them.
        """
        axis %= len(operand.shape)
        for block in operand.layout:
            if axis in block.axes and len(block.axes) > 1:
                outside, last = min(a for a in block.axes if a != axis), max(block.axes)
                heads = outside != last and self.heads_go()
                self.collapse(operand, block, outside if heads else last)
        return self.ids(operand, axis)

    def same(self, a: Ids | None, b: Ids | None, reason: str) -> Ids | None:
        """Tie two axes that meet; where one has no ids, the other must stay."""
        if a is None or b is None:
            if (ids := a if b is None else b) is not None:
                self.tie(ids, self.pin(reason))
            return ids
        self.tie(a, b)
        return a

    def produce(self, ids: Ids | None) -> None:
        """Say that ``ids`` are the output axis of the present node's weight."""
        if ids is not None:
            assert self.node is not None
            self.producers.append((self.node, ids))

    def consume(self, *axes: tuple[int, int], out_axis: int | None = None) -> None:
        """Say that the present node computes over these axes, given as (input, axis)."""
        assert self.node is not None
        self.consumed.append(Consumption(self.node, axes, out_axis))

    def not_exact(self, ids: Ids | None, reason: str) -> None:
        """Say that the present node's numbers depend on how many ``ids`` there are."""
        if ids is not None:
            assert self.node is not None
            self.approximate.append((self.node, ids, reason))

    # ---- result

    def components(self) -> Components:
        """Solve the ties: one connected component is the smallest thing that can be removed."""
        a = np.concatenate([tie.a for tie in self.ties] or [np.empty(0, np.int64)])
        b = np.concatenate([tie.b for tie in self.ties] or [np.empty(0, np.int64)])
        count, label = connected(self._next, a, b)
        pinned: dict[int, str] = {}
        for at, reason in zip(label[self.pins].tolist(), self._pins.values(), strict=True):
            pinned.setdefault(at, reason)
        return Components(label, count, pinned)

    @property
    def pins(self) -> Ids:
        """The ids that were made only to pin others."""
        return np.array(list(self._pins), np.int64)


def connected(n: int, a: Ids, b: Ids) -> tuple[int, Ids]:
    """Return how many components ``n`` numbers have, tied ``a[i]`` to ``b[i]``, and whose is whose.

    Components are numbered by their least members. All ties are looked at together: every tree of
    the forest hangs itself under the least tree that it is tied to, until none is tied to another.
    At least every second tree goes in two rounds; a graph takes two or three.
    """
    root = np.arange(n)
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(above := root[root], root):
            root = above
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
    is_root = root == np.arange(n)
    return int(is_root.sum()), (np.cumsum(is_root) - 1)[root]


class Unsupported(Exception):
    """A rule's word for "not in this form"; the walk pins the node's inputs for this reason."""
