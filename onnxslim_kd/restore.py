"""Put back what a round trip through graphsurgeon dropped, from the graph as it was before."""

import copy

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import PassError
from onnxslim_kd.model import name_of

Scopes = list[tuple[ir.Graph, ir.Graph]]
"""Enclosing graphs, innermost first: after the pass, and before it."""


def restore(new: ir.Graph, old: ir.Graph, outer: Scopes | None = None) -> None:
    """Put back, in ``new``, what is said in ``old`` about things that are still there."""
    new.doc_string = old.doc_string or new.doc_string
    new.metadata_props.update(old.metadata_props)
    scopes = [(new, old), *(outer or [])]
    _share_captured(new, scopes)
    twins = {name_of(node.outputs[0]): node for node in old if node.outputs}
    twins |= {f"node {node.name}": node for node in old if node.name}
    for node in new:
        by_output = twins.get(name_of(node.outputs[0])) if node.outputs else None
        twin = twins.get(f"node {node.name}", by_output)
        same = twin is not None and node.op_identifier()[:2] == twin.op_identifier()[:2]
        _restore_node(node, twin if same else None, scopes)
    known, found = _values(old), _values(new)  # branches gave back what they had captured
    for name in known.keys() & found.keys():
        _restore_value(found[name], known[name])
    for value in old.initializers.values():
        if value.name not in found and not value.uses() and not value.is_graph_output():
            _add_unused(new, value)
    _reorder(new, list(old.initializers))


def _reorder(graph: ir.Graph, order: list[str]) -> None:
    """Put the weights in their old order, new ones last: graphsurgeon's is that of use."""
    rank = {name: index for index, name in enumerate(order)}
    values = sorted(graph.initializers.values(), key=lambda v: rank.get(name_of(v), len(rank)))
    graph.initializers.clear()
    for value in values:
        graph.initializers.add(value)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the values that belong to ``graph`` itself, by name."""
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    return {value.name: value for value in values if value.name}


def _restore_node(node: ir.Node, twin: ir.Node | None, scopes: Scopes) -> None:
    if twin is not None:
        node.doc_string = twin.doc_string
        node.metadata_props.update(twin.metadata_props)
        node.meta.update(twin.meta)
        for name, attribute in twin.attributes.items():
            if attribute.type in DROPPED and name not in node.attributes:
                node.attributes[name] = attribute
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            before = twin.attributes.get(name) if twin is not None else None
            old = before.as_graph() if before is not None else ir.Graph((), (), nodes=())
            restore(attribute.as_graph(), old, scopes)


def _restore_value(new: ir.Value, old: ir.Value) -> None:
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)  # the quantisation annotation, among others
    if new.type == old.type and old.type is not None:
        new.type = copy.deepcopy(old.type)  # with its denotation
    sequence = isinstance(new.type, ir.SequenceType) and new.type == old.type
    if old.shape is not None and (sequence or new.shape == old.shape):
        new.shape = old.shape.copy()  # with the axes' denotations
    if _same_tensor(new.const_value, old.const_value):
        new.const_value = old.const_value


def _add_unused(graph: ir.Graph, old: ir.Value) -> None:
    value = ir.Value(name=old.name, shape=old.shape, type=old.type, const_value=old.const_value)
    graph.register_initializer(value)
    _restore_value(value, old)


def _share_captured(graph: ir.Graph, scopes: Scopes) -> None:
    """Give copies of an enclosing graph's weights back to that graph."""
    for value in list(graph.initializers.values()):
        for outer, before in scopes[1:]:
            name = name_of(value)
            kept = outer.initializers.get(name)
            if kept is None and name not in before.initializers:
                continue
            del graph.initializers[name]
            if kept is None:
                outer.register_initializer(value)
            elif _same_tensor(kept.const_value, value.const_value):
                value.replace_all_uses_with(kept)
            else:
                raise PassError(f"two weights are named {name}; name one of them otherwise")
            break


def _same_tensor(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == ir.DataType.STRING:
        return bool(np.array_equal(a.numpy(), b.numpy()))
    first, second = (np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8) for t in (a, b))
    return bool(np.array_equal(first, second))  # bytes, for NaN is unequal to itself


DROPPED = {
    ir.AttributeType.TYPE_PROTO,
    ir.AttributeType.TYPE_PROTOS,
    ir.AttributeType.TENSORS,
    ir.AttributeType.SPARSE_TENSOR,
    ir.AttributeType.SPARSE_TENSORS,
}
