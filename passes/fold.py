"""Fold BatchNormalization, and constant factors and sums, into the layer next to them.

When nothing else sees the value between them, and all parameters are constants::

    1. Conv | ConvTranspose | Gemm (x, W, b) -> BN   becomes  the layer (x, W', b')
    2. MatMul(x, W) [-> Add b] -> BN                 becomes  MatMul(x, W') -> Add b'
    3. BN -> Conv(., W, b) that pads nothing         becomes  Conv(x, W', b')
    4. the layers of 1, or BN -> Mul | Add of a number for each channel: as 1

Exact in real numbers, computed in float64. With padding, rule 3 would be wrong at the border, where
the convolution sees zeros and not what BatchNormalization makes of zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import graphs
from onnxslim_kd.model import constant, dims, has_rank, new_initializer
from onnxslim_kd.runtime import Array


def fold(model: ir.Model) -> int:
    """Fold every BatchNormalization that can be folded exactly; return how many were."""
    folded = 0
    for graph in graphs(model):
        for node in list(graph):
            if node.op_type == "BatchNormalization" and not node.domain:
                folded += _fold_node(node)
    return folded


def fold_scales(model: ir.Model) -> int:
    """Fold every Mul and Add of one constant for each channel; return how many were."""
    folded = 0
    for graph in graphs(model):
        for node in list(graph):
            if node.op_type in ("Add", "Mul") and not node.domain:
                folded += _fold_scale(node)
    return folded


def _fold_scale(node: ir.Node) -> bool:
    for value, other in (node.inputs, reversed(node.inputs)):
        layer = value.producer() if value is not None else None
        if layer is None or layer.op_type not in _WITH_BIAS or not _only_feeds(layer, node):
            continue
        affine = _per_channel(node.op_type, constant(other), layer)
        if affine is not None and _BEHIND[layer.op_type](layer, affine):
            _bypass(node, layer.outputs[0])
            return True
    return False


def _per_channel(operator: str, number: Array | None, layer: ir.Node) -> "_Affine | None":
    """What an Add or Mul of ``number`` does to the channels (axis 1) of a layer's output."""
    weight, output = constant(layer.inputs[1]), layer.outputs[0]
    if number is None or weight is None or not has_rank(output):
        return None
    rank = len(dims(output))
    channels = _WITH_BIAS[layer.op_type](layer, weight)
    shape = (1,) * (rank - number.ndim) + number.shape
    if rank < 2 or number.ndim > rank or number.size != shape[1] or shape[1] not in (1, channels):
        return None
    each = np.broadcast_to(number.reshape(-1).astype(np.float64), channels)
    if operator == "Add":
        return _Affine(np.ones(channels), each)
    return _Affine(each, np.zeros(channels))


def _fold_node(node: ir.Node) -> bool:
    affine = _affine(node)
    if affine is None:
        return False
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is not None and _only_feeds(producer, node):
        behind = _BEHIND.get(producer.op_type)
        if behind is not None and not producer.domain and behind(producer, affine):
            _bypass(node, node.inputs[0])
            return True
    return _fold_forward(node, affine)


@dataclass(frozen=True)
class _Affine:
    """What BatchNormalization does to each channel, in float64."""

    scale: Array
    shift: Array

    @property
    def scales(self) -> bool:
        """Whether it does more than shift, so that weights change."""
        return bool((self.scale != 1).any())


def _affine(node: ir.Node) -> _Affine | None:
    numbers = [constant(value) for value in node.inputs[1:5]]
    if node.attributes.get_int("training_mode", 0) or any(n is None for n in numbers):
        return None
    gamma, beta, mean, variance = (np.asarray(n, np.float64) for n in numbers)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return _Affine(scale, beta - mean * scale)


def _only_feeds(producer: ir.Node, node: ir.Node) -> bool:
    """Whether nothing but ``node`` sees what ``producer`` computes."""
    value = producer.outputs[0]
    return (
        len(producer.outputs) == 1
        and not value.is_graph_output()
        and [user for user, _ in value.uses()] == [node]
        and producer.graph is node.graph
    )


def _bypass(node: ir.Node, value: ir.Value | None) -> None:
    """Remove ``node``; ``value``, one of its inputs, takes the place and name of its output."""
    output = node.outputs[0]
    assert value is not None and node.graph is not None
    name, shape, kind = output.name, output.shape, output.type
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    value.name, value.shape, value.type = name, shape or value.shape, kind or value.type


def _set(node: ir.Node, index: int, array: Array, like: Array) -> None:
    """Give ``node`` a new constant input, a new initializer where the old one serves others."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    while len(node.inputs) <= index:
        node.resize_inputs(len(node.inputs) + 1)
    old = node.inputs[index]
    tensor = np.ascontiguousarray(array.astype(like.dtype))
    if old is None or len(old.uses()) > 1 or old.graph is not graph or old.is_graph_output():
        node.replace_input_with(index, new_initializer(graph, _name(node, index), tensor))
    else:
        old.const_value = ir.Tensor(tensor, name=old.name)
        old.shape = ir.Shape(tensor.shape)


def _name(node: ir.Node, index: int) -> str:
    """A name that no outer graph has: node names are unique in a loaded model."""
    return f"{node.name}.folded_{'weight' if index == 1 else 'bias'}"


def _parameters(node: ir.Node) -> tuple[Array, Array | None] | None:
    """Weight and bias of a layer, or None when one of them is computed."""
    weight = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(given)
    if weight is None or weight.dtype.kind != "f" or (given is not None and bias is None):
        return None
    return weight, bias


def _behind_conv(node: ir.Node, affine: _Affine) -> bool:
    return _behind_layer(node, affine, lambda w: affine.scale.reshape(-1, *[1] * (w.ndim - 1)))


def _behind_transposed(node: ir.Node, affine: _Affine) -> bool:
    """ConvTranspose holds (C_in, C_out / groups, ...): the scales of a group go to its rows."""
    groups = node.attributes.get_int("group", 1)

    def spread(weight: Array) -> Array:
        rows = np.repeat(affine.scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))

    return _behind_layer(node, affine, spread)


def _behind_layer(node: ir.Node, affine: _Affine, spread: Callable[[Array], Array]) -> bool:
    parameters = _parameters(node)
    if parameters is None:
        return False
    weight, bias = parameters
    if affine.scales:
        _set(node, 1, weight * spread(weight), weight)
    if bias is not None or affine.shift.any():
        _set(node, 2, (0.0 if bias is None else bias) * affine.scale + affine.shift, weight)
    return True


def _behind_gemm(node: ir.Node, affine: _Affine) -> bool:
    parameters = _parameters(node)
    if parameters is None:
        return False
    weight, bias = parameters
    if bias is not None and bias.ndim == 2 and bias.shape[0] != 1:
        return False  # a bias for each row
    by_row = node.attributes.get_int("transB", 0)
    beta = node.attributes.get_float("beta", 1.0)
    new = (0.0 if bias is None else beta * bias.astype(np.float64)) * affine.scale + affine.shift
    _set(node, 1, weight * (affine.scale[:, None] if by_row else affine.scale), weight)
    _set(node, 2, new.reshape(-1), weight)
    node.attributes.pop("beta", None)
    return True


def _behind_norm(node: ir.Node, affine: _Affine) -> bool:
    """Scale and bias take it up, whether or not the statistics are constant."""
    parameters = _parameters(node)
    training = node.attributes.get_int("training_mode", 0)
    if parameters is None or parameters[1] is None or training:
        return False
    gamma, beta = parameters[0], parameters[1]
    _set(node, 1, gamma * affine.scale, gamma)
    _set(node, 2, beta * affine.scale + affine.shift, gamma)
    return True


def _behind_matmul(node: ir.Node, affine: _Affine) -> bool:
    weight = _matrix(node)
    graph, after = node.graph, node.outputs[0]
    if weight is None or not isinstance(graph, ir.Graph):
        return False
    _set(node, 1, weight * affine.scale, weight)
    bias = new_initializer(graph, _name(node, 2), affine.shift.astype(weight.dtype))
    users = tuple(after.uses())
    add = ir.node("Add", [after, bias], name=f"{node.name}.bias")
    add.outputs[0].name, add.outputs[0].type = f"{after.name}.biased", after.type
    graph.insert_after(node, add)
    for user, index in users:
        user.replace_input_with(index, add.outputs[0])
    return True


def _behind_matmul_add(add: ir.Node, affine: _Affine) -> bool:
    """``MatMul(x, W) + b`` with a constant b along the last axis."""
    for index, value in enumerate(add.inputs):
        matmul = value.producer() if value is not None else None
        bias = constant(add.inputs[1 - index])
        if matmul is None or bias is None or matmul.op_type != "MatMul":
            continue
        weight = _matrix(matmul) if _only_feeds(matmul, add) else None
        if weight is None or bias.shape not in ((), (1,), weight.shape[1:], (1, weight.shape[1])):
            continue
        _set(matmul, 1, weight * affine.scale, weight)
        _set(add, 1 - index, bias.reshape(-1) * affine.scale + affine.shift, weight)
        return True
    return False


def _matrix(matmul: ir.Node) -> Array | None:
    """The weight of a MatMul whose axis 1 is its last: there BN's channels are the columns."""
    weight = constant(matmul.inputs[1])
    out = matmul.outputs[0]
    if weight is None or weight.ndim != 2 or weight.dtype.kind != "f":
        return None
    return weight if has_rank(out) and len(dims(out)) == 2 else None


def _fold_forward(node: ir.Node, affine: _Affine) -> bool:
    """BN in front of one Conv that pads nothing."""
    output, source = node.outputs[0], node.inputs[0]
    users = tuple(output.uses())
    if len(users) != 1 or output.is_graph_output():
        return False
    conv, index = users[0]
    parameters = _parameters(conv) if index == 0 and conv.op_type == "Conv" else None
    if parameters is None or _pads(conv) or conv.graph is not node.graph:
        return False
    weight, bias = parameters
    groups = conv.attributes.get_int("group", 1)
    rows = weight.shape[0] // groups

    def spread(channels: Array) -> Array:
        wide = np.repeat(channels.reshape(groups, -1), rows, axis=0)
        return wide.reshape(*wide.shape, *[1] * (weight.ndim - 2))

    wide = weight.astype(np.float64)
    shift = (wide * spread(affine.shift)).sum(axis=tuple(range(1, weight.ndim)))
    _set(conv, 1, wide * spread(affine.scale), weight)
    _set(conv, 2, (0.0 if bias is None else bias) + shift, weight)
    conv.replace_input_with(0, source)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


def _pads(conv: ir.Node) -> bool:
    mode = conv.attributes.get_string("auto_pad", "NOTSET")
    return mode not in ("NOTSET", "VALID") or any(conv.attributes.get_ints("pads") or ())


_BEHIND: dict[str, Callable[[ir.Node, _Affine], bool]] = {
    "Conv": _behind_conv,
    "ConvTranspose": _behind_transposed,
    "Gemm": _behind_gemm,
    "MatMul": _behind_matmul,
    "Add": _behind_matmul_add,
    "BatchNormalization": _behind_norm,
}
"""Layers that take up the BatchNormalization behind them."""

_WITH_BIAS: dict[str, Callable[[ir.Node, Array], int]] = {
    "Conv": lambda node, weight: weight.shape[0],
    "ConvTranspose": lambda node, weight: weight.shape[1] * node.attributes.get_int("group", 1),
    "Gemm": lambda node, weight: weight.shape[0 if node.attributes.get_int("transB", 0) else 1],
    "BatchNormalization": lambda node, weight: weight.shape[0],
}
"""Layers with a bias of their own, and how many output channels they have."""
