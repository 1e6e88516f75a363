"""Rules for operators of ``com.microsoft`` that stay: they have kernels, but no standard form.

They are what ONNX Runtime GenAI and Olive write for language models.
"""

import numpy as np
import onnx_ir as ir

from onnxslim_kd import contrib
from onnxslim_kd.passes.channels import Block, Channels, Ids, Operand, Unsupported

_AXES = ("gather_axis", "quantize_axis")
_CODES, _SCALES, _ZEROS, _ORDER, _BIAS = 1, 2, 3, 4, 5
_KEYS, _VALUES, _MASK, _SINK, _SCORES = 1, 2, 10, 11, 3


def matmul_nbits(t: Channels, node: ir.Node) -> None:
    """MatMulNBits: rows go one by one, columns in the blocks that share a scale."""
    x, codes, scales = t.need(0), t.need(_CODES), t.need(_SCALES)
    if t.operand(_ORDER) is not None:
        raise Unsupported("its columns are in another order (g_idx)")
    if not (codes.constant and scales.constant):
        raise Unsupported("its weight is computed")
    if scales.shape != codes.shape[:2]:
        raise Unsupported(f"scales of shape {list(scales.shape)}")
    t.freeze([b for b in codes.layout if b.axes == (2,)], "bytes of one block")
    rows, blocks = t.ids(codes, 0), t.ids(codes, 1)
    for axis, ids in enumerate((rows, blocks)):
        if ids is not None:
            t.same(ids, t.ids(scales, axis), "its scale must stay")
    _tie_zeros(t, rows, blocks)
    _tie_columns(t, node, x, blocks)
    bias = t.operand(_BIAS)
    if bias is not None and rows is not None:
        t.same(rows, t.ids(bias, 0), f"{bias.name} is added")
    t.produce(rows)
    rank = len(x.shape)
    out = [] if rows is None else [Block((rank - 1,), rows)]
    t.set(0, [*(b for b in x.layout if rank - 1 not in b.axes), *out])


def gather_block_quantized(t: Channels, node: ir.Node) -> None:
    """GatherBlockQuantized: an embedding whose columns go in the blocks that share a scale."""
    table, picked, scales = t.need(0), t.need(1), t.need(2)
    axes = [node.attributes.get_int(name, i) for i, name in enumerate(_AXES)]
    if len(table.shape) != 2 or axes != [0, 1] or t.operand(_ZEROS) is not None:
        raise Unsupported("a table of another form, or with zero points")
    t.freeze([b for b in (*table.layout, *scales.layout) if 0 in b.axes], "rows are picked")
    t.freeze(picked.layout, "it picks rows")
    codes, blocks = t.ids(table, 1), t.ids(scales, 1)
    blocks = t.same(None if codes is None else codes.reshape(scales.shape[1], -1)[:, 0], blocks, "")
    if codes is None or blocks is None:
        return
    t.tie(codes.reshape(len(blocks), -1), blocks[:, None])
    t.produce(blocks)
    width = t.out_shape()[-1] // len(blocks)
    t.set(0, [Block((len(picked.shape),), np.repeat(blocks, width))])


def _tie_zeros(t: Channels, rows: Ids | None, blocks: Ids | None) -> None:
    """Zero points: one for each block, or several in a byte, which then go together."""
    zeros = t.operand(_ZEROS)
    if zeros is None:
        return
    if not zeros.constant or len(zeros.shape) != 2:
        raise Unsupported(f"zero points of shape {list(zeros.shape)}")
    if rows is not None:
        t.same(rows, t.ids(zeros, 0), "its zero points must stay")
    if blocks is None:
        return
    bytes_, in_each = t.ids(zeros, 1), -(-len(blocks) // zeros.shape[1])
    if bytes_ is None:
        t.freeze([Block((0,), blocks)], "their zero points share a byte")
    else:
        t.tie(blocks, bytes_[np.arange(len(blocks)) // in_each])


def _tie_columns(t: Channels, node: ir.Node, x: Operand, blocks: Ids | None) -> None:
    ids, size = t.ids(x, -1), node.attributes.get_int("block_size", 32)
    if blocks is None:
        reason = f"one block of {x.shape[-1]} weights shares a scale"
        t.freeze([] if ids is None else [Block((0,), ids)], reason)
    elif ids is None:
        t.freeze([Block((0,), blocks)], f"{x.name} has no channels to remove")
    else:
        t.tie(ids, blocks[np.arange(len(ids)) // size])
    t.consume((0, len(x.shape) - 1), (_SCALES, 1))


def group_query_attention(t: Channels, node: ir.Node) -> None:
    """GroupQueryAttention: of the queries that share a key, the same ones go for every key.

    Keys and values stay: they are in the caches, whose sizes the caller knows.
    """
    x = t.need(0)
    _refuse(t, node)
    n, groups = (node.attributes.get_int(name, 1) for name in ("num_heads", "kv_num_heads"))
    width = contrib.head_size(node, x.shape)
    for index in (_KEYS, _VALUES):
        if (kept := t.operand(index)) is not None:
            t.freeze(kept.layout, "keys and values are kept in a cache")
    for value in node.inputs[2:]:  # angles, scales, norms of a head
        if value is not None and value.is_initializer():
            t.keep_whole(value, "is the same for every head")
    t.freeze([b for b in x.layout if 2 not in b.axes], "attention computes over it")
    ids = t.ids(x, 2)
    if ids is None:
        return
    grid = ids.reshape(-1, width)
    t.freeze([Block((0,), grid[n:])], "keys and values are kept in a cache")
    t.tie(grid[:, 1:], grid[:, :1])
    heads = grid[:n, 0].reshape(groups, n // groups)
    if n == groups:
        t.freeze([Block((0,), heads)], "every head has a key and a value of its own in a cache")
    t.tie(heads[1:], heads[:1])
    t.set(0, [Block((2,), np.repeat(heads.ravel(), width))])


def _refuse(t: Channels, node: ir.Node) -> None:
    mask = t.operand(_MASK)
    if mask is not None and mask.shape[1] > 1:
        raise Unsupported(f"{mask.name} is added to the scores of each head")
    if t.operand(_SINK) is not None:
        raise Unsupported("a sink for each head (head_sink) is given")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[_SCORES:]):
        raise Unsupported("its scores are an output")
