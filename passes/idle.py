"""Nodes that give what they take."""

from collections.abc import Callable

import onnx_ir as ir

from onnxslim_kd.model import constant, dims, has_rank

_END = 2**31 - 1
"""A Slice that ends here or later means "to the end"."""


def passed_on(node: ir.Node) -> ir.Value | None:
    """Return the input that ``node`` passes on as its only used output, None if it does more."""
    rule = IDLE.get(node.op_type) if not node.domain else None
    if rule is None or not node.inputs or not rule(node):
        return None
    index = _neutral(node) if node.op_type in _NEUTRAL else 0
    return None if index is None else node.inputs[index]


def _always(node: ir.Node) -> bool:
    return True


def _of_one(node: ir.Node) -> bool:
    return len(node.inputs) == 1


def _dropout(node: ir.Node) -> bool:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    flag = constant(training)
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    seen = mask is not None and (mask.uses() or mask.is_graph_output())
    return not seen and (training is None or (flag is not None and not flag.any()))


def _flatten(node: ir.Node) -> bool:
    matrix = has_rank(node.inputs[0]) and len(dims(node.inputs[0])) == 2
    return matrix and node.attributes.get_int("axis", 1) == 1


def _transpose(node: ir.Node) -> bool:
    order = node.attributes.get_ints("perm")
    return order is not None and list(order) == sorted(order)


def _cast(node: ir.Node) -> bool:
    source = node.inputs[0]
    return (
        source is not None
        and source.dtype is not None
        and source.dtype == node.attributes.get_int("to")
    )


def _pad(node: ir.Node) -> bool:
    pads = constant(node.inputs[1])
    return pads is not None and not pads.any()


def _slice(node: ir.Node) -> bool:
    starts, ends = constant(node.inputs[1]), constant(node.inputs[2])
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    numbers = constant(steps)
    if starts is None or ends is None or (steps is not None and numbers is None):
        return False
    forwards = numbers is None or bool((numbers == 1).all())
    return forwards and not starts.any() and bool((ends >= _END).all())


def _split(node: ir.Node) -> bool:
    return len(node.outputs) == 1


def _neutral(node: ir.Node) -> int | None:
    """The place of the other input where one is a single 0 (of a sum) or 1 (of a product) ..."""
    number, commutes = _NEUTRAL[node.op_type]
    for index in (1, 0) if commutes else (1,):
        given, other = constant(node.inputs[index]), node.inputs[1 - index]
        if given is None or given.size != 1 or given.item() != number:
            continue
        if given.ndim == 0 or (has_rank(other) and len(dims(other)) >= given.ndim):
            return 1 - index
    return None


_NEUTRAL = {
    "Add": (0, True),
    "And": (True, True),
    "Div": (1, False),
    "Mul": (1, True),
    "Or": (False, True),
    "Sub": (0, False),
}
"""The number that changes nothing, and whether it may stand in front."""

IDLE: dict[str, Callable[[ir.Node], bool]] = {
    **dict.fromkeys(("Identity", *_NEUTRAL), _always),
    **dict.fromkeys(("Concat", "Max", "Mean", "Min", "Sum"), _of_one),
    "Cast": _cast,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
"""When an operator passes an input on."""
