"""Spell out what ONNX Runtime fuses, so that every pass can read it.

Files that ONNX Runtime or its transformers optimizer wrote hold operators of ``com.microsoft``.

Before: ``FusedConv(x, W, B, activation="Relu")``
After:  ``Relu(Conv(x, W, B))``

1. A node with an expansion in the table below becomes standard operators that compute the same.
2. A node without one, or in a form that has none, stays; passes treat it as any custom operator.

The result is left so: the runtime fuses it again whenever it loads it.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd.contrib import MICROSOFT
from onnxslim_kd.model import infer_shapes
from onnxslim_kd.passes import unfuse_attention as attention
from onnxslim_kd.passes import unfuse_layers as layers
from onnxslim_kd.passes import unfuse_quantised as quantised
from onnxslim_kd.passes.expansion import Expansion, Unsupported, infer


@dataclass(frozen=True)
class Unfused:
    """What was spelled out."""

    expanded: dict[str, int]
    """How many nodes of which operator."""
    left: dict[str, str]
    """Nodes that have an expansion but are in another form: why they stay, by name."""


def unfuse(model: ir.Model, *, contrib: bool = True) -> Unfused:
    """Replace fused operators in the main graph of ``model`` by standard ones, in place.

    Args:
        model: A loaded model.
        contrib: False leaves those of ``com.microsoft``, and replaces the one that the runtime
            writes into ONNX's own domain, where a checker does not know it.
    """
    domains = ("", "ai.onnx", *([MICROSOFT] if contrib else []))
    done: Counter[str] = Counter()
    left: dict[str, str] = {}
    before = -1
    while before != sum(done.values()) and any(_expansion(n, domains) for n in model.graph):
        before, left = sum(done.values()), {}
        for node in list(model.graph):
            expand = _expansion(node, domains)
            if expand is not None:
                _write_out(model.graph, node, expand, done, left)
            elif any(value.type is None or value.shape is None for value in node.outputs):
                infer(node, model.graph.opset_imports)
        if sum(done.values()) > before:
            infer_shapes(model)  # follows numbers too; a form that needed a shape may now have it
    if done:
        common.RemoveUnusedOpsetsPass()(model)
    return Unfused(dict(done), left)


def _write_out(
    graph: ir.Graph, node: ir.Node, expand: "Expand", done: Counter[str], left: dict[str, str]
) -> None:
    weights = set(graph.initializers)
    made = Expansion(node, graph)
    try:
        outputs = expand(made)
    except Unsupported as reason:
        left[node.name or ""] = str(reason)
        for name in set(graph.initializers) - weights:
            del graph.initializers[name]
        return
    _replace(graph, node, made.nodes, outputs)
    done[node.op_type] += 1


def _replace(
    graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], outputs: list[ir.Value | None]
) -> None:
    pairs = [(old, new) for old, new in zip(node.outputs, outputs, strict=False) if new is not None]
    for made in nodes:
        made.metadata_props.update(node.metadata_props)
    graph.insert_after(node, nodes)
    for old, new in pairs:
        if not old.uses() and not old.is_graph_output():
            continue
        name, kind, shape = old.name, new.type or old.type, new.shape or old.shape
        if old.is_graph_output():  # it keeps the type that was promised
            kind, shape = old.type or kind, old.shape or shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = None
        new.name, new.type, new.shape = name, kind, shape
    graph.remove(node, safe=True)


def _expansion(node: ir.Node, domains: Collection[str]) -> "Expand | None":
    expand = EXPANSIONS.get(node.op_type)
    if expand is None or node.domain not in domains:
        return None
    return expand if node.domain == MICROSOFT or not onnx.defs.has(node.op_type) else None


Expand = Callable[[Expansion], list[ir.Value | None]]

EXPANSIONS: dict[str, Expand] = {
    "FusedConv": layers.conv,
    "FusedGemm": layers.gemm,
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul"), layers.matmul),
    **dict.fromkeys(("Gelu", "BiasGelu"), layers.gelu),
    "FastGelu": layers.fast_gelu,
    "QuickGelu": layers.quick_gelu,
    "SkipLayerNormalization": layers.skip_layer_norm,
    "SkipSimplifiedLayerNormalization": layers.skip_rms_norm,
    "SimplifiedLayerNormalization": layers.rms_norm,
    "EmbedLayerNormalization": layers.embed_layer_norm,
    "Attention": attention.attention,
    "MultiHeadAttention": attention.multi_head_attention,
    "RotaryEmbedding": attention.rotary_embedding,
    "QLinearAdd": quantised.binary("Add"),
    "QLinearMul": quantised.binary("Mul"),
    "QLinearSigmoid": quantised.unary("Sigmoid"),
    "QLinearLeakyRelu": quantised.unary("LeakyRelu"),
    "QLinearSoftmax": quantised.unary("Softmax"),
    "QLinearAveragePool": quantised.unary("AveragePool"),
    "QLinearGlobalAveragePool": quantised.unary("GlobalAveragePool"),
    "QLinearConcat": quantised.concat,
    "QGemm": quantised.gemm,
    "MatMulIntegerToFloat": quantised.matmul,
    "DynamicQuantizeMatMul": quantised.dynamic_matmul,
}
"""The standard form of what ONNX Runtime fuses.

Not here: GroupQueryAttention and MatMulNBits, which have rules of their own (`ties_contrib`); the
attention of decoders that share buffers; ``com.microsoft.nchwc``, whose weights lie
in blocks that only the processor knows.
"""
