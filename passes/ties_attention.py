"""Rules for attention as one operator: whole heads go, or dimensions of every head.

Operands are [B, H, T, D], or [B, T, H*D] with the number of heads as an attribute.
"""

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.channels import Block, Channels, Ids, Operand

_ONE_HEAD = "its one head is read by all"


def attention(t: Channels, node: ir.Node) -> None:
    """Attention (opset 23): with grouped queries, a head goes with all that read it."""
    q, k, v = (t.need(i) for i in range(3))
    n_q, n_k = _count(node, q, "q_num_heads"), _count(node, k, "kv_num_heads")
    counts = (n_q, n_k, n_k)
    for index in range(3, len(node.inputs)):
        if (extra := t.operand(index)) is not None:
            t.freeze([b for b in extra.layout if b.axes != (_heads_axis(extra),)], "it is added")
    by_heads = _by_heads(t, n_q)
    if by_heads:
        heads = [_heads(t, x, n) for x, n in zip((q, k, v), counts, strict=True)]
        units = _tie_heads(t, node, heads, n_k)
    else:
        units = [_dims(t, x, n) for x, n in zip((q, k, v), counts, strict=True)]
        units[0] = units[1] = t.same(units[0], units[1], "queries and keys are multiplied along it")
        _keep_whole_caches(t, node, units)
        t.consume((0, -1), (1, -1))
    rank, width = len(q.shape), t.out_shape()[-1]
    t.set(0, _placed(units[0] if by_heads else units[2], rank, (n_q, width), by_heads=by_heads))
    for index, ids in ((1, units[1]), (2, units[2])):  # the new caches
        t.set(index, _placed(ids, 4, (0, 0), by_heads=by_heads))
    if by_heads:  # the products of queries and keys
        t.set(3, _placed(units[0], 4, (0, 0), by_heads=True))


def rotary_embedding(t: Channels, node: ir.Node) -> None:
    """RotaryEmbedding (opset 23): heads pass; of the dims, both of a pair go with their angle."""
    x, cos, sin = (t.need(i) for i in range(3))
    n = _count(node, x, "num_heads")
    by_heads = _by_heads(t, n)
    if by_heads:
        units = _heads(t, x, n)
        for table in (cos, sin):
            t.freeze(table.layout, "angles of every head")
    else:
        units = _dims(t, x, n)
        if node.attributes.get_int("rotary_embedding_dim", 0) and units is not None:
            t.freeze([Block((0,), units)], "a part of every head is rotated")
        elif units is not None:
            pairs = units.reshape(-1, 2).T
            if not node.attributes.get_int("interleaved", 0):
                pairs = units.reshape(2, -1)
            t.tie(pairs[0], pairs[1])
            for table in (cos, sin):
                t.same(pairs[0], t.ids(table, -1), f"meets {table.name}")
    t.set(0, _placed(units, len(x.shape), (n, x.shape[-1]), by_heads=by_heads))


def _by_heads(t: Channels, heads: int) -> bool:
    """Tell whether heads go; where there is one head alone, its dims do."""
    return heads > 1 and t.heads_go()


def _count(node: ir.Node, x: Operand, attribute: str) -> int:
    """The number of heads of an operand."""
    return x.shape[1] if len(x.shape) == 4 else node.attributes.get_int(attribute) or 1


def _heads_axis(x: Operand) -> int:
    """The axis of a mask or cache along which there may be heads."""
    return len(x.shape) - 3


def _heads(t: Channels, x: Operand, count: int) -> Ids | None:
    """The ids of the heads of an operand; None where they must stay."""
    if len(x.shape) == 4:
        t.collapse_all(x, first=True)
        t.freeze([b for b in x.layout if b.axes != (1,)], "attention computes over it")
        return t.ids(x, 1)
    ids = _inner(t, x)
    if ids is None or count == 1:
        t.freeze([] if ids is None else [Block((0,), ids)], _ONE_HEAD)
        return None
    grid = ids.reshape(count, -1)
    t.tie(grid[:, 1:], grid[:, :1])
    t.heads.append(grid[:, 0])
    return grid[:, 0]


def _dims(t: Channels, x: Operand, count: int) -> Ids | None:
    """The ids of the dims of an operand, the same for every head; None where they must stay."""
    if len(x.shape) == 4:
        t.collapse_all(x, first=False)
        t.freeze([b for b in x.layout if b.axes != (3,)], "attention computes over it")
        return t.ids(x, 3)
    ids = _inner(t, x)
    if ids is None:
        return None
    grid = ids.reshape(count, -1)
    t.tie(grid[1:], grid[:1])
    return ids[: len(ids) // count]


def _inner(t: Channels, x: Operand) -> Ids | None:
    t.freeze([b for b in x.layout if 2 not in b.axes], "attention computes over it")
    return t.ids(x, 2)


def _tie_heads(
    t: Channels, node: ir.Node, heads: list[Ids | None], kv_count: int
) -> list[Ids | None]:
    """Tie the heads of queries to those of keys and values, masks and caches."""
    q, k, v = heads
    if kv_count == 1 and q is not None:  # one head for all queries: each of them can go
        for ids in (k, v):
            t.freeze([] if ids is None else [Block((0,), ids)], _ONE_HEAD)
        k = v = None
    elif q is None or k is None or v is None:
        for ids in heads:
            reason = "heads of one of Q, K and V cannot be removed"
            t.freeze([] if ids is None else [Block((0,), ids)], reason)
        return [None, None, None]
    else:
        t.tie(q.reshape(len(k), -1), k[:, None])
        t.tie(k, v)
    for index, own in ((3, q), (4, k), (5, v)):
        x = t.operand(index)
        axis = -1 if x is None else _heads_axis(x)
        if x is not None and own is not None and axis >= 0 and x.shape[axis] > 1:
            t.same(own, t.ids(x, axis), f"meets {x.name}, which has no heads to remove")
    return [q, k, v]


def _keep_whole_caches(t: Channels, node: ir.Node, units: list[Ids | None]) -> None:
    for index, own in ((4, units[1]), (5, units[2])):
        x = t.operand(index)
        if x is not None and own is not None:
            t.freeze([Block((0,), own)], f"meets {x.name}, which has no dims to remove")


def _placed(ids: Ids | None, rank: int, split: tuple[int, int], *, by_heads: bool) -> list[Block]:
    """Blocks for heads or dims in a tensor of four axes, or of three with both in the last.

    Args:
        ids: Of the heads, or of the dims.
        rank: Of the tensor.
        split: The number of heads, and the width of all of them.
        by_heads: Whose ids they are.
    """
    if ids is None:
        return []
    if rank == 4:
        return [Block((1 if by_heads else 3,), ids)]
    heads, width = split
    return [Block((2,), np.repeat(ids, width // heads) if by_heads else np.tile(ids, heads))]
