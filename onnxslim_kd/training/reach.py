"""Which nodes some outputs need, and whether all of them can be lowered."""

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from onnxslim_kd.errors import ModelError


def refuse_unknown(nodes: Collection[ir.Node], known: Collection[str]) -> None:
    """Name all operators that cannot be lowered, at once.

    Raises:
        ModelError: There are some.
    """
    missing: dict[str, list[str]] = {}
    for node in nodes:
        op = node.op_type if not node.domain else f"{node.domain}.{node.op_type}"
        if op not in known:
            missing.setdefault(op, []).append(node.name or "?")
    if missing:
        listed = "; ".join(
            f"{op} ({len(names)} nodes, first {names[0]})"
            if len(names) > 1
            else f"{op} ({names[0]})"
            for op, names in sorted(missing.items())
        )
        raise ModelError(f"operators that cannot be trained: {listed}; freeze or replace that part")


def needed_nodes(outputs: Sequence[ir.Value]) -> set[ir.Node]:
    """Return the nodes that ``outputs`` need, those inside of subgraphs included."""
    found: set[ir.Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop().producer()
        if node is None or node in found:
            continue
        for inner in (node, *_inner_nodes(node)):
            found.add(inner)
            todo.extend(value for value in inner.inputs if value is not None)
        for graph in _subgraphs(node):
            todo.extend(graph.outputs)
    return found


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    for graph in _subgraphs(node):
        for inner in graph:
            yield inner
            yield from _inner_nodes(inner)
