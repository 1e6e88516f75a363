"""Operators of ``com.microsoft`` that stay as they are: shapes, costs, and weights in 4 or 8 bits.

``MatMulNBits(A, B, scales, zero_points)`` multiplies by a weight of N rows and K columns, which
come in blocks of ``block_size`` columns: ``B`` is [N, blocks, bytes of a block], ``scales`` is
[N, blocks], ``zero_points`` is the same or has several of them in each byte.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import constant, dims, symbol

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
MICROSOFT = "com.microsoft"


def shapes(node: ir.Node, x: Sequence[Shape | None]) -> list[Shape]:
    """Return the shapes of a node's outputs, none where they are not known."""
    rule = SHAPES.get(node.op_type) if node.domain == MICROSOFT else None
    return rule(node, x) if rule is not None and x[0] is not None else []


def kind(node: ir.Node) -> ir.TypeProtocol | None:
    """Return the type of a node's outputs: that of its input, or of the scales of a table."""
    like = node.inputs[2 if node.op_type == "GatherBlockQuantized" else 0]
    return None if like is None else like.type


def fixed(model: ir.Model) -> dict[str, int]:
    """Return the dynamic dimensions of inputs that an operator fixes, by symbol: of caches."""
    found = {}
    for node in model.graph:
        if (node.domain, node.op_type) != (MICROSOFT, "GroupQueryAttention"):
            continue
        query = node.inputs[0]
        width = dims(query)[-1] if query is not None and query.shape is not None else None
        if width is None:
            continue
        heads = node.attributes.get_int("kv_num_heads", 1)
        for cache in node.inputs[3:5]:
            if cache is not None and cache.is_graph_input() and len(cache.shape or ()) == 4:
                for axis, number in ((1, heads), (3, head_size(node, (width,)))):
                    found[symbol(cache, axis)] = number
    return found


def head_size(node: ir.Node, query: Shape) -> int:
    """The width of a head of GroupQueryAttention, whose queries may come with keys and values."""
    heads = node.attributes.get_int("num_heads", 1)
    packed = len(node.inputs) < 2 or node.inputs[1] is None
    return query[-1] // (heads + 2 * node.attributes.get_int("kv_num_heads", 1) * packed)


def _nbits(node: ir.Node, x: Sequence[Shape | None]) -> list[Shape]:
    assert x[0] is not None
    return [(*x[0][:-1], node.attributes.get_int("N", 0))]


def _picked(node: ir.Node, x: Sequence[Shape | None]) -> list[Shape]:
    if x[0] is None or x[1] is None or x[2] is None or len(x[0]) != 2:
        return []
    return [(*x[1], x[2][-1] * node.attributes.get_int("block_size", 128))]


def _grouped_query(node: ir.Node, x: Sequence[Shape | None]) -> list[Shape]:
    assert x[0] is not None
    batch, tokens, _ = x[0]
    width = head_size(node, x[0])
    past = x[3] if len(x) > 3 else None
    length = tokens + (past[2] if past is not None else 0)
    cache = (batch, node.attributes.get_int("kv_num_heads", 1), length, width)
    return [(batch, tokens, node.attributes.get_int("num_heads", 1) * width), cache, cache]


def _nbits_macs(node: ir.Node, x: list[Shape], out: Shape) -> int:
    return prod(out) * x[0][-1]


def _grouped_query_macs(node: ir.Node, x: list[Shape], out: Shape) -> int:
    past = x[3][2] if len(x) > 3 and x[3] else 0
    return 2 * prod(out) * (out[1] + past)


def dequantised(node: ir.Node) -> Array | None:
    """The weight of MatMulNBits as floats, [N, blocks, block_size]; None where it is computed."""
    codes, scales = constant(node.inputs[1]), constant(node.inputs[2])
    if codes is None or scales is None:
        return None
    bits = node.attributes.get_int("bits", 4)
    zeros = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if zeros is None:
        middle: Array | float = float(1 << (bits - 1))
    elif zeros.dtype == np.uint8:
        middle = unpacked(zeros, bits)[:, : codes.shape[1], None].astype(np.float64)
    else:
        middle = zeros.astype(np.float64)[..., None]
    return (unpacked(codes, bits) - middle) * scales.astype(np.float64)[..., None]


def unpacked(codes: Array, bits: int) -> Array:
    """Numbers of fewer bits than a byte, the lowest bits first, one for each element."""
    parts = [(codes >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*codes.shape[:-1], -1)


def as_matrices(model: ir.Model) -> None:
    """Give scales and zero points that come as one long vector a row for each row of the weight."""
    for node in model.graph:
        if (node.domain, node.op_type) != (MICROSOFT, "MatMulNBits"):
            continue
        for value in node.inputs[2:4]:
            array = None if value is None else constant(value)
            if value is not None and array is not None and array.ndim == 1:
                rows = array.reshape(node.attributes.get_int("N", 1), -1)
                value.const_value = ir.Tensor(rows, name=value.name)
                value.shape = ir.Shape(rows.shape)


SHAPES: dict[str, Callable[[ir.Node, Sequence[Shape | None]], list[Shape]]] = {
    "MatMulNBits": _nbits,
    "GatherBlockQuantized": _picked,
    "GroupQueryAttention": _grouped_query,
}
MACS: dict[str, Callable[[ir.Node, list[Shape], Shape], int]] = {
    "MatMulNBits": _nbits_macs,
    "GroupQueryAttention": _grouped_query_macs,
}
