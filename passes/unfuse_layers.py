"""Layers, activations and norms that ONNX Runtime fuses, in standard operators."""

import math

import onnx
import onnx_ir as ir

from onnxslim_kd.passes.expansion import Expansion, Unsupported, rank_of

Outputs = list[ir.Value | None]
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def conv(e: Expansion) -> Outputs:
    """FusedConv: ``activation(Conv(X, W, B) + Z)``."""
    layer = e.attributes("activation", "activation_params")
    y = e.op("Conv", e.need(0), e.need(1), e.given(2), **layer)
    added = e.given(3)
    if added is not None:
        y = e.op("Add", y, added)
    numbers = e.node.attributes.get_floats("activation_params") or ()
    return [_activated(e, y, *numbers)]


def gemm(e: Expansion) -> Outputs:
    """FusedGemm: ``activation(Gemm(A, B, C))``."""
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    y = e.op("Gemm", e.need(0), e.need(1), e.given(2), **e.attributes("activation", *names))
    given = e.node.attributes
    return [_activated(e, y, *(given.get_float(name) for name in names if name in given))]


def _activated(e: Expansion, x: ir.Value, *numbers: float) -> ir.Value:
    kind = e.node.attributes.get_string("activation", "")
    if not kind:
        return x
    if kind == "Clip":
        return e.op("Clip", x, *numbers)
    known = onnx.defs.get_schema(kind, e.opset).attributes
    names = [name for name in ("alpha", "beta", "gamma") if name in known]
    return e.op(kind, x, **dict(zip(names, numbers, strict=False)))


def matmul(e: Expansion) -> Outputs:
    """FusedMatMul: ``alpha * MatMul`` of what may be transposed in its last two axes."""
    e.refuse_attributes(transBatchA=0, transBatchB=0)
    sides = []
    for index, name in enumerate(("transA", "transB")):
        x = e.need(index)
        swapped = e.node.attributes.get_int(name, 0) and rank_of(x) > 1
        sides.append(e.op("Transpose", x, perm=_swapped(rank_of(x))) if swapped else x)
    y = e.op("MatMul", *sides)
    alpha = e.node.attributes.get_float("alpha", 1.0)
    return [y if alpha == 1 else e.op("Mul", y, alpha)]


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


# ------------------------------------------------------------------------- activations


def gelu(e: Expansion) -> Outputs:
    """Gelu: ``x / 2 * (1 + erf(x / sqrt(2)))``; BiasGelu adds a bias first."""
    x = _biased(e)
    half = e.op("Mul", x, 0.5)
    error = e.op("Erf", e.op("Div", x, math.sqrt(2)))
    return [e.op("Mul", half, e.op("Add", error, 1.0))]


def fast_gelu(e: Expansion) -> Outputs:
    """FastGelu: ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``."""
    x = _biased(e)
    cubic = e.op("Mul", e.op("Pow", x, 3.0), 0.044715)
    inner = e.op("Tanh", e.op("Mul", e.op("Add", x, cubic), math.sqrt(2 / math.pi)))
    return [e.op("Mul", e.op("Mul", x, 0.5), e.op("Add", inner, 1.0))]


def quick_gelu(e: Expansion) -> Outputs:
    """QuickGelu: ``x * sigmoid(alpha * x)``."""
    x = e.need(0)
    alpha = e.node.attributes.get_float("alpha", 1.702)
    return [e.op("Mul", x, e.op("Sigmoid", e.op("Mul", x, alpha)))]


def _biased(e: Expansion) -> ir.Value:
    bias = e.given(1)
    return e.need(0) if bias is None else e.op("Add", e.need(0), bias)


# ------------------------------------------------------------------------------- norms


def skip_layer_norm(e: Expansion) -> Outputs:
    """SkipLayerNormalization: of the sum of input, skip and bias, which is its fourth output."""
    e.refuse_outputs(1, 2)
    total = _summed(e, 4)
    y = e.op("LayerNormalization", total, e.need(2), e.given(3), **_norm(e, 1e-12))
    return [y, None, None, total]


def skip_rms_norm(e: Expansion) -> Outputs:
    """SkipSimplifiedLayerNormalization: the same, without a mean and a shift."""
    e.refuse_outputs(1, 2)
    total = _summed(e, 3)
    return [_rms_norm(e, total, e.need(2), 1e-12), None, None, total]


def rms_norm(e: Expansion) -> Outputs:
    """SimplifiedLayerNormalization, which the runtime writes into ONNX's own domain."""
    e.refuse_outputs(1)
    e.refuse_attributes(axis=-1)
    return [_rms_norm(e, e.need(0), e.need(1), 1e-5)]


def _summed(e: Expansion, bias: int) -> ir.Value:
    total = e.op("Add", e.need(0), e.need(1))
    shift = e.given(bias)
    return total if shift is None else e.op("Add", total, shift)


def _norm(e: Expansion, epsilon: float) -> dict[str, float | int]:
    return {"axis": -1, "epsilon": e.node.attributes.get_float("epsilon", epsilon)}


def _rms_norm(e: Expansion, x: ir.Value, gamma: ir.Value, epsilon: float) -> ir.Value:
    """``x / sqrt(mean(x^2) + epsilon) * gamma``, in float where x is narrower."""
    narrow = gamma.dtype if gamma.dtype in _HALVES else None
    if narrow is not None:
        x = e.op("Cast", x, to=ir.DataType.FLOAT)
    mean = e.reduce("ReduceMean", e.op("Pow", x, 2.0), -1, keep=True)
    y = e.op("Div", x, e.op("Sqrt", e.op("Add", mean, _norm(e, epsilon)["epsilon"])))
    if narrow is not None:
        y = e.op("Cast", y, to=narrow)
    return e.op("Mul", y, gamma)


def embed_layer_norm(e: Expansion) -> Outputs:
    """EmbedLayerNormalization: the norm of the sum of two or three embeddings."""
    words, segments = e.need(0), e.given(1)
    total = e.op("Add", e.op("Gather", e.need(2), words), _positions(e, words))
    if segments is not None:
        total = e.op("Add", total, e.op("Gather", e.need(4), segments))
    y = e.op("LayerNormalization", total, e.need(5), e.need(6), **_norm(e, 1e-12))
    return [y, _lengths(e, words), total]


def _positions(e: Expansion, words: ir.Value) -> ir.Value:
    table, ids = e.need(3), e.given(8)
    if ids is not None:
        return e.op("Gather", table, ids)
    length = e.op("Shape", words, start=1)
    return e.op("Slice", table, [0], length, [0])


def _lengths(e: Expansion, words: ir.Value) -> ir.Value | None:
    """The number of words of each text, which attention takes instead of a mask."""
    mask = e.given(7)
    used = len(e.node.outputs) > 1 and e.node.outputs[1].uses()
    if not used:
        e.refuse_outputs(1)
        return None
    if mask is None:
        raise Unsupported("its mask_index is used, and no mask is given")
    return e.op("ReduceSum", mask, [1], keepdims=0)
