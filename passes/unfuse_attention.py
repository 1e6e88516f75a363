"""Attention as ONNX Runtime fuses it, in standard operators: heads are an axis of their own."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import constant, dims, has_rank
from onnxslim_kd.passes.expansion import Expansion, Unsupported, rank_of, width_of

Outputs = list[ir.Value | None]
_FILTER = -10000.0
"""What a masked score gets, where the node does not say."""


def attention(e: Expansion) -> Outputs:
    """Attention: one packed layer makes queries, keys and values of the same input."""
    e.refuse_inputs(6)
    e.refuse_attributes(do_rotary=0, past_present_share_buffer=0)
    packed = e.op("MatMul", e.need(0), e.need(1))
    bias = e.given(2)
    if bias is not None:
        packed = e.op("Add", packed, bias)
    widths = e.node.attributes.get_ints("qkv_hidden_sizes") or [width_of(e.need(1)) // 3] * 3
    heads = e.node.attributes.get_int("num_heads", 1)
    parts = e.ops("Split", 3, packed, list(widths), axis=2)
    q, k, v = (_split(e, part, heads) for part in parts)
    past = e.given(4)
    if past is not None:
        k, v = (_behind(e, e.pick(past, i), new) for i, new in enumerate((k, v)))
    scores = _scores(e, q, k, widths[0] // heads)
    scores = _masked(e, scores, k, mask=e.given(3), bias=e.given(5))
    mixed = _mixed(e, scores, v)
    if not e.wanted(1):
        return [mixed]
    return [mixed, e.op("Concat", *(e.op("Unsqueeze", x, [0]) for x in (k, v)), axis=0)]


def multi_head_attention(e: Expansion) -> Outputs:
    """MultiHeadAttention: queries, keys and values come in, each of its own layer."""
    e.refuse_inputs(8, 9)
    e.refuse_outputs(3)
    if rank_of(e.need(0)) != 3 or e.given(1) is None or e.given(2) is None:
        raise Unsupported("queries, keys and values are packed into one")
    if rank_of(e.need(1)) == 5:
        raise Unsupported("keys and values are packed into one")
    heads = e.node.attributes.get_int("num_heads", 1)
    width = width_of(e.need(0))
    q, k, v = (
        _split(e, value, heads) if rank_of(value) == 3 else value for value in _with_biases(e)
    )
    k, v = _behind(e, e.given(6), k), _behind(e, e.given(7), v)
    scores = _masked(e, _scores(e, q, k, width // heads), k, mask=e.given(4), bias=e.given(5))
    return [_mixed(e, scores, v), k, v]


def _with_biases(e: Expansion) -> list[ir.Value]:
    """Queries, keys and values, each with its part of the bias."""
    values = [e.need(i) for i in range(3)]
    bias = e.given(3)
    if bias is None:
        return values
    array = constant(bias)
    if array is None:
        raise Unsupported("its bias is computed")
    width = width_of(values[0])
    parts = np.split(array, [width, 2 * width])
    return [
        e.op("Add", value, e.array(part, f"{bias.name}.{which}")) if part.any() else value
        for value, part, which in zip(values, parts, "qkv", strict=True)
    ]


def _behind(e: Expansion, past: ir.Value | None, new: ir.Value) -> ir.Value:
    return new if past is None else e.op("Concat", past, new, axis=2)


def _split(e: Expansion, x: ir.Value, heads: int) -> ir.Value:
    """(batch, tokens, heads * dims) to (batch, heads, tokens, dims)."""
    return e.op("Transpose", e.op("Reshape", x, [0, 0, heads, -1]), perm=[0, 2, 1, 3])


def _scores(e: Expansion, q: ir.Value, k: ir.Value, width: int) -> ir.Value:
    scale = e.node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(width)
    scores = e.op("MatMul", q, e.op("Transpose", k, perm=[0, 1, 3, 2]))
    return e.op("Mul", scores, scale)


def _mixed(e: Expansion, scores: ir.Value, v: ir.Value) -> ir.Value:
    """Values weighted by the softmax of scores, heads side by side again."""
    mixed = e.op("MatMul", e.op("Softmax", scores, axis=-1), v)
    return e.op("Reshape", e.op("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, -1])


# ------------------------------------------------------------------------------- masks


def _masked(
    e: Expansion, scores: ir.Value, k: ir.Value, *, mask: ir.Value | None, bias: ir.Value | None
) -> ir.Value:
    if bias is not None:
        scores = e.op("Add", scores, bias)
    if mask is not None:
        penalty = e.node.attributes.get_float("mask_filter_value", _FILTER)
        scores = e.op("Add", scores, _penalties(e, _allowed(e, mask, k), scores, penalty))
    if e.node.attributes.get_int("unidirectional", 0):
        lowest = float(np.finfo(_numpy(scores)).min)
        scores = e.op("Where", _causal(e, scores), scores, _number(e, scores, lowest))
    return scores


def _penalties(e: Expansion, allowed: ir.Value, scores: ir.Value, penalty: float) -> ir.Value:
    return e.op("Where", allowed, _number(e, scores, 0.0), _number(e, scores, penalty))


def _number(e: Expansion, like: ir.Value, number: float) -> ir.Value:
    return e.array(np.array(number, _numpy(like)))


def _numpy(value: ir.Value) -> np.dtype[Any]:
    if value.dtype is None:
        raise Unsupported(f"the type of {value.name} is not known")
    return value.dtype.numpy()


def _allowed(e: Expansion, mask: ir.Value, k: ir.Value) -> ir.Value:
    """Which keys may be looked at, as (batch, 1, queries or 1, keys)."""
    rank = rank_of(mask)
    if rank == 1:
        return _shorter(e, mask, k)
    if rank > 3:
        raise Unsupported(f"a mask of {rank} axes")
    allowed = e.op("Greater", mask, e.array(np.array(0, _numpy(mask))))
    return e.op("Unsqueeze", allowed, [1, 2] if rank == 2 else [1])


def _shorter(e: Expansion, lengths: ir.Value, k: ir.Value) -> ir.Value:
    """Keys before the end of each text; a vector may also hold starts and ends, for all texts."""
    source = lengths.producer()
    counts = source is not None and source.op_type in ("ReduceSum", "Cast")
    alike = has_rank(k) and dims(lengths)[0] is not None and dims(lengths)[0] == dims(k)[0]
    if not counts and not alike:
        raise Unsupported("a mask of one axis that may hold other things than lengths")
    places = _count_to(e, e.op("Shape", k, start=2, end=3))
    ends = e.op("Unsqueeze", e.op("Cast", lengths, to=ir.DataType.INT64), [1, 2, 3])
    return e.op("Less", places, ends)


def _causal(e: Expansion, scores: ir.Value) -> ir.Value:
    """Keys that are no later than the query, the last of both at the same time."""
    queries, keys = (e.op("Shape", scores, start=i, end=i + 1) for i in (2, 3))
    now = e.op("Add", _count_to(e, queries), e.op("Sub", keys, queries))
    return e.op("LessOrEqual", _count_to(e, keys), e.op("Unsqueeze", now, [1]))


def _count_to(e: Expansion, end: ir.Value) -> ir.Value:
    """0, 1, ... up to a number in a vector of one."""
    zero, one = e.array(np.array(0, np.int64)), e.array(np.array(1, np.int64))
    return e.op("Range", zero, e.op("Squeeze", end), one)


# ---------------------------------------------------------------------------- rotation


def rotary_embedding(e: Expansion) -> Outputs:
    """RotaryEmbedding: the halves of each head are turned by an angle for each position."""
    e.refuse_attributes(interleaved=0, rotary_embedding_dim=0, is_packed_batching=0)
    x, positions = e.need(0), e.need(1)
    if rank_of(positions) != 2:
        raise Unsupported("positions are given by where they start")
    half = width_of(e.need(2))
    flat = rank_of(x) == 3
    split = _split(e, x, width_of(x) // (2 * half)) if flat else x
    cos, sin = (e.op("Unsqueeze", e.op("Gather", e.need(i), positions), [1]) for i in (2, 3))
    a, b = e.ops("Split", 2, split, [half, half], axis=-1)
    left = e.op("Sub", e.op("Mul", a, cos), e.op("Mul", b, sin))
    right = e.op("Add", e.op("Mul", b, cos), e.op("Mul", a, sin))
    turned = e.op("Concat", left, right, axis=-1)
    if not flat:
        return [turned]
    return [e.op("Reshape", e.op("Transpose", turned, perm=[0, 2, 1, 3]), [0, 0, -1])]
