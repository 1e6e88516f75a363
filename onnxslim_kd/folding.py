"""Shape arithmetic on numbers: one numpy rule per operator, in the table at the bottom."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
LIMIT = 4096
"""Elements up to which a tensor is folded; attention masks and position tables are larger."""
Fold = Callable[[ir.Node, Sequence[Array]], Sequence[Array]]


def _numpy(function: Callable[..., Any]) -> Fold:
    return lambda node, x: [function(*x)]


def _shape(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(x[0]))
    return [x[0][start:end]]


def _gather(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    return [np.take(x[0], x[1], axis=node.attributes.get_int("axis", 0))]


def _concat(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    axis = node.attributes.get_int("axis")
    assert axis is not None
    return [np.concatenate(list(x), axis=axis)]


def slice_index(rank: int, parameters: Sequence[Array | None]) -> tuple[slice, ...]:
    """Return numpy slices for Slice's starts, ends, axes and steps (ONNX Slice-13).

    numpy clamps out-of-range bounds as ONNX does; only "-1 past the start" needs care.
    """
    starts, ends, axes, steps = [*parameters, None, None][:4]
    assert starts is not None and ends is not None
    which = range(len(starts)) if axes is None else [int(a) % rank for a in axes]
    index = [slice(None)] * rank
    for i, axis in enumerate(which):
        step = 1 if steps is None else int(steps[i])
        end: int | None = int(ends[i])
        if step < 0 and end is not None and end < -(2**31):
            end = None
        index[axis] = slice(int(starts[i]), end, step)
    return tuple(index)


def _slice(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    return [x[0][slice_index(x[0].ndim, x[1:])]]


def _unsqueeze(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    return [np.expand_dims(x[0], tuple(int(a) for a in x[1]))]


def _squeeze(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    return [np.squeeze(x[0], tuple(int(a) for a in x[1]) if len(x) > 1 else None)]


def _reshape(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    copies = not node.attributes.get_int("allowzero", 0)
    target = [x[0].shape[i] if t == 0 and copies else int(t) for i, t in enumerate(x[1])]
    return [x[0].reshape(target)]


def _cast(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    to = node.attributes.get_int("to")
    return [x[0].astype(ir.DataType(to).numpy())]


def _div(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    if x[0].dtype.kind in "iu":  # C division: towards zero
        whole, rest = np.divmod(x[0], x[1])
        return [whole + ((rest != 0) & ((x[0] < 0) != (x[1] < 0)))]
    return [x[0] / x[1]]


def _clip(node: ir.Node, x: Sequence[Array | None]) -> Sequence[Array]:
    number = x[0]
    assert number is not None
    low, high = (*x[1:], None, None)[:2]
    number = number if low is None else np.maximum(number, low)
    return [number if high is None else np.minimum(number, high)]


def _constant_of_shape(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    tensor = node.attributes.get_tensor("value")
    fill = tensor.numpy().reshape(()) if tensor is not None else np.float32(0)
    if np.prod(x[0]) > LIMIT:
        return []
    return [np.full([int(d) for d in x[0]], fill)]


def _expand(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    return [x[0] * np.ones([int(d) for d in x[1]], x[0].dtype)]


def _reduce(function: Callable[..., Any]) -> Fold:
    def rule(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
        given = x[1].tolist() if len(x) > 1 else node.attributes.get_ints("axes")
        if not given and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
            return [x[0]]
        keep = bool(node.attributes.get_int("keepdims", 1))
        return [function(x[0], axis=tuple(given) if given else None, keepdims=keep)]

    return rule


def _split(node: ir.Node, x: Sequence[Array]) -> Sequence[Array]:
    axis = node.attributes.get_int("axis", 0)
    if len(x) > 1:
        return np.split(x[0], np.cumsum(x[1])[:-1].tolist(), axis=axis)
    return np.array_split(x[0], len(node.outputs), axis=axis)


FOLDS: Mapping[str, Fold] = {
    "Shape": _shape,
    "Size": lambda node, x: [np.asarray(np.prod(x[0]))],
    "Identity": lambda node, x: [x[0]],
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Cast": _cast,
    "Div": _div,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Transpose": lambda node, x: [np.transpose(x[0], node.attributes.get_ints("perm"))],
    "Range": lambda node, x: [np.arange(x[0].item(), x[1].item(), x[2].item()).astype(x[0].dtype)],
    "Mod": lambda node, x: [(np.fmod if node.attributes.get_int("fmod", 0) else np.mod)(*x)],
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Add": _numpy(np.add),
    "Sub": _numpy(np.subtract),
    "Mul": _numpy(np.multiply),
    "Pow": lambda node, x: [np.power(x[0], x[1]).astype(x[0].dtype)],
    "Sqrt": _numpy(np.sqrt),
    "Reciprocal": _numpy(np.reciprocal),
    "Neg": _numpy(np.negative),
    "Abs": _numpy(np.abs),
    "Floor": _numpy(np.floor),
    "Ceil": _numpy(np.ceil),
    "Round": _numpy(np.rint),
    "Sign": _numpy(np.sign),
    "Exp": _numpy(np.exp),
    "Log": _numpy(np.log),
    "Clip": _clip,
    "Relu": lambda node, x: [np.maximum(x[0], 0)],
    "Min": lambda node, x: [np.minimum.reduce(np.broadcast_arrays(*x))],
    "Max": lambda node, x: [np.maximum.reduce(np.broadcast_arrays(*x))],
    "Equal": _numpy(np.equal),
    "Greater": _numpy(np.greater),
    "GreaterOrEqual": _numpy(np.greater_equal),
    "Less": _numpy(np.less),
    "LessOrEqual": _numpy(np.less_equal),
    "Not": _numpy(np.logical_not),
    "And": _numpy(np.logical_and),
    "Or": _numpy(np.logical_or),
    "Where": _numpy(np.where),
}


def folded(node: ir.Node, inputs: Sequence[Array]) -> Sequence[Array]:
    """Compute ``node``, or nothing where its inputs do not allow it; the runtime will say so."""
    try:
        with np.errstate(all="ignore"):
            return [np.asarray(output) for output in FOLDS[node.op_type](node, inputs)]
    except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
        return ()
