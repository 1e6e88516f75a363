"""Which initializers are weights, and which are constants of arithmetic.

Only the use decides: a float initializer in a weight position (`POSITIONS`), reached directly or
through operators that only carry it (`CARRIERS`), is a weight. Added or multiplied tensors are
weights where they look like biases, scales or position embeddings, not where they look like masks,
tables or the mean and deviation of the input's normalisation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxslim_kd.model import name_of, new_initializer

Judge: TypeAlias = Callable[["Use"], "Role"]
LARGE = 1e4
"""A tensor with numbers beyond this, added to activations, is a mask."""


@dataclass(frozen=True)
class Role:
    """What an initializer is to one of its uses."""

    reason: str
    trains: bool = False


@dataclass(frozen=True)
class Use:
    """An initializer at an input of a node, maybe through carriers."""

    weight: ir.Value
    node: ir.Node
    index: int

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The initializer's numbers."""
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy()

    @property
    def wide(self) -> list[int]:
        """The dimensions that are not 1."""
        return [d for d in self.array.shape if d != 1]


def trainable_parameters(model: ir.Model) -> dict[str, str]:
    """Return the initializers that are weights, each with the reason."""
    return {name: role.reason for name, role in roles_of(model).items() if role.trains}


def roles_of(model: ir.Model) -> dict[str, Role]:
    """Return what every initializer is: a weight or a constant, and why."""
    return {
        name: _role(value)
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def _role(value: ir.Value) -> Role:
    assert value.const_value is not None
    if not value.const_value.dtype.is_floating_point():
        return Role(f"{value.const_value.dtype.name} constant")
    if value.const_value.dtype.bitwidth < 16:
        return Role(f"{value.const_value.dtype.name} weight: too narrow to train")
    roles = [_judge(Use(value, node, index)) for node, index in _uses(value)]
    if not roles:
        return Role("not used")
    return next((role for role in roles if role.trains), roles[0])


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield where ``value`` is used, looking through carriers."""
    for node, index in value.uses():
        if (node.op_type in CARRIERS and index == 0) or _joins_weights(node):
            yield from _uses(node.outputs[0])
        else:
            yield node, index


def _joins_weights(node: ir.Node) -> bool:
    """Tell whether ``node`` puts weights together, as recurrent ones are on export."""
    return node.op_type == "Concat" and all(
        value is not None and (value.const_value is not None or _carried(value))
        for value in node.inputs
    )


def _carried(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.op_type not in CARRIERS or node.inputs[0] is None:
        return False
    return node.inputs[0].const_value is not None or _carried(node.inputs[0])


def _judge(use: Use) -> Role:
    op = use.node.op_type
    if use.index in POSITIONS.get(op, {}):
        return _weight(use, POSITIONS[op][use.index])
    if op in JUDGES:
        return JUDGES[op](use)
    return _constant(use, "constant")


def _weight(use: Use, what: str) -> Role:
    return Role(f"{what} of {use.node.op_type} {use.node.name}", trains=True)


def _constant(use: Use, what: str) -> Role:
    return Role(f"{what} of {use.node.op_type} {use.node.name}")


def _added(use: Use) -> Role:
    if not use.wide:
        return _constant(use, "scalar")
    if len(use.wide) == 1 and _on_input(use):
        return _constant(use, "normalisation of a graph input")
    if not np.isfinite(use.array).all() or np.abs(use.array).max() >= LARGE:
        return _constant(use, "mask")
    if len(use.wide) > 1 and use.array.any() and len(np.unique(use.array)) <= 2:
        return _constant(use, "mask")
    return _weight(use, "bias")


def _multiplied(use: Use) -> Role:
    if not use.wide:
        return _constant(use, "scalar")
    if _on_input(use):
        return _constant(use, "normalisation of a graph input")
    if len(use.wide) > 1:
        return _constant(use, "table")
    return _weight(use, "scale")


def _concatenated(use: Use) -> Role:
    return _weight(use, "token") if use.wide and use.array.any() else _constant(use, "padding")


def _matrix(use: Use) -> Role:
    return _weight(use, "weight") if use.array.ndim > 1 else _constant(use, "vector")


def _on_input(use: Use) -> bool:
    """Tell whether the other operand is a graph input on which no weight worked yet."""
    todo = [v for i, v in enumerate(use.node.inputs) if i != use.index and v is not None]
    while todo:
        value = todo.pop()
        node = value.producer()
        if value.is_graph_input():
            return True
        if node is not None and node.op_type in PREPARING:
            todo.extend(v for v in node.inputs if v is not None)
    return False


def statistics_of(model: ir.Model) -> set[str]:
    """Return the names of the running means and variances of BatchNormalization."""
    return {
        name_of(value)
        for node in model.graph.all_nodes()
        if node.op_type == "BatchNormalization"
        for value in node.inputs[3:5]
        if value is not None and value.const_value is not None
    }


def untie(model: ir.Model) -> list[str]:
    """Give every layer its own biases, scales and running statistics; return the new names.

    Exporters store equal vectors once, so that all layers of a fresh network share one bias: they
    would train as one. Matrices that are shared (an embedding and its head) stay shared, and so do
    the biases of layers that share their matrix.
    """
    statistics = statistics_of(model)
    made = []
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            tensor, uses = value.const_value, value.uses()
            if tensor is None or len(uses) < 2 or len(tensor.shape) != 1:
                continue
            if name not in statistics and not _role(value).trains:
                continue
            owners: dict[ir.Value | ir.Node, ir.Value] = {}
            for node, index in uses:
                layer = _matrix_of(node) or node
                if layer not in owners:
                    fresh = new_initializer(graph, name, tensor.numpy()) if owners else value
                    owners[layer] = fresh
                    made += [name_of(fresh)] if fresh is not value else []
                node.replace_input_with(index, owners[layer])
    return made


def _matrix_of(node: ir.Node) -> ir.Value | None:
    """Return the matrix or kernel among the node's inputs."""
    held = (v for v in node.inputs if v is not None and v.const_value is not None)
    return next((v for v in held if len(v.const_value.shape) > 1), None)  # type: ignore[union-attr]


_WEIGHT_BIAS = {1: "weight", 2: "bias"}
_SCALE_BIAS = {1: "scale", 2: "bias"}
_RECURRENT = {1: "input weight", 2: "recurrent weight", 3: "bias"}
POSITIONS: dict[str, dict[int, str]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv"), _WEIGHT_BIAS),
    "Gemm": {0: "weight", 1: "weight", 2: "bias"},
    **dict.fromkeys(
        (
            "BatchNormalization",
            "GroupNormalization",
            "InstanceNormalization",
            "LayerNormalization",
            "RMSNormalization",
        ),
        _SCALE_BIAS,
    ),
    "PRelu": {1: "slope"},
    "Gather": {0: "embedding"},
    **dict.fromkeys(("RNN", "GRU"), _RECURRENT),
    "LSTM": {**_RECURRENT, 7: "peephole weight"},
}
JUDGES: dict[str, Judge] = {
    **dict.fromkeys(("Add", "Sum"), _added),
    "Mul": _multiplied,
    "Concat": _concatenated,
    **dict.fromkeys(("MatMul", "Einsum"), _matrix),
}
CARRIERS = frozenset(
    ("Cast", "CastLike", "DequantizeLinear", "Expand", "Flatten", "Identity", "QuantizeLinear")
) | frozenset(("Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"))
"""Operators whose first input keeps its meaning (Split: through its first output)."""
PREPARING = frozenset(
    ("Add", "Cast", "Div", "Identity", "Mul", "Pad", "Reshape", "Resize", "Sub", "Transpose")
)
"""Operators that prepare an input for the first layer."""
