"""Operators on quantised numbers that only ONNX Runtime has, between Dequantize and Quantize.

The runtime makes them of that form itself, and again when it loads the written file; a result may
differ from theirs by one step of its scale, for they round once less.
"""

from collections.abc import Callable

import onnx_ir as ir

from onnxslim_kd.access import constant
from onnxslim_kd.passes.expansion import Expansion, Unsupported

Outputs = list[ir.Value | None]


def _dequantised(e: Expansion, start: int) -> ir.Value:
    """The numbers that an input of codes stands for; scale and zero point come after it."""
    return e.op("DequantizeLinear", e.need(start), e.need(start + 1), e.given(start + 2))


def _quantised(e: Expansion, x: ir.Value, start: int) -> Outputs:
    return [e.op("QuantizeLinear", x, e.need(start), e.given(start + 1))]


def unary(op_type: str) -> Callable[[Expansion], Outputs]:
    """QLinear*(X, scale, zero, Y_scale, Y_zero)."""

    def expand(e: Expansion) -> Outputs:
        e.refuse_attributes(channels_last=0)
        attributes = e.attributes("channels_last", "opset")
        return _quantised(e, e.op(op_type, _dequantised(e, 0), **attributes), 3)

    return expand


def binary(op_type: str) -> Callable[[Expansion], Outputs]:
    """QLinear*(A, scale, zero, B, scale, zero, C_scale, C_zero)."""

    def expand(e: Expansion) -> Outputs:
        return _quantised(e, e.op(op_type, _dequantised(e, 0), _dequantised(e, 3)), 6)

    return expand


def concat(e: Expansion) -> Outputs:
    """QLinearConcat(Y_scale, Y_zero, X, scale, zero, X, scale, zero, ...)."""
    parts = [_dequantised(e, start) for start in range(2, len(e.node.inputs), 3)]
    return _quantised(e, e.op("Concat", *parts, **e.attributes()), 0)


def gemm(e: Expansion) -> Outputs:
    """QGemm(A, scale, zero, B, scale, zero, C, Y_scale, Y_zero); C has the scale of the product."""
    rows = _dequantised(e, 0)
    per_row = e.node.attributes.get_int("transB", 0)
    scale = constant(e.need(4))
    if scale is None:
        raise Unsupported("the scale of its weight is computed")
    axis = {"axis": 0 if per_row else 1} if scale.size > 1 else {}
    weight = e.op("DequantizeLinear", e.need(3), e.need(4), e.given(5), **axis)
    y = e.op("Gemm", rows, weight, _bias(e), **e.attributes())
    return [y] if e.given(7) is None else _quantised(e, y, 7)


def _bias(e: Expansion) -> ir.Value | None:
    bias, scales = e.given(6), [constant(e.need(i)) for i in (1, 4)]
    if bias is None:
        return None
    if scales[0] is None or scales[1] is None:
        raise Unsupported("a scale of its bias is computed")
    alpha = e.node.attributes.get_float("alpha", 1.0)
    if alpha != 1:
        raise Unsupported(f"alpha is {alpha:g}")
    axis = {"axis": 0} if scales[1].size > 1 else {}
    return e.op("DequantizeLinear", bias, e.array(scales[0] * scales[1]), **axis)


def matmul(e: Expansion) -> Outputs:
    """MatMulIntegerToFloat(A, B, A_scale, B_scale, A_zero, B_zero, bias)."""
    scale = e.op("Mul", e.need(2), e.need(3))
    return [_product(e, e.need(0), scale, zeros=(e.given(4), e.given(5)), bias=e.given(6))]


def dynamic_matmul(e: Expansion) -> Outputs:
    """DynamicQuantizeMatMul(A, B, B_scale, B_zero, bias); A is quantised as it comes."""
    codes, scale, zero = e.ops("DynamicQuantizeLinear", 3, e.need(0))
    scale = e.op("Mul", scale, e.need(2))
    return [_product(e, codes, scale, zeros=(zero, e.given(3)), bias=e.given(4))]


def _product(
    e: Expansion,
    codes: ir.Value,
    scale: ir.Value,
    *,
    zeros: tuple[ir.Value | None, ir.Value | None],
    bias: ir.Value | None,
) -> ir.Value:
    whole = e.op("MatMulInteger", codes, e.need(1), *zeros)
    y = e.op("Mul", e.op("Cast", whole, to=ir.DataType.FLOAT), scale)
    return y if bias is None else e.op("Add", y, bias)
