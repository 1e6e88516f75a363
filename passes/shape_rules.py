"""How shapes, and numbers computed from them, go through operators; dynamic sizes are symbols.

ONNX's own inference gives the shapes of most nodes. What it does not follow is here: numbers
through shape arithmetic, and the operators that they feed. Nothing depends on data: what is known
holds for every input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from onnxslim_kd.folding import slice_index
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.symbolic import (
    Number,
    add,
    divide,
    divided,
    equal,
    is_natural,
    less,
    multiply,
    product,
    remainder,
    subtract,
    symbol,
)

Shape = tuple[Number, ...]
Array = np.ndarray[Any, Any]
"""Of `Number` objects, with at most two dimensions."""
MOST = 64
"""Elements up to which numbers are followed: shapes, axes, starts and ends."""
_END = 2**31 - 1
"""A Slice that ends here or later means "to the end"."""


class Reader(Protocol):
    """What a rule may ask."""

    def shape_of(self, node: ir.Node, index: int) -> Shape | None:
        """Return the shape of an input, None where it is not there or not known."""

    def numbers_of(self, node: ir.Node, index: int) -> Sequence[Number] | None:
        """Return the numbers in an input, None where it is not there or they are not known."""

    def new(self) -> Number:
        """Return a dimension that nothing is known about."""


@dataclass
class Known:
    """Shapes and numbers, by value."""

    shape: dict[ir.Value, Shape] = field(default_factory=dict)
    number: dict[ir.Value, Array] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    """The symbols of the inputs: a shape made of them alone is known."""
    _dims: dict[str, Number] = field(default_factory=dict)
    _count: int = 0

    def new(self) -> Number:
        """Return a dimension that nothing is known about."""
        self._count += 1
        return symbol(f"?{self._count}")

    def named(self, dim: int | str | None) -> Number:
        """Return the number of a dimension; ONNX's inference names what it does not know unk__."""
        if isinstance(dim, int):
            return dim
        if dim is None or (dim.startswith("unk__") and dim not in self._dims):
            return self.new()
        return self._dims.setdefault(dim, symbol(f"'{dim}'"))

    def name(self, number: Number) -> int | str:
        """Return what `named` turns back into ``number``."""
        if isinstance(number, int):
            return number
        self._dims[str(number)] = number
        return str(number)

    def shape_of(self, node: ir.Node, index: int) -> Shape | None:
        """Return the shape of an input, None where it is not there or not known."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.shape.get(value)

    def numbers_of(self, node: ir.Node, index: int) -> list[Number] | None:
        """Return the numbers in an input, None where it is not there or they are not known."""
        value = node.inputs[index] if index < len(node.inputs) else None
        array = self.number.get(value) if value is not None else None
        return None if array is None else list(array.reshape(-1))


# ----------------------------------------------------------------- numbers of one node


def _each(function: Callable[..., Number | None]) -> Callable[[ir.Node, Sequence[Array]], Array]:
    """Apply ``function`` to every element, with numpy's broadcasting."""

    def rule(node: ir.Node, x: Sequence[Array]) -> Array:
        result = np.frompyfunc(function, len(x), 1)(*x)
        array = np.asarray(result, object) if not isinstance(result, np.ndarray) else result
        if any(n is None or (isinstance(n, int) and abs(n) >= 2**63) for n in array.reshape(-1)):
            raise ValueError("not known, or no 64-bit integer")
        return array

    return rule


def _shape(node: ir.Node, x: Sequence[Array]) -> Array:
    start = node.attributes.get_int("start", 0)
    return x[0][start : node.attributes.get_int("end", len(x[0]))]


def _gather(node: ir.Node, x: Sequence[Array]) -> Array:
    axis = node.attributes.get_int("axis", 0)
    return np.asarray(np.take(x[0], x[1].astype(np.int64), axis), object)


def _slice(node: ir.Node, x: Sequence[Array]) -> Array:
    return x[0][slice_index(x[0].ndim, x[1:])]


def _reshape(node: ir.Node, x: Sequence[Array]) -> Array:
    return x[0].reshape([int(d) for d in x[1]])


def _cast(node: ir.Node, x: Sequence[Array]) -> Array:
    to = node.attributes.get_int("to")
    symbols = any(not isinstance(n, int) for n in x[0].reshape(-1))
    if to == ir.DataType.BOOL and not symbols:
        return x[0].astype(bool).astype(object)
    large = any(isinstance(n, int) and abs(n) > _END for n in x[0].reshape(-1))
    if to not in (ir.DataType.INT64, ir.DataType.INT32) or (large and to == ir.DataType.INT32):
        raise ValueError("no integer")
    return x[0]


def _fill(node: ir.Node, x: Sequence[Array]) -> Array:
    tensor = node.attributes.get_tensor("value")
    if tensor is None or tensor.dtype not in WHOLE or int(x[0][0]) > MOST:
        raise ValueError("no integers")
    return np.full([int(d) for d in x[0]], int(tensor.numpy().item()), object)


def _opposite(known: Number | None) -> bool | None:
    return not known if isinstance(known, int) else None


def _where(condition: Number, a: Number, b: Number) -> Number | None:
    if not isinstance(condition, int):
        return None
    return a if condition else b


def _squeeze(node: ir.Node, x: Sequence[Array]) -> Array:
    return np.asarray(np.squeeze(x[0], tuple(map(int, x[1])) if len(x) > 1 else None), object)


def _unsqueeze(node: ir.Node, x: Sequence[Array]) -> Array:
    return np.expand_dims(x[0], tuple(map(int, x[1])))


def _range(node: ir.Node, x: Sequence[Array]) -> Array:
    numbers = range(*(int(n.item()) for n in x))
    if len(numbers) > MOST:
        raise ValueError("too many")
    return np.array(numbers, object)


def _expand(node: ir.Node, x: Sequence[Array]) -> Array:
    return np.asarray(np.broadcast_to(x[0], np.broadcast_shapes(x[0].shape, tuple(x[1]))), object)


# ------------------------------------------------------------------ shapes of one node


def _reshaped(found: Reader, node: ir.Node) -> Shape | None:
    source, target = found.shape_of(node, 0), found.numbers_of(node, 1)
    if target is None:
        return _fresh_rank(found, node)
    if 0 in target and node.attributes.get_int("allowzero", 0) == 1:
        return None
    before = source if source is not None else [found.new() for _ in target]
    given = [before[i] if n == 0 and i < len(before) else n for i, n in enumerate(target)]
    if -1 in given:
        rest = product(n for n in given if n != -1)
        whole = divided(product(source), rest) if source is not None else None
        given[given.index(-1)] = found.new() if whole is None else whole
    return tuple(given)


def _fresh_rank(found: Reader, node: ir.Node) -> Shape | None:
    target = found.shape_of(node, 1)
    if target is None or not isinstance(target[0], int):
        return None
    inferred = dims.read(node.outputs[0]) or [None] * target[0]
    return tuple(d if isinstance(d, int) else found.new() for d in inferred)


def _expanded(found: Reader, node: ir.Node) -> Shape | None:
    source, target = found.shape_of(node, 0), found.numbers_of(node, 1)
    if source is None or target is None:
        return None
    rank = max(len(source), len(target))
    before = (1,) * (rank - len(source)) + source
    after = (1,) * (rank - len(target)) + tuple(target)
    return tuple(broadcast(found, a, b) for a, b in zip(before, after, strict=True))


def broadcast(found: Reader, a: Number, b: Number) -> Number:
    """Return the dimension that two together give."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    plain = next((n for n in (a, b) if isinstance(n, int)), None)
    return found.new() if plain is None else plain  # the other one must be 1 or the same


def _sliced(found: Reader, node: ir.Node) -> Shape | None:
    source = found.shape_of(node, 0)
    parts = [found.numbers_of(node, index) for index in range(1, 5)]
    starts, ends, axes, steps = parts
    if source is None or starts is None or ends is None:
        return None
    if any(p is None and len(node.inputs) > i and node.inputs[i] for i, p in enumerate(parts, 1)):
        return None
    shape = list(source)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[i] if axes is not None else i
        if not isinstance(axis, int):
            return None
        step = steps[i] if steps is not None else 1
        shape[axis] = _slice_length(found, shape[axis], start, end, step)
    return tuple(shape)


def _slice_length(found: Reader, size: Number, start: Number, end: Number, step: Number) -> Number:
    if not isinstance(step, int) or step < 1:
        return found.new()
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(size)[start:end:step])
    if step > 1:
        return found.new()
    full = end == size or (isinstance(end, int) and end >= _END)
    return size if start == 0 and full else found.new()


def _joined(found: Reader, node: ir.Node) -> Shape | None:
    shapes = [found.shape_of(node, index) for index in range(len(node.inputs))]
    if any(shape is None for shape in shapes) or shapes[0] is None:
        return None
    axis = (node.attributes.get_int("axis") or 0) % len(shapes[0])
    total: Number = 0
    for shape in shapes:
        assert shape is not None
        total = add(total, shape[axis])
    return (*shapes[0][:axis], total, *shapes[0][axis + 1 :])


def _filled(found: Reader, node: ir.Node) -> Shape | None:
    numbers = found.numbers_of(node, 0)
    return None if numbers is None else tuple(numbers)


def _ranged(found: Reader, node: ir.Node) -> Shape | None:
    start, limit, step = (found.numbers_of(node, index) for index in range(3))
    if start is None or limit is None or step is None or (start[0], step[0]) != (0, 1):
        return None
    return (limit[0],) if is_natural(limit[0]) else None


def _flat(found: Reader, node: ir.Node) -> Shape | None:
    source = found.shape_of(node, 0)
    axis = node.attributes.get_int("axis", 1)
    if source is None or axis < 0:
        return None
    return (product(source[:axis]), product(source[axis:]))


WHOLE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
"""Types of numbers that are followed."""

NUMBERS: dict[str, Callable[[ir.Node, Sequence[Array]], Array]] = {
    "Add": _each(add),
    "Div": _each(divide),
    "Equal": _each(equal),
    "Greater": _each(lambda a, b: less(b, a)),
    "GreaterOrEqual": _each(lambda a, b: _opposite(less(a, b))),
    "Less": _each(less),
    "LessOrEqual": _each(lambda a, b: _opposite(less(b, a))),
    "Mod": _each(remainder),
    "Mul": _each(multiply),
    "Not": _each(_opposite),
    "Sub": _each(subtract),
    "Where": _each(_where),
    "Cast": _cast,
    "Concat": lambda node, x: np.concatenate(x, node.attributes.get_int("axis") or 0),
    "ConstantOfShape": _fill,
    "Expand": _expand,
    "Gather": _gather,
    "Identity": lambda node, x: x[0],
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda node, x: np.asarray(product(x[0]), object),
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": lambda node, x: np.transpose(x[0], node.attributes.get_ints("perm")),
    "Unsqueeze": _unsqueeze,
}
"""Operators of shape arithmetic."""

SHAPES: dict[str, Callable[[Reader, ir.Node], Shape | None]] = {
    "Concat": _joined,
    "ConstantOfShape": _filled,
    "Expand": _expanded,
    "Flatten": _flat,
    "Range": _ranged,
    "Reshape": _reshaped,
    "Slice": _sliced,
}
"""Operators whose shapes ONNX does not follow through symbols."""
