"""Compute once what depends on constants alone.

ONNX Runtime computes it, in one session of nothing else. A number of at most `SMALL` bytes is
always written out. Larger ones are where that makes the file no larger: they replace the nodes that
computed them, and weights that nothing else reads. One of small whole numbers, as attention masks
are, is held as int8 with a Cast behind it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import graphs
from onnxslim_kd.model import SMALL, name_of, new_initializer
from onnxslim_kd.runtime import Array, Session

LARGEST = 64 * 2**20
"""Bytes from which a number is not computed: it could not replace anything of that size."""


def fold_constants(model: ir.Model) -> int:
    """Replace what depends on constants alone by its numbers; return how many nodes went."""
    nodes = list(_constant_nodes(model))
    if not nodes:
        return 0
    folded = set(nodes)
    folded -= {node for node in nodes if _unpacks(node, folded)}
    if not folded:
        return 0
    numbers = _computed(nodes, model)
    while grown := _grown(folded, numbers):
        folded -= grown
        folded -= {node for node in folded if _unpacks(node, folded)}
    for node in reversed(nodes):
        if node in folded:
            _replace(node, folded, numbers)
    return len(folded)


def is_constant(value: ir.Value) -> bool:
    """Tell whether ``value`` is an initializer that no caller can change."""
    return value.const_value is not None and not value.is_graph_input()


def _constant_nodes(model: ir.Model) -> Iterator[ir.Node]:
    known: set[ir.Value] = set()
    for graph in graphs(model):  # outer graphs first
        for node in graph:
            given = [value for value in node.inputs if value is not None]
            if (
                given
                and all(value in known or is_constant(value) for value in given)
                and _can_compute(node)
            ):
                known.update(node.outputs)
                yield node


def _can_compute(node: ir.Node) -> bool:
    return (
        not node.domain
        and node.op_type not in _LEFT
        and not any(attribute.type in _BODIES for attribute in node.attributes.values())
        and not any(value.is_graph_output() or not _is_plain(value) for value in node.outputs)
        and all(value is None or _is_plain(value) for value in node.inputs)
    )


def _unpacks(node: ir.Node, folded: set[ir.Node]) -> bool:
    """Tell whether ``node`` is what stands behind a packed number already."""
    source = node.inputs[0]
    if node.op_type != "Cast" or source is None or source.const_value is None:
        return False
    users = node.outputs[0].consumers()
    return source.dtype == ir.DataType.INT8 and not folded.issuperset(users)


def _is_plain(value: ir.Value) -> bool:
    """Tell whether numpy can hold it, and memory."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    dtype = value.dtype
    if dtype is not None and (dtype == ir.DataType.STRING or dtype.numpy().isbuiltin != 1):
        return False
    sizes = [] if value.shape is None else [d for d in value.shape if isinstance(d, int)]
    return value.const_value is not None or np.prod(sizes, dtype=float) < LARGEST


def _computed(nodes: Sequence[ir.Node], model: ir.Model) -> dict[ir.Value, Array]:
    """Run ``nodes``, which may stand in several graphs, as a model of their own."""
    held: dict[ir.Value, ir.Value] = {}
    copies = []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in held:
                assert value.const_value is not None
                name = f"constant_{len(held)}"
                held[value] = ir.Value(name=name, const_value=value.const_value)
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else held[value] for value in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
        )
        for value, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"constant_{len(held)}" if value.name else ""
            held[value] = new
        copies.append(copy)
    wanted = {value: held[value] for node in nodes for value in node.outputs if value.name}
    graph = ir.Graph(
        [],
        list(wanted.values()),
        nodes=copies,
        initializers=[value for value in held.values() if value.const_value is not None],
        opset_imports=model.graph.opset_imports,
        name="constants",
    )
    session = Session(ir.Model(graph, ir_version=model.ir_version), optimise=False, spin=False)
    found = session.run({})
    return {value: found[name_of(new)] for value, new in wanted.items()}


# ------------------------------------------------------------------ what is worth it


def _grown(folded: set[ir.Node], numbers: Mapping[ir.Value, Array]) -> set[ir.Node]:
    """The nodes that make the large constants for which what all others save is not enough."""
    if all(array.nbytes <= SMALL for array in numbers.values()):
        return set()
    grown: set[ir.Node] = set()
    balance = 0
    for growth, large in sorted(_costs(folded, numbers), key=lambda cost: cost[0]):
        if large and balance + growth > 0:
            grown |= large
        else:
            balance += growth
    return grown


def _costs(
    folded: set[ir.Node], numbers: Mapping[ir.Value, Array]
) -> Iterator[tuple[int, set[ir.Node]]]:
    """By how many bytes each part would grow, and the nodes that make large constants of it."""
    for part in _parts(folded):
        needed = {v: _stored(numbers[v]).nbytes for v in _read_outside(part, folded)}
        makers = (value.producer() for value, size in needed.items() if size > SMALL)
        yield sum(needed.values()) - _freed(part), {node for node in makers if node is not None}


def _parts(nodes: set[ir.Node]) -> Iterator[set[ir.Node]]:
    """Nodes that are connected with each other."""
    left = set(nodes)
    while left:
        part, waiting = set[ir.Node](), [left.pop()]
        while waiting:
            node = waiting.pop()
            part.add(node)
            near = {*node.predecessors(), *node.successors()} & left
            left -= near
            waiting.extend(near)
        yield part


def _read_outside(part: Iterable[ir.Node], folded: set[ir.Node]) -> list[ir.Value]:
    return [
        value
        for node in part
        for value in node.outputs
        if any(user not in folded for user in value.consumers())
    ]


def _freed(part: set[ir.Node]) -> int:
    """Bytes of the nodes' messages, and of the weights that they alone read."""
    weights = {
        value
        for node in part
        for value in node.inputs
        if value is not None and is_constant(value) and part.issuperset(value.consumers())
    }
    messages = sum(ir.serde.serialize_node(node).ByteSize() for node in part)
    return messages + sum(v.const_value.nbytes for v in weights if v.const_value is not None)


def _stored(array: Array) -> Array:
    """The array as it is held: in int8 where that is exact and saves much."""
    if array.dtype.kind != "f" or array.nbytes <= SMALL:
        return array
    with np.errstate(invalid="ignore"):
        small = array.astype(np.int8)
    same = np.array_equal(small, array) and not np.signbit(array[array == 0]).any()
    return small if same else array


def _replace(node: ir.Node, folded: set[ir.Node], numbers: Mapping[ir.Value, Array]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for value in node.outputs:
        if not value.consumers():
            continue
        array = numbers[value]
        held = _stored(array)
        name = name_of(value)
        if held is array:
            new = new_initializer(graph, name, array)
        else:
            packed = new_initializer(graph, f"{name}.packed", held)
            kind = ir.DataType.from_numpy(array.dtype)
            cast = ir.node("Cast", [packed], {"to": kind}, name=f"{node.name}.unpacked")
            new = cast.outputs[0]
            new.name, new.shape, new.type = name, ir.Shape(array.shape), ir.TensorType(kind)
            graph.insert_before(node, cast)
        value.replace_all_uses_with(new)
    given = [value for value in node.inputs if value is not None and is_constant(value)]
    graph.remove(node, safe=True)
    for value in given:
        _drop(value)


def _drop(weight: ir.Value) -> None:
    """Remove a weight that nothing reads any more."""
    graph = weight.graph
    if isinstance(graph, ir.Graph) and not weight.uses() and not weight.is_graph_output():
        graph.initializers.pop(name_of(weight), None)


_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_LEFT = (
    "Bernoulli",
    "DequantizeLinear",
    "Multinomial",
    "QuantizeLinear",
    "RandomNormalLike",
    "RandomUniformLike",
)
"""Operators that give other numbers in each run, and those that keep weights small."""
