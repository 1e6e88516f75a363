"""Which channels live and die together: one rule per operator, in the table at the bottom.

To add an operator, write a rule (a function of the walk's state and a node) that reads the layouts
of the inputs, ties what must go together, and sets the layouts of the outputs; put it in RULES,
and a model that uses it in tests/models.py. An operator without a rule pins what it touches.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxslim_kd.access import bodies, extents_of
from onnxslim_kd.contrib import MICROSOFT
from onnxslim_kd.cost import is_weight
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import ties_attention as fused
from onnxslim_kd.passes import ties_contrib as contrib
from onnxslim_kd.passes import ties_gather as gather
from onnxslim_kd.passes import ties_layers as layers
from onnxslim_kd.passes import ties_movement as movement
from onnxslim_kd.passes import ties_pointwise as pointwise
from onnxslim_kd.passes import ties_recurrent as recurrent
from onnxslim_kd.passes import ties_reshape as reshape
from onnxslim_kd.passes import ties_space as space
from onnxslim_kd.passes.channels import Attention, Channels, Ids, Unsupported
from onnxslim_kd.passes.ties_pointwise import Rule
from onnxslim_kd.shapes import Shapes


def walk(
    model: ir.Model,
    shapes: Shapes,
    *,
    attention: Attention = "heads",
    free_outputs: Sequence[str] = (),
    by_dims: frozenset[ir.Node] = frozenset(),
) -> Channels:
    """Apply the rule of every node in order; the result holds all ties.

    Args:
        model: A loaded model.
        shapes: A sample of its shapes.
        attention: Whether whole heads go (``auto`` as well), or dimensions inside all heads.
        free_outputs: Graph outputs whose channels may go.
        by_dims: Where dimensions go in any case.

    Raises:
        UserError: ``free_outputs`` names no graph output.
    """
    names = [value.name for value in model.graph.outputs]
    for name in free_outputs:
        if name not in names:
            raise UserError(
                f"--free-output {name}: the model's outputs are {', '.join(map(str, names))}"
            )
    t = Channels(shapes, attention, by_dims)
    for node in model.graph:
        t.node = node
        if not _is_arithmetic(t, node):
            _apply(t, node)
    t.node = None
    for value in model.graph.outputs:
        if value.name not in free_outputs:
            _keep(t, value, f"graph output {value.name}")
            for counted in _counted(t, value):
                _keep(t, counted, f"graph output {value.name} counts it")
    return t


def _counted(t: Channels, value: ir.Value) -> Iterator[ir.Value]:
    """The values whose sizes a whole number is computed from, such as a graph output."""
    ahead = [value]
    for number in ahead:  # grows while it is walked
        node = number.producer() if _is_count(t, number) else None
        if node is not None and node.op_type in ("Shape", "Size"):
            yield from (v for v in node.inputs if v is not None)
        elif node is not None:
            ahead += [v for v in node.inputs if v is not None and v not in ahead]


def _is_count(t: Channels, value: ir.Value) -> bool:
    return value in t.shapes.number and t.shapes.number[value].dtype.kind in "iub"


def _is_arithmetic(t: Channels, node: ir.Node) -> bool:
    """Tell whether a node only computes shapes: whole numbers that are known already."""
    return all(_is_count(t, value) for value in node.outputs if value.name)


def _apply(t: Channels, node: ir.Node) -> None:
    for value in _captured(node):
        _keep(t, value, f"captured by the body of {_kind(node)}")
    for inner in (inner for body in bodies(node) for inner in body.all_nodes()):
        _name_weights(t, inner, f"inside the body of {_kind(node)}")
    t.node = node
    rule = rule_of(node)
    if rule is None:
        _pin_inputs(t, node, f"no rule for {_kind(node)}")
        return
    try:
        rule(t, node)
    except Unsupported as reason:
        _pin_inputs(t, node, f"{_kind(node)}: {reason}")


def rule_of(node: ir.Node) -> Rule | None:
    """Return the rule of a node's operator, None where there is none."""
    if node.domain == MICROSOFT:
        return CONTRIB.get(node.op_type)
    return RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def _kind(node: ir.Node) -> str:
    domain = f"{node.domain}." if node.domain else ""
    return f"{domain}{node.op_type} {node.name}"


def _pin_inputs(t: Channels, node: ir.Node, reason: str) -> None:
    for value in node.inputs:
        if value is not None:
            _keep(t, value, reason)
    for output in node.outputs:
        t.layout.pop(output, None)
    _name_weights(t, node, reason)


def _name_weights(t: Channels, node: ir.Node, reason: str) -> None:
    """Let a pattern mean the weights of a node that stays whole, to hear why they must stay."""
    for reader, index in _weights_behind(node):
        value, t.node = reader.inputs[index], reader
        assert value is not None and value.const_value is not None
        if not t.born(value):
            t.shapes.shape.setdefault(value, extents_of(value.const_value))  # in a body: not yet
            t.keep_whole(value, reason)
            t.operand(index)
        if len(value.const_value.shape) > 1 and t.born(value):
            t.produce(t.born(value)[0].ids)


def _weights_behind(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Who reads the weights that come to ``node`` alone, or behind slices, casts and the like."""
    for start in node.inputs:
        found, ahead = [], [(node, i) for i, value in enumerate(node.inputs) if value is start]
        for reader, index in ahead:  # grows while it is walked
            value = reader.inputs[index]
            producer = value.producer() if value is not None else None
            if producer is not None and len(ahead) < _FAR:
                ahead += [(producer, i) for i, v in enumerate(producer.inputs) if v is not None]
            elif value is not None and value.is_initializer() and value.const_value is not None:
                found += [(reader, index)] if is_weight(value.const_value) else []
            elif value is not None:
                break  # it comes from an input, or from too far away
        else:
            yield from found


_FAR = 32
"""More operators than exporters put between a weight and the layer that reads it."""


def _keep(t: Channels, value: ir.Value, reason: str) -> None:
    if value.is_initializer():
        t.keep_whole(value, reason)
    t.freeze(t.layout.get(value, ()), reason)


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """The values of outer graphs that a node's bodies read."""
    for attribute in node.attributes.data.values():
        if attribute.type is ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            for inner in body.all_nodes():
                yield from (v for v in inner.inputs if v is not None and v.graph is not body)
            yield from (v for v in body.outputs if v.graph is not body)


def chain(t: Channels, start: Ids, goal: Ids) -> list[str]:
    """Return the names of the nodes on a shortest way of ties from ``start`` to ``goal``.

    Args:
        t: A finished walk.
        start: The ids of a parameter.
        goal: The ids of pins.
    """
    neighbours: dict[int, list[tuple[int, str]]] = {}
    for tie in t.ties:
        name = (tie.node.name or tie.node.op_type) if tie.node is not None else "graph output"
        for a, b in zip(tie.a.tolist(), tie.b.tolist(), strict=True):
            neighbours.setdefault(a, []).append((b, name))
            neighbours.setdefault(b, []).append((a, name))
    goals = set(goal.tolist())
    came: dict[int, tuple[int, str] | None] = {int(i): None for i in start}
    queue = deque(came)
    while queue:
        at = queue.popleft()
        if at in goals:
            return _unwind(came, at)
        for to, name in neighbours.get(at, ()):
            if to not in came:
                came[to] = (at, name)
                queue.append(to)
    return []


def _unwind(came: dict[int, tuple[int, str] | None], at: int) -> list[str]:
    names: list[str] = []
    while (step := came[at]) is not None:
        at, name = step
        if not names or names[-1] != name:
            names.append(name)
    return names[::-1]


def _ignore(t: Channels, node: ir.Node) -> None:
    """Shape, Size, Constant, Range, ...: nothing that is cut comes out."""


def _non_zero(t: Channels, node: ir.Node) -> None:
    """NonZero: positions, which nothing may shift."""
    for value in node.inputs:
        t.freeze(t.layout.get(value, ()) if value is not None else (), "its positions are counted")


_UNARY = """
Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh Dropout Elu
Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal
Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
""".split()  # noqa: SIM905 - easier to read and to sort
_BROADCAST = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual
Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor
""".split()  # noqa: SIM905
_POOL = ("AveragePool", "LpPool", "MaxPool")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, pointwise.unary),
    **dict.fromkeys(_BROADCAST, pointwise.broadcast),
    **dict.fromkeys(_POOL, space.spatial),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), pointwise.global_pool(exact=False)),
    "GlobalLpPool": pointwise.global_pool(exact=True),
    **dict.fromkeys(("MaxRoiPool", "RoiAlign"), space.regions),
    "GridSample": space.grid_sample,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape.reshape),
    **dict.fromkeys(("Shape", "Size", "Constant", "Range", "EyeLike"), _ignore),
    "NonZero": _non_zero,
    # sums over zeroed channels are what removal gives; the others run over the survivors
    **dict.fromkeys(
        ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"), pointwise.reduce(exact=True)
    ),
    **dict.fromkeys(
        ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp"),
        pointwise.reduce(exact=False),
    ),
    **dict.fromkeys(("ArgMax", "ArgMin"), pointwise.arg_reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), pointwise.along_axis(-1)),
    "LpNormalization": pointwise.along_axis(-1, exact=True),
    **dict.fromkeys(("CumSum", "TopK"), pointwise.frozen_axis(-1)),
    "DynamicQuantizeLinear": pointwise.dynamic_quantize,
    "Trilu": pointwise.frozen_matrix,
    "BatchNormalization": pointwise.channel_norm,
    "InstanceNormalization": pointwise.channel_norm,
    "LayerNormalization": pointwise.layer_norm,
    "RMSNormalization": pointwise.layer_norm,
    "GroupNormalization": pointwise.group_norm,
    "LRN": pointwise.lrn,
    "QuantizeLinear": pointwise.quantize,
    "DequantizeLinear": pointwise.quantize,
    "Conv": layers.conv,
    "ConvInteger": layers.conv,
    "QLinearConv": layers.conv,
    "ConvTranspose": layers.conv_transpose,
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    "MatMulInteger": layers.matmul,
    "QLinearMatMul": layers.matmul,
    "Einsum": layers.einsum,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent.rnn),
    "Attention": fused.attention,
    "RotaryEmbedding": fused.rotary_embedding,
    "Concat": movement.concat,
    "Split": movement.split,
    "Slice": movement.slice_,
    "Gather": gather.gather,
    "GatherElements": gather.gather_elements,
    "GatherND": gather.gather_nd,
    "ScatterND": gather.scatter_nd,
    "Transpose": reshape.transpose,
    "Expand": movement.expand,
    "ConstantOfShape": movement.constant_of_shape,
    "Tile": movement.tile,
    "Pad": movement.pad,
    "Resize": space.resize,
    "Upsample": space.resize,
    "DepthToSpace": space.depth_to_space,
    "SpaceToDepth": space.space_to_depth,
}
CONTRIB: dict[str, Rule] = {
    "GatherBlockQuantized": contrib.gather_block_quantized,
    "GroupQueryAttention": contrib.group_query_attention,
    "MatMulNBits": contrib.matmul_nbits,
}
"""Operators of ``com.microsoft`` that are not spelled out (`unfuse`)."""
