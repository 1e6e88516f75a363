"""Give every name of a model a prefix, so that it can stand beside another one.

Values captured by If and Loop bodies follow by themselves, for onnx-ir holds references; what
does not are names held as text: quantisation annotations and the module scopes of exporters.
"""

from collections.abc import Iterator

import onnx_ir as ir

from onnxslim_kd.access import rename
from onnxslim_kd.passes import modules

_QUANTISATION = "quant_parameter_tensor_names"


def add_prefix(model: ir.Model, prefix: str) -> None:
    """Rename values, initializers, nodes and what refers to them, in place."""
    for graph in model.graphs():
        for value in values_of(graph):
            _rename_value(value, prefix)
        for node in graph:
            if node.name:
                node.name = prefix + node.name
            modules.add_prefix(node, prefix)


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that ``graph`` itself defines: inputs, initializers, outputs of nodes."""
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for node in graph:
        yield from node.outputs


def _rename_value(value: ir.Value, prefix: str) -> None:
    if not value.name:  # an optional output that is left out
        return
    rename(value, prefix + value.name)
    names = value.meta.get(_QUANTISATION)
    if names:
        value.meta[_QUANTISATION] = {key: prefix + name for key, name in names.items()}
