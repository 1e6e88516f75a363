"""Repairs of attributes that count: groups, hidden units, heads, and what is derived from them."""

import onnx_ir as ir

from onnxslim_kd.passes.repairs import Cut
from onnxslim_kd.shapes import Shape


def group(cut: Cut, node: ir.Node) -> set[int]:
    """Conv, ConvTranspose: the number of groups, where whole groups went."""
    groups = node.attributes.get_int("group", 1)
    if groups > 1:
        channels = cut.new(node.inputs[0])[1]
        weight = cut.new(node.inputs[3 if node.op_type == "QLinearConv" else 1])
        if node.op_type == "ConvTranspose":
            whole = cut.old(node.inputs[1])[0] == groups
            left = channels if whole else groups
        else:
            left = channels // weight[1]
        node.attributes["group"] = ir.AttrInt64("group", left)
    return set()


def num_groups(cut: Cut, node: ir.Node) -> set[int]:
    """GroupNormalization: the number of groups, where each has one channel."""
    old, new = (size[1] for size in (cut.old(node.inputs[0]), cut.new(node.inputs[0])))
    if node.attributes.get_int("num_groups") == old:
        node.attributes["num_groups"] = ir.AttrInt64("num_groups", new)
    return set()


def hidden_size(cut: Cut, node: ir.Node) -> set[int]:
    """LSTM, GRU, RNN: the hidden units that are left."""
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", cut.new(node.inputs[2])[2])
    return set()


def explicit_scale(node: ir.Node, queries: Shape) -> None:
    """Write down the scale that Attention derives from the size of a head."""
    if "scale" not in node.attributes:
        heads = 1 if len(queries) == 4 else node.attributes.get_int("q_num_heads") or 1
        scale = (queries[-1] // heads) ** -0.5
        node.attributes["scale"] = ir.AttrFloat32("scale", scale)


def attention(cut: Cut, node: ir.Node) -> set[int]:
    """Attention: fewer heads, or the scale that heads of the old size had."""
    queries, keys = node.inputs[0], node.inputs[1]
    old, new = cut.old(queries), cut.new(queries)
    heads = node.attributes.get_int("q_num_heads") or 1
    by_heads = cut.analysis.channels.attention_at(node) == "heads" and heads > 1
    if len(old) == 3 and by_heads:
        _fewer_heads(cut, node, "q_num_heads", queries)
        _fewer_heads(cut, node, "kv_num_heads", keys)
    elif old[-1] != new[-1]:
        explicit_scale(node, old)
    return set()


def rotary_embedding(cut: Cut, node: ir.Node) -> set[int]:
    """RotaryEmbedding: fewer heads."""
    heads = node.attributes.get_int("num_heads") or 1
    by_heads = cut.analysis.channels.attention_at(node) == "heads" and heads > 1
    if by_heads and len(cut.old(node.inputs[0])) == 3:
        _fewer_heads(cut, node, "num_heads", node.inputs[0])
    return set()


def query_heads(cut: Cut, node: ir.Node) -> set[int]:
    """GroupQueryAttention: fewer heads of queries."""
    _fewer_heads(cut, node, "num_heads", node.outputs[0])
    return set()


def rows_and_columns(cut: Cut, node: ir.Node) -> set[int]:
    """MatMulNBits: the size of its weight."""
    for name, value in (("N", node.outputs[0]), ("K", node.inputs[0])):
        node.attributes[name] = ir.AttrInt64(name, cut.new(value)[-1])
    return set()


def _fewer_heads(cut: Cut, node: ir.Node, attribute: str, value: ir.Value | None) -> None:
    heads = node.attributes.get_int(attribute) or 1
    left = cut.new(value)[2] * heads // cut.old(value)[2]
    node.attributes[attribute] = ir.AttrInt64(attribute, left)
