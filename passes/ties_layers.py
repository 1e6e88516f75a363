"""Rules for layers: what has a weight with an input and an output axis."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim_kd.passes.channels import Block, Channels, Ids, Operand, Unsupported
from onnxslim_kd.passes.ties_pointwise import join


def conv(t: Channels, node: ir.Node) -> None:
    """Conv, ConvInteger, 1-D to 3-D, with any groups.

    Groups stay equally wide, so that position j of every group goes together; where each group has
    one input (depthwise, any multiplier) or one output, whole groups go.
    """
    x, w = t.need(0), t.need(weight := _weight_input(node))
    groups = node.attributes.get_int("group", 1)
    channels, beside = t.ids(x, 1), _beside(t, node, x, w)
    outputs, inputs = t.ids(w, 0), t.ids(w, 1)
    if groups == 1:
        t.same(channels, inputs, f"feeds {w.name}, which sees every input channel")
        t.consume((0, 1), (weight, 1))
    elif w.shape[1] == 1 or w.shape[0] == groups:
        outputs = _whole_groups(t, channels, inputs, outputs, groups)
    else:
        outputs = _positions(t, channels, inputs, outputs, groups)
        t.consume((0, 1), (weight, 1))
    t.produce(outputs)
    _add_bias(t, node, outputs)
    t.set(0, [*_batch_and(x, outputs), *beside])


def _weight_input(node: ir.Node) -> int:
    return 3 if node.op_type == "QLinearConv" else 1


def _beside(t: Channels, node: ir.Node, x: Operand, w: Operand) -> list[Block]:
    """What passes of spatial axes that hold channels: gates over neighbours, mixers of tokens.

    1. A window of one leaves each position to itself.
    2. A longer one that gives as many as it takes mixes neighbours, as LRN does.
    3. What changes their number keeps them all.
    """
    passed = []
    strides = node.attributes.get_ints("strides") or [1] * len(x.shape)
    for block in (b for b in x.layout if min(b.axes) > 1):
        alike = all(x.shape[a] == t.out_shape()[a] and strides[a - 2] == 1 for a in block.axes)
        mixed = any(w.shape[a] > 1 for a in block.axes)
        if not alike or (mixed and len(block.axes) > 1):
            t.freeze([block], "a spatial axis is computed over")
            continue
        if mixed:
            t.not_exact(block.ids, f"{node.op_type} runs over neighbouring channels")
            t.consume((0, block.axes[0]), out_axis=block.axes[0])
        passed.append(block)
    return passed


def _channels(t: Channels, x: Operand) -> Ids | None:
    """The ids of axis 1; a layer computes over all axes after it, so that these must stay."""
    ids = t.ids(x, 1)
    t.freeze([b for b in x.layout if min(b.axes) > 1], "a spatial axis is computed over")
    return ids


def _batch_and(x: Operand, outputs: Ids | None) -> list[Block]:
    batch = [b for b in x.layout if b.axes == (0,)]
    return batch if outputs is None else [*batch, Block((1,), outputs)]


def _whole_groups(
    t: Channels, channels: Ids | None, inputs: Ids | None, outputs: Ids | None, groups: int
) -> Ids | None:
    """Tie all inputs and outputs of one group: the group is what can go."""
    if outputs is None:
        t.same(channels, None, "feeds a convolution with one output")
        return None
    if inputs is not None:
        t.freeze([Block((1,), inputs)], "whole groups of this convolution go")
    grid = outputs.reshape(groups, -1)
    t.tie(grid[:, 1:], grid[:, :1])
    if channels is None:  # the input is whole: so are the groups
        t.freeze([Block((0,), outputs)], "each output belongs to an input that must stay")
    else:
        t.tie(channels.reshape(groups, -1), grid[:, :1])
    return outputs


def _positions(
    t: Channels, channels: Ids | None, inputs: Ids | None, outputs: Ids | None, groups: int
) -> Ids | None:
    """Tie position j of every group, for inputs and for outputs."""
    if channels is not None and inputs is not None:
        t.tie(channels.reshape(groups, -1), inputs[None, :])
    else:
        t.same(channels, inputs, "feeds a convolution that sees every input channel")
    if outputs is not None:
        grid = outputs.reshape(groups, -1)
        t.tie(grid[1:], grid[:1])
    return outputs


def _add_bias(t: Channels, node: ir.Node, outputs: Ids | None) -> None:
    """Tie the vectors along the output axis: bias, and the weight's quantisation parameters."""
    first = 4 if node.op_type == "QLinearConv" else 2
    for index in range(first, len(node.inputs)):
        p = t.operand(index)
        if p is not None and len(p.shape) == 1 and p.shape[0] > 1:
            t.same(outputs, t.ids(p, 0), f"meets {p.name}")


def conv_transpose(t: Channels, node: ir.Node) -> None:
    """ConvTranspose: weight [C, O/groups, ...]; groups as for Conv."""
    x, w = t.need(0), t.need(1)
    groups = node.attributes.get_int("group", 1)
    channels = _channels(t, x)
    inputs, per_group = t.ids(w, 0), t.ids(w, 1)
    outputs: Ids | None
    if groups == 1:
        t.same(channels, inputs, f"feeds {w.name}, which sees every input channel")
        t.consume((0, 1), (1, 0))
        outputs = per_group
    else:
        outputs = _transposed_groups(t, channels, inputs, per_group, groups)
    t.produce(outputs)
    _add_bias(t, node, outputs)
    t.set(0, _batch_and(x, outputs))


def _transposed_groups(
    t: Channels, channels: Ids | None, inputs: Ids | None, per_group: Ids | None, groups: int
) -> Ids | None:
    t.same(channels, inputs, "feeds a convolution that sees every input channel")
    if inputs is None:
        return None
    width = len(inputs) // groups
    if width > 1:  # position j of every group's inputs, and of every group's outputs
        grid = inputs.reshape(groups, width)
        t.tie(grid[1:], grid[:1])
        t.consume((0, 1), (1, 0))
        return None if per_group is None else np.tile(per_group, groups)
    if per_group is not None:
        t.freeze([Block((1,), per_group)], "whole groups of this convolution go")
    per = 1 if per_group is None else len(per_group)
    return np.repeat(inputs, per)


def gemm(t: Channels, node: ir.Node) -> None:
    """Gemm: alpha * A' B' + beta * C."""
    a, b = t.need(0), t.need(1)
    ka, na = (0, 1) if node.attributes.get_int("transA", 0) else (1, 0)
    kb, nb = (1, 0) if node.attributes.get_int("transB", 0) else (0, 1)
    t.same(t.ids(a, ka), t.ids(b, kb), f"{a.name} and {b.name} are multiplied along it")
    t.consume((0, ka), (1, kb))
    rows, columns = t.ids(a, na), t.ids(b, nb)
    t.produce(rows if _from_weight(a) and not _from_weight(b) else columns)
    layout = [Block((i,), ids) for i, ids in enumerate((rows, columns)) if ids is not None]
    out = t.out_shape()
    operands = [Operand(node.outputs[0], tuple(layout), out, constant=False)]
    if (c := t.operand(2)) is not None:
        operands.append(c)
    t.set(0, join(t, operands, out))


def matmul(t: Channels, node: ir.Node) -> None:
    """MatMul, of a weight or of two activations: the contracted axes live and die together."""
    a = t.need(0)
    b = t.need(_matmul_right(node))
    if len(a.shape) < 2 or len(b.shape) < 2:
        _vector_product(t, a, b)
        return
    for operand, other in ((a, b), (b, a)):
        _collapse_beside(t, operand, other)
    t.same(t.ids(a, -1), t.ids(b, -2), f"{a.name} and {b.name} are multiplied along it")
    t.consume((0, len(a.shape) - 1), (_matmul_right(node), len(b.shape) - 2))
    rows, columns = t.ids(a, -2), t.ids(b, -1)
    if _from_weight(b):
        t.produce(columns)
    if _from_weight(a):
        t.produce(rows)
    out = t.out_shape()
    layout = list(join(t, [_batch_part(a), _batch_part(b)], (*out[:-2], 1, 1)))
    for axis, ids in ((len(out) - 2, rows), (len(out) - 1, columns)):
        if ids is not None:
            layout.append(Block((axis,), ids))
    if node.op_type != "MatMul":
        _add_bias(t, node, columns)
    t.set(0, layout)


def _collapse_beside(t: Channels, operand: Operand, other: Operand) -> None:
    """Collapse grids of one factor: to heads where that is asked and the other one has some too."""
    for block in operand.layout:
        if len(block.axes) > 1:
            outer = min(block.axes)
            heads = _meets_channels(operand, other, outer) and t.heads_go()
            t.collapse(operand, block, outer if heads else max(block.axes))


def _meets_channels(operand: Operand, other: Operand, axis: int) -> bool:
    """Tell whether nothing beside ``axis`` of one factor keeps its channels."""
    beside = axis - len(operand.shape) + len(other.shape)
    if axis >= len(operand.shape) - 2 or beside < 0 or other.shape[beside] == 1:
        return True
    return any(beside in block.axes for block in other.layout)


def _matmul_right(node: ir.Node) -> int:
    return 3 if node.op_type == "QLinearMatMul" else 1


def _vector_product(t: Channels, a: Operand, b: Operand) -> None:
    """A product with a vector: the contracted axes tie, a matrix's other axes pass."""
    t.collapse_all(a, first=True)
    t.collapse_all(b, first=True)
    contracted = -1 if len(b.shape) == 1 else -2
    t.same(t.ids(a, -1), t.ids(b, contracted), f"{a.name} and {b.name} are multiplied along it")
    t.consume((0, len(a.shape) - 1), (1, len(b.shape) + contracted))
    left = [blk for blk in a.layout if len(a.shape) - 1 not in blk.axes]
    ids = t.ids(b, -1) if len(b.shape) > 1 else None
    if ids is not None and len(b.shape) == 2:
        left.append(Block((len(a.shape) - 1,), ids))
        t.produce(ids)
    t.set(0, left)


def _from_weight(operand: Operand) -> bool:
    """Tell whether an operand is a weight, maybe behind Transpose, Cast, DequantizeLinear."""
    value: ir.Value | None = operand.value
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in _WEIGHT_WRAPPERS:
            return False
        value = node.inputs[0]
    return value is not None and not value.is_graph_input()


_WEIGHT_WRAPPERS = ("Transpose", "Cast", "Identity", "DequantizeLinear", "Reshape", "Unsqueeze")


def _batch_part(operand: Operand) -> Operand:
    rank = len(operand.shape)
    layout = tuple(b for b in operand.layout if max(b.axes) < rank - 2)
    return Operand(operand.value, layout, (*operand.shape[:-2], 1, 1), operand.constant)


def einsum(t: Channels, node: ir.Node) -> None:
    """Einsum: axes of equal letters live and die together."""
    operands = [t.need(i) for i in range(len(node.inputs))]
    equation = (node.attributes.get_string("equation") or "").replace(" ", "")
    terms, result = _letters(equation, [len(operand.shape) for operand in operands])
    letters: dict[str, Ids | None] = {}
    for term, operand in zip(terms, operands, strict=True):
        t.collapse_all(operand, first=t.heads_go())
        for axis, letter in enumerate(term):
            ids = t.ids(operand, axis)
            if letter in letters:
                ids = t.same(letters[letter], ids, f"{operand.name} has no channels along it")
            letters[letter] = ids
            if operand.constant and letter in result and ids is not None:
                t.produce(ids)
    for letter in (letter for letter in letters if letter not in result):
        t.consume(*((i, term.index(letter)) for i, term in enumerate(terms) if letter in term))
    blocks = [(i, letters.get(letter)) for i, letter in enumerate(result)]
    t.set(0, [Block((i,), ids) for i, ids in blocks if ids is not None])


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms and the result of an equation, with a digit for each axis of an ellipsis.

    ``...c,ch`` of two and three axes is ``0c,ch`` -> ``0h``. Without an arrow, the result is what
    comes once, in the order of the alphabet.
    """
    left, arrow, result = equation.partition("->")
    if not arrow:
        once = (c for c in sorted(set(left) - set(",.")) if left.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    terms = left.split(",")
    more = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    dots = ["9876543210"[10 - n :] for n in more]  # counted from their end, as they broadcast
    if any(n < 0 or (n and "..." not in term) for term, n in zip(terms, more, strict=True)):
        raise Unsupported(f"equation {equation!r} does not fit its inputs")
    terms = [term.replace("...", own) for term, own in zip(terms, dots, strict=True)]
    return terms, result.replace("...", max(dots, key=len))
