"""From ties to groups: which parameters share channels, and in what units they can go."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import cost
from onnxslim_kd import shapes as shape_sampling
from onnxslim_kd.memory import collection_paused
from onnxslim_kd.passes import heads, modules
from onnxslim_kd.passes.channels import (
    Attention,
    Birth,
    Channels,
    Components,
    Ids,
    connected,
)
from onnxslim_kd.passes.prepare import prepare
from onnxslim_kd.shapes import Shape, Shapes


@dataclass(frozen=True)
class Parameter:
    """An axis of a weight that makes channels (an output axis), or a vector along channels."""

    name: str
    axis: int
    birth: Birth
    produces: bool
    """False for biases, norms and the like, which only follow."""

    @property
    def node(self) -> ir.Node:
        """The node that reads the parameter."""
        return self.birth.node

    @property
    def aliases(self) -> tuple[str, ...]:
        """What a pattern is tried on: the name, the node's name, the module scopes."""
        return self.name, self.node.name or "", *filter(None, modules.recorded(self.node))


@dataclass
class Analysis:
    """A model with its ties solved."""

    model: ir.Model
    shapes: Shapes
    channels: Channels
    components: Components
    given: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The input shapes that the user gave."""
    free_outputs: tuple[str, ...] = ()
    parameters: list[Parameter] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    """What was written in another form before the walk."""
    by_dims: tuple[ir.Node, ...] = ()
    """Layers that lose dimensions of every head, because no whole head can go."""

    def labels(self, birth: Birth) -> Ids:
        """The component of every index along the axis of ``birth``."""
        return self.components.label[birth.start : birth.start + birth.size]

    @cached_property
    def nodes(self) -> dict[str, ir.Node]:
        """The nodes of the graph by name."""
        return {node.name or "": node for node in self.model.graph}

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """The values of the graph by name."""
        return dict(ir.convenience.create_value_mapping(self.model.graph))

    @cached_property
    def births(self) -> list[Birth]:
        """All births, weights and made-up tensors, by first id."""
        return self.channels.births

    @cached_property
    def other_sample(self) -> Shapes:
        """A second choice of the dynamic dimensions: what differs depends on them."""
        computed = any(not value.is_initializer() for value in self.shapes.number)
        if not (computed and shape_sampling.is_dynamic(self.model)):
            return self.shapes  # no number depends on a dimension
        return shape_sampling.sample(self.model, self.given, variant=1, base=self.shapes)

    @cached_property
    def stays(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each component is pinned."""
        mask = np.zeros(self.components.count, bool)
        mask[list(self.components.pinned)] = True
        return mask

    @cached_property
    def signature(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """A number per component that says which axes and pieces it touches; equal: one block.

        Inside a group the ratio holds for every block, so that each half of a split, say, loses
        its share, and none dies. The number is a sum of random words, one per axis and piece.
        """
        axes = [self.labels(b) for b in self.births]
        axes += [self.components.label[ids] for ids in self.channels.pieces]
        words = np.random.default_rng(0).integers(1, 2**63, len(axes), dtype=np.uint64)
        total = np.zeros(self.components.count, np.uint64)
        for label, word in zip(axes, words, strict=True):
            total[label] = total[label] + word  # once for each, however often it is there
        return total

    @cached_property
    def group_of(self) -> list[int]:
        """The group of every parameter; of a vector along several groups, that of its first."""
        starts = [p.birth.start for p in self.parameters]
        of_each: list[int] = self._groups[0][self.components.label[starts]].tolist()
        return of_each

    def groups_of(self, parameter: Parameter) -> list[int]:
        """The groups in which channels of ``parameter``, some of which can go, can go."""
        if (only := self._only_group.get(parameter.birth.start)) is not None:
            return [only]
        group, layered = self._groups
        free = self.labels(parameter.birth)
        free = free[~self.stays[free]]
        made = layered[group[free]]
        alone = free[~made][:1]  # what no layer makes, such as padding, is one group
        found = group[np.concatenate([free[made], alone])]
        runs = found[np.diff(found, prepend=-1) != 0]
        return list(dict.fromkeys(runs.tolist()))

    @cached_property
    def _only_group(self) -> dict[int, int]:
        """The group of every birth whose channels are all in the same one, by its first id."""
        of_id = self._groups[0][self.components.label]
        low, high = (self.over_births(f, of_id).tolist() for f in (np.minimum, np.maximum))
        ends = zip(self.births, low, high, strict=True)
        return {birth.start: a for birth, a, b in ends if a == b}

    def belongs(self, components: Ids, to: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each of some components is in the group ``to``."""
        group, layered = self._groups
        own = group[components]
        return np.asarray(own == to if layered[to] else ~layered[own])

    @cached_property
    def _groups(self) -> tuple[Ids, np.ndarray[Any, np.dtype[np.bool_]]]:
        """The group of every component, and whether a layer makes what is in each group.

        Output axes that share a component are one group.
        """
        label = [self.labels(p.birth) for p in self.parameters if p.produces]
        n = self.components.count
        rows = np.repeat(np.arange(len(label)) + n, [len(x) for x in label])
        columns = np.concatenate(label) if label else np.empty(0, np.int64)
        count, group = connected(n + len(label), rows, columns)
        layered = np.zeros(count, bool)
        layered[group[n:]] = True
        return group[:n], layered

    def refusal(self, parameter: Parameter) -> str | None:
        """Why no channel of ``parameter`` can go, or None."""
        label = self.labels(parameter.birth)
        first, last = label[0], label[-1]  # most often they tell
        if self.stays[first] and self.stays[label].all():
            return self.components.pinned[int(label.min())]
        if first == last and (label == first).all():
            return "all its channels live and die together, and a layer must not die"
        return None

    def new_shapes(self, removed: Ids) -> dict[ir.Value, Shape]:
        """The shapes that change when the components marked in ``removed`` go."""
        key = np.packbits(removed).tobytes()
        if key not in self._new_shapes:  # a plan asks for its MACs, then it is carried out
            self._new_shapes.clear()
            gone = removed[self.components.label].astype(bool)
            self._new_shapes[key] = self._layout_shapes(gone)
            self._weight_shapes(gone, self._new_shapes[key])
        return dict(self._new_shapes[key])

    @cached_property
    def _new_shapes(self) -> dict[bytes, dict[ir.Value, Shape]]:
        return {}

    def _layout_shapes(self, gone: np.ndarray[Any, Any]) -> dict[ir.Value, Shape]:
        known: dict[int, tuple[int, ...]] = {}
        """By array: an operator that lets channels pass hands on the array itself."""
        changed: dict[ir.Value, Shape] = {}
        for value, layout in self.channels.layout.items():
            before = self.shapes.shape[value]
            shape = list(before)
            for block in layout:
                if id(block.ids) not in known:
                    known[id(block.ids)] = extents(~gone[block.ids])
                for axis, size in zip(block.axes, known[id(block.ids)], strict=True):
                    shape[axis] = size
            if tuple(shape) != before:
                changed[value] = tuple(shape)
        return changed

    def _weight_shapes(self, gone: np.ndarray[Any, Any], changed: dict[ir.Value, Shape]) -> None:
        for birth, lost in zip(self.births, self.lost(gone), strict=True):
            if lost and birth.operand is not None:
                shape = list(changed.get(birth.value, self.shapes.shape[birth.value]))
                shape[birth.axis] = birth.size - lost
                changed[birth.value] = tuple(shape)

    def lost(self, gone: np.ndarray[Any, Any]) -> list[int]:
        """How many of its ids each birth loses, for a mask over ids."""
        counts: list[int] = self.over_births(np.add, gone.astype(np.int64)).tolist()
        return counts

    def over_births(self, combine: np.ufunc, found: np.ndarray[Any, Any]) -> Ids:
        """Combine what was found for every id into one number per birth."""
        last = found[:1]  # a bound may stand at the end, of which numpy wants an element
        return np.asarray(combine.reduceat(np.concatenate([found, last]), self._bounds)[::2])

    @cached_property
    def _bounds(self) -> Ids:
        """Where each birth begins and ends."""
        return np.array([(b.start, b.start + b.size) for b in self.births], np.int64).ravel()

    def macs(self, removed: Ids | None = None) -> int:
        """MACs for one element of the batch, after the components in ``removed`` are gone."""
        shapes = self.shapes.shape
        if removed is not None:
            shapes = {**shapes, **self.new_shapes(removed)}
        batch = cost.dynamic_batch(self.model, self.shapes)
        found = cost.macs(self.model, shapes.get)
        return sum(found.values()) // batch


def extents(keep: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """The extents of a kept grid: along each axis, the slices of which something is kept."""
    rank = keep.ndim
    if rank == 1:
        return (int(np.count_nonzero(keep)),)
    return tuple(
        int(keep.any(axis=tuple(a for a in range(rank) if a != axis)).sum()) for axis in range(rank)
    )


@collection_paused()
def analyse(
    model: ir.Model,
    *,
    attention: Attention = "auto",
    free_outputs: Sequence[str] = (),
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> Analysis:
    """Walk a loaded model and solve its ties.

    Args:
        model: A loaded model; known branches are inlined and fused operators spelled out, in place.
        attention: Whether heads go, dimensions of all heads, or heads and, where none can, dims.
        free_outputs: Graph outputs that may lose channels.
        inputs: Shapes for dynamic inputs, by name.

    Raises:
        UserError: ``inputs`` or ``free_outputs`` do not fit the model.
        ModelError: The graph contradicts itself.
    """
    notes = prepare(model)
    shapes = shape_sampling.sample(model, inputs)
    channels, found, by_dims = heads.solve(model, shapes, attention, free_outputs)
    analysis = Analysis(model, shapes, channels, found, inputs or {}, tuple(free_outputs))
    analysis.parameters = list(_parameters(channels))
    analysis.notes, analysis.by_dims = notes, by_dims
    return analysis


def _parameters(channels: Channels) -> Iterator[Parameter]:
    """Every output axis and every vector along channels, once, in the order of the graph."""
    starts = np.array([b.start for b in channels.births])
    ends = starts + np.array([b.size for b in channels.births])
    produced = np.zeros(len(starts), bool)
    if channels.producers:
        ids = np.concatenate([ids.ravel() for _, ids in channels.producers])
        owner = np.searchsorted(starts, ids, side="right") - 1
        produced[owner[ids < ends[owner]]] = True
    for birth, produces in zip(channels.births, produced.tolist(), strict=True):
        if produces or (birth.operand is not None and len(birth.value.shape or ()) == 1):
            yield Parameter(birth.value.name or "?", birth.axis, birth, produces)
