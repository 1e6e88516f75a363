"""Operators that ONNX Runtime does not have, such as those of TensorRT or of one's own library.

Before: ``conv -> boxes -> my.Select -> picked -> Relu -> y``
After:  ``conv -> boxes`` (an output), and ``picked -> Relu -> y`` (picked is an input)

From the same inputs they compute the same. So two models that hold the same ones are compared on
what goes into them, and on what follows from any numbers that might come out. Where the shape of
these is not known, what follows is left out: passes leave it whole.
"""

import onnx_ir as ir

from onnxslim_kd.access import bodies, graphs, symbol
from onnxslim_kd.model import name_of

_KNOWN = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")
"""The domains that ONNX Runtime brings along."""


def foreign(model: ir.Model) -> list[str]:
    """Name the operators of ``model`` that the runtime does not have."""
    nodes = [node for graph in graphs(model) for node in graph]
    return list(dict.fromkeys(f"{n.domain}.{n.op_type}" for n in nodes if n.domain not in _KNOWN))


def take_out(model: ir.Model) -> list[str]:
    """Take such operators out of ``model``, in place; name the outputs that it has instead."""
    graph = model.graph
    symbols = {symbol(v, axis) for v in graph.inputs for axis in range(len(v.shape or ()))}
    gone: list[ir.Node] = []
    lost: set[ir.Value] = set()
    ends: dict[ir.Value, None] = {}
    for node in graph:
        read = _read(node)
        own = any(inner.domain not in _KNOWN for inner in _inside(node))
        if not own and lost.isdisjoint(read):
            continue
        gone.append(node)
        ends |= dict.fromkeys(v for v in read if v not in lost and v.producer() is not None)
        lost |= {out for out in node.outputs if not (own and _can_be_fed(out, symbols))}
    fed = [out for node in gone for out in node.outputs if out not in lost]
    kept = [v for v in graph.outputs if v.producer() not in gone]
    del graph.outputs[:]
    graph.outputs.extend([*kept, *(v for v in ends if v.producer() not in gone and v not in kept)])
    for value in fed:
        stand_in = ir.Value(name=value.name, type=value.type, shape=value.shape)
        value.replace_all_uses_with(stand_in)
        graph.inputs.append(stand_in)
    graph.remove(gone, safe=True)  # which also takes the nodes from the uses of what they read
    for value in [v for v in graph.initializers.values() if not v.uses()]:
        if not value.is_graph_output():
            del graph.initializers[name_of(value)]
    return [name_of(v) for v in graph.outputs[len(kept) :]]


def _inside(node: ir.Node) -> list[ir.Node]:
    return [node, *(inner for body in bodies(node) for inner in body.all_nodes())]


def _read(node: ir.Node) -> dict[ir.Value, None]:
    """What a node reads, and what its bodies read from around it."""
    values = [v for inner in _inside(node) for v in inner.inputs]
    values += [v for body in bodies(node) for v in body.outputs]
    return dict.fromkeys(v for v in values if v is not None and v.graph is node.graph)


def _can_be_fed(value: ir.Value, symbols: set[str]) -> bool:
    """Tell whether numbers for a value can be made up: its sizes follow from the inputs'."""
    if value.shape is None or value.dtype is None or not value.name:
        return False
    sizes = enumerate(value.shape)
    return all(isinstance(dim, int) or symbol(value, axis) in symbols for axis, dim in sizes)
