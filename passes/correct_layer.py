"""Fit one layer to what it should give: rows of inputs and outputs, a ridge regression, a bias."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np
import onnx_ir as ir

from onnxslim_kd.model import constant, dims, new_initializer
from onnxslim_kd.passes.channels import Ids
from onnxslim_kd.runtime import Array

ROWS = (2000, 16384)
"""The fewest and the most rows of a regression; between, four for every unknown."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, inf)
"""Tried as shares of the mean squared input; the last one leaves only the bias to change."""
HELD_OUT = 4
"""One batch in four decides, the others fit; of a single batch, one row in four."""


@dataclass(frozen=True)
class Corrected:
    """One layer: its relative squared error on held-out samples, before and after."""

    node: str
    before: float
    after: float


def can_be_fitted(node: ir.Node) -> bool:
    """Tell whether a layer is a product with a weight that no other layer reads, plus a vector."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return False
    weight, get = constant(node.inputs[1]), node.attributes.get_int
    if weight is None or weight.dtype.kind != "f" or _uses(node.inputs[1]) > 1:
        return False
    if not _is_vector(_own_bias(node)):
        return False
    if node.op_type == "Conv":
        padded = node.attributes.get_string("auto_pad", "NOTSET")
        return get("group", 1) == 1 and padded == "NOTSET"
    if node.op_type == "Gemm":
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        return factors == [1.0, 1.0] and not get("transA", 0)
    return weight.ndim == 2


# ------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Rows:
    """What a layer got and should have given, one row per position; the last part is held out."""

    inputs: Array
    wanted: Array
    fit: int
    """How many rows fit; the others decide."""


def rows_of(node: ir.Node, kept: Ids, batches: Sequence[tuple[Array, Array]]) -> Rows:
    """Draw positions of what a layer gets, and of what it should give.

    Args:
        node: The layer.
        kept: Which of the output channels it still has.
        batches: The layer's inputs, and the original's outputs.
    """
    weight = constant(node.inputs[1])
    assert weight is not None
    unknowns = weight.size // len(kept)
    each = -(-min(max(4 * unknowns, ROWS[0]), ROWS[1]) // len(batches))
    rng = np.random.default_rng(0)
    pairs = [_positions(node, x, y, (each, rng)) for x, y in batches]
    inputs = np.concatenate([x for x, _ in pairs]).astype(np.float32)
    wanted = np.concatenate([y[:, kept] for _, y in pairs]).astype(np.float32)
    if len(pairs) == 1:
        order = rng.permutation(len(inputs))
        held = max(1, len(inputs) // HELD_OUT)
        return Rows(inputs[order], wanted[order], max(1, len(inputs) - held))
    held = max(1, len(pairs) // HELD_OUT)
    return Rows(inputs, wanted, sum(len(x) for x, _ in pairs[:-held]))


def _positions(
    node: ir.Node, x: Array, y: Array, draw: tuple[int, np.random.Generator]
) -> tuple[Array, Array]:
    """Up to so many random positions of a batch: the layer's inputs there, and its outputs."""
    most, rng = draw
    channels_last = np.moveaxis(y, 1, -1) if node.op_type == "Conv" else y
    flat = channels_last.reshape(-1, channels_last.shape[-1])
    chosen = np.sort(rng.permutation(len(flat))[:most])
    if node.op_type != "Conv":
        return x.reshape(-1, x.shape[-1])[chosen], flat[chosen]
    where = np.unravel_index(chosen, channels_last.shape[:-1])
    return _patches(node, x, where), flat[chosen]


def _patches(node: ir.Node, x: Array, where: tuple[Array, ...]) -> Array:
    """What a convolution sees at output positions, as ``[positions, channels * kernel]``."""
    kernel = tuple(size or 1 for size in dims(node.inputs[1])[2:])
    rank = len(kernel)
    get = node.attributes.get_ints
    pads = get("pads") or [0] * (2 * rank)
    strides, dilations = get("strides") or [1] * rank, get("dilations") or [1] * rank
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    batch, places = where[0], where[1:]
    taps = []
    for offset in np.ndindex(kernel):
        at = [p * s + o * d for p, s, o, d in zip(places, strides, offset, dilations, strict=True)]
        taps.append(padded[(batch, slice(None), *at)])
    return np.stack(taps, axis=-1).reshape(len(batch), x.shape[1] * prod(kernel))


# ------------------------------------------------------------------------------- fit


def update(node: ir.Node, rows: Rows) -> Corrected:
    """Fit a layer, and write the weights back if they are better on the rows held out."""
    weight = node.inputs[1]
    assert weight is not None
    is_conv, array = node.op_type == "Conv", constant(weight)
    assert array is not None
    turned = is_conv or bool(node.attributes.get_int("transB", 0))
    flat = array.reshape(len(array), -1).T if turned else array
    place, own = _place(node), constant(_own_bias(node))
    wanted = rows.wanted - (0 if own is None else own.reshape(-1).astype(np.float32))
    shifted = Rows(rows.inputs, wanted, rows.fit)
    before = best = _error(shifted, flat, np.zeros(1))
    for new, shift in _fits_of(shifted, flat, intercept=place is not None):
        error = _error(shifted, new, shift)
        if error < best:
            best = error
            shaped = (new.T if turned else new).reshape(array.shape).astype(array.dtype)
            weight.const_value = ir.Tensor(np.ascontiguousarray(shaped), name=weight.name)
            found = shift
    if best < before and place is not None:
        _shift(place, found.astype(array.dtype))
    return Corrected(node.name or "", before, best)


def _fits_of(rows: Rows, flat: Array, *, intercept: bool) -> Iterator[tuple[Array, Array]]:
    """Ridge regressions towards the weights that are there, for every strength."""
    from scipy.linalg import solve  # slow to import, and few ask for it

    x, y = rows.inputs[: rows.fit], rows.wanted[: rows.fit]
    mean_x, mean_y = (x.mean(0), y.mean(0)) if intercept else (np.zeros(1), np.zeros(1))
    x = x - mean_x.astype(np.float32)
    rest = y - mean_y.astype(np.float32) - x @ flat.astype(np.float32)
    wide = x.shape[1] > len(x)
    gram = (x @ x.T if wide else x.T @ x).astype(np.float64)
    scale = float(np.trace(gram)) / len(gram)
    for ridge in RIDGES if scale > 0 else (inf,):
        change: Array = np.zeros(1)
        if ridge < inf:
            damped = gram + ridge * scale * np.eye(len(gram))
            right = rest if wide else x.T @ rest
            change = solve(damped, right.astype(np.float64), assume_a="pos")
            change = x.T @ change if wide else change
        new = flat + change
        yield new, (mean_y - mean_x @ new if intercept else np.zeros(new.shape[1]))


def _error(rows: Rows, flat: Array, shift: Array) -> float:
    """The squared error on the rows held out, over the spread of what is wanted."""
    x, y = rows.inputs[rows.fit :], rows.wanted[rows.fit :]
    spread = float(np.square(y - y.mean(0)).sum()) or 1.0
    return float(np.square(y - x @ flat - shift).sum()) / spread


# ------------------------------------------------------------------------------ bias


@dataclass(frozen=True)
class _Place:
    """A constant input that is added to every channel of a layer's output, or taken off."""

    node: ir.Node
    index: int
    sign: int = 1


def _own_bias(node: ir.Node) -> ir.Value | None:
    """What the layer itself adds to its product."""
    return node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None


def _is_vector(value: ir.Value | None) -> bool:
    """Whether it is nothing, or constant and the same in every row."""
    array = constant(value)
    return value is None or (array is not None and array.size in (1, *array.shape[-1:]))


def _place(node: ir.Node) -> _Place | None:
    """Where a vector can be added to the layer's output: its bias, or what stands behind it."""
    behind, output = _follower(node), node.outputs[0]
    if node.op_type == "MatMul":
        if behind is None or behind.op_type != "Add":
            return None
        index = 1 if behind.inputs[0] is output else 0
        array, size = constant(behind.inputs[index]), dims(output)[-1]
        fits = array is not None and array.size == size and array.shape[-1] == size
        return _Place(behind, index) if fits else None
    if behind is not None and behind.op_type == "BatchNormalization" and _own_bias(node) is None:
        return _Place(behind, 3, -1) if constant(behind.inputs[3]) is not None else _Place(node, 2)
    return _Place(node, 2)


def _shift(place: _Place, by: Array) -> None:
    """Add a vector there; other readers of what stood there keep it as it was."""
    node, index = place.node, place.index
    node.resize_inputs(max(len(node.inputs), index + 1))
    value = node.inputs[index]
    array = constant(value)
    moved = place.sign * by if array is None else (array + place.sign * by).astype(array.dtype)
    if value is not None and array is not None and moved.shape == array.shape and _uses(value) == 1:
        value.const_value = ir.Tensor(moved, name=value.name)
    else:
        assert isinstance(node.graph, ir.Graph)
        new = new_initializer(node.graph, f"{node.name}.{'mean' if index == 3 else 'bias'}", moved)
        node.replace_input_with(index, new)


def _follower(node: ir.Node) -> ir.Node | None:
    """The one node that reads the layer's output."""
    users = [user for user, _ in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def _uses(value: ir.Value | None) -> int:
    return 0 if value is None else len(value.uses())
