"""What is in a graph, without Optionals: shapes, names, constants; the one place that narrows."""

import copy
from collections.abc import Container
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import ModelError


def graphs(model: ir.Model) -> list[ir.Graph]:
    """Return the main graph and every body inside of it, and those of functions."""
    if model.functions:
        return list(model.graphs())
    found = [model.graph]
    for graph in found:  # grows while it is walked
        for node in graph:
            found += bodies(node)
    return found


def bodies(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs right inside of ``node``."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.data.values():  # its own views are slow
        kind = attribute.type
        if kind is _GRAPH:
            found.append(attribute.value)
        elif kind is _GRAPHS:
            found.extend(attribute.value)
    return found


def has_rank(value: ir.Value | None) -> bool:
    """Tell whether the rank of ``value`` is known."""
    return value is not None and value.shape is not None


def dims(value: ir.Value | None) -> tuple[int | None, ...]:
    """Return the dimensions of ``value``, None for each one not known or symbolic.

    Raises:
        ModelError: The rank is not known.
    """
    if value is None or value.shape is None:
        name = "a missing input" if value is None else repr(value.name)
        raise ModelError(f"the shape of {name} is not known; give the inputs' shapes")
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def symbol(value: ir.Value, axis: int) -> str:
    """Return the name of a dynamic dimension: equal names are one size. Its own if it has none."""
    dim = None if value.shape is None else value.shape[axis]
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return str(name or f"{value.name}.{axis}")


def extents_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the shape of a tensor; of a message onnx-ir would make a Shape on every look."""
    if type(tensor) is ir.TensorProtoTensor:  # isinstance is slow on a class made from a Protocol
        return tuple(tensor.raw.dims)
    return tuple(tensor.shape.dims)  # type: ignore[arg-type]  # none is a symbol


def bytes_of(tensor: ir.TensorProtocol) -> int:
    """Return the bytes of a tensor."""
    is_message = type(tensor) is ir.TensorProtoTensor
    kind = int(tensor.raw.data_type if is_message else tensor.dtype)
    if kind == _STRING:
        return tensor.nbytes
    return -(-prod(extents_of(tensor)) * bits_of(kind) // 8)


def bits_of(kind: int) -> int:
    """Return the bits of an element, for the number of its type in the format."""
    found = _BITS.get(kind)
    return ir.DataType(kind).bitwidth if found is None else found


_GRAPH, _GRAPHS = ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS
_STRING = int(ir.DataType.STRING)
_BITS = {int(k): k.bitwidth for k in ir.DataType if k not in (ir.DataType.UNDEFINED, _STRING)}
"""To look up a member of an enumeration takes longer than all else about a tensor."""


def name_of(value: ir.Value | None) -> str:
    """Return the name of ``value``; every value of a loaded model has one."""
    assert value is not None and value.name is not None
    return value.name


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the numbers of an initializer, or None when ``value`` is computed or an input."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def new_initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """Add ``array`` to ``graph`` as an initializer with a free name beginning with ``name``."""
    free, extra = name, 0
    while free in graph.initializers:
        extra += 1
        free = f"{name}_{extra}"
    tensor = ir.Tensor(np.require(array, requirements="C"), name=free)
    value = ir.Value(
        name=free, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def is_float(value: ir.Value) -> bool:
    """Tell whether a value is a tensor of floating-point numbers; a sequence of them is not."""
    kind = value.type
    return isinstance(kind, ir.TensorType) and kind.dtype.is_floating_point()


def rename(value: ir.Value, name: str) -> None:
    """Give a value another name; its tensor, which the caller's model may share, stays as it is."""
    tensor = value.const_value
    if isinstance(tensor, ir.TensorProtoTensor):
        value.const_value = ir.TensorProtoTensor(copy.deepcopy(tensor.raw))
    elif tensor is not None:
        value.const_value = copy.copy(tensor)
    value.name = name


def unique(name: str, taken: Container[str | None]) -> str:
    """Return ``name``, numbered where it is taken."""
    free, extra = name, 0
    while free in taken:
        extra += 1
        free = f"{name}_{extra}"
    return free


RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
"""Operators whose outputs are others in each run."""
