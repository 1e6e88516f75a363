"""Put together again what exporters take apart, where torch has one kernel for the whole.

ONNX had no GELU before opset 20, no attention before 23, and has no biased product of more than two
axes, so files spell them out; each extra operator costs time and a copy of the activations. Only
chains whose inner values nobody else reads are touched. Before and after::

    0.5 * x * (1 + erf(x / sqrt(2)))     gelu(x)
    x * sigmoid(x)                       silu(x)
    x * clip(x + 3, 0, 6) / 6            hardswish(x)
    x @ w + b                            linear(x, w.T, b)
    softmax(q @ k.T * scale + mask) @ v  scaled_dot_product_attention(q, k, v, mask, scale)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, fx

Fused: TypeAlias = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""A kernel and what to call it with."""


def fuse(graph: fx.Graph, buffers: Mapping[str, Tensor]) -> int:
    """Fuse what can be fused in ``graph``; return how much."""
    count = 0
    for node in list(graph.nodes):
        fuser = FUSERS.get(_op(node))
        found = fuser(node, buffers) if fuser is not None else None
        if found is not None:
            kernel, args = found
            with graph.inserting_before(node):
                fused = graph.call_function(kernel, args)
            fused.meta = {**node.meta, "op": "fused"}
            node.replace_all_uses_with(fused)
            count += 1
    for node in reversed(graph.nodes):
        if "op" in node.meta and not node.users:
            graph.erase_node(node)
    return count


def _op(node: Any) -> str:
    return str(node.meta.get("op", "")) if isinstance(node, fx.Node) else ""


def _inside(node: Any, op: str) -> bool:
    """Tell whether ``node`` is an ``op`` that only one other node reads."""
    return _op(node) == op and len(node.users) == 1


def _number(node: Any, buffers: Mapping[str, Tensor]) -> float | None:
    """Return the number that a constant holds, or None."""
    held = buffers.get(node.meta.get("value", "")) if isinstance(node, fx.Node) else None
    return held.item() if held is not None and held.numel() == 1 else None


# --------------------------------------------------------------------------- products


@dataclass
class _Factors:
    """A product: a number times nodes."""

    number: float = 1.0
    nodes: list[fx.Node] = field(default_factory=list)


def _factors(node: fx.Node, buffers: Mapping[str, Tensor]) -> _Factors:
    """Take the product ending in ``node`` apart, through inner products of its own."""
    result = _Factors()
    for part, sign in _parts(node, buffers, root=True):
        number = _number(part, buffers)
        if number is None:
            result.nodes.append(part)
        else:
            result.number *= number**sign
    return result


def _parts(
    node: fx.Node, buffers: Mapping[str, Tensor], *, root: bool = False
) -> Iterator[tuple[fx.Node, int]]:
    if _op(node) == "Mul" and (root or len(node.users) == 1):
        for part in node.args:
            assert isinstance(part, fx.Node)
            yield from _parts(part, buffers)
    elif _op(node) == "Div" and (root or len(node.users) == 1):
        top, bottom = node.args
        if isinstance(top, fx.Node) and isinstance(bottom, fx.Node) and _number(bottom, buffers):
            yield from _parts(top, buffers)
            yield bottom, -1
        else:
            yield node, 1
    else:
        yield node, 1


def _product(node: fx.Node, buffers: Mapping[str, Tensor]) -> Fused | None:
    factors = _factors(node, buffers)
    if len(factors.nodes) != 2:
        return None
    for x, gate in (factors.nodes, factors.nodes[::-1]):
        for matches, kernel in GATES:
            if matches(x, gate, factors.number, buffers):
                return kernel, (x,)
    return None


def _is_gelu(x: fx.Node, gate: fx.Node, number: float, buffers: Mapping[str, Tensor]) -> bool:
    if not math.isclose(number, 0.5, rel_tol=1e-6) or not _inside(gate, "Add"):
        return False
    numbers = [n for arg in gate.args if (n := _number(arg, buffers)) is not None]
    erf = next((arg for arg in gate.args if _inside(arg, "Erf")), None)
    if numbers != [1.0] or not isinstance(erf, fx.Node):
        return False
    (scaled,) = erf.all_input_nodes
    inner = _factors(scaled, buffers)
    return (
        len(scaled.users) == 1
        and inner.nodes == [x]
        and math.isclose(inner.number, math.sqrt(0.5), rel_tol=1e-5)
    )


def _is_silu(x: fx.Node, gate: fx.Node, number: float, buffers: Mapping[str, Tensor]) -> bool:
    return number == 1 and _inside(gate, "Sigmoid") and gate.args == (x,)


def _is_hard_swish(x: fx.Node, gate: fx.Node, number: float, buffers: Mapping[str, Tensor]) -> bool:
    if not _inside(gate, "Clip") or not math.isclose(number, 1 / 6, rel_tol=1e-6):
        return False
    moved = gate.args[0]
    if gate.meta["numbers"][1:] != [0.0, 6.0] or not _inside(moved, "Add"):
        return False
    assert isinstance(moved, fx.Node)
    return x in moved.args and [_number(arg, buffers) for arg in moved.args if arg is not x] == [3]


GATES: list[tuple[Callable[..., bool], Callable[..., Tensor]]] = [
    (_is_gelu, F.gelu),
    (_is_silu, F.silu),
    (_is_hard_swish, F.hardswish),
]


# ----------------------------------------------------------------------------- linear


def _affine(node: fx.Node, buffers: Mapping[str, Tensor]) -> Fused | None:
    for product, bias in (node.args, node.args[::-1]):
        if _inside(product, "MatMul") and _is_affine(product, bias):
            assert isinstance(product, fx.Node)
            x, w = product.args
            assert isinstance(w, fx.Node)
            return (F.linear, (x, w.args[0], bias)) if _turned(w) else (linear, (x, w, bias))
    return None


def _is_affine(product: Any, bias: Any) -> bool:
    x, w = product.args
    shape = w.args[0].meta.get("shape", ())[::-1] if _turned(w) else w.meta.get("shape", ())
    return (
        len(shape) == 2
        and isinstance(bias, fx.Node)
        and bias.meta.get("shape") == shape[1:]
        and (x.meta.get("rank") or 0) >= 2
    )


def _turned(w: fx.Node) -> bool:
    """Tell whether ``w`` transposes a matrix, as files have it that hold torch's weights."""
    return _op(w) == "Transpose" and w.meta["attributes"].get("perm", (1, 0)) == (1, 0)


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return x @ w + b."""
    return F.linear(x, w.t(), b)


# -------------------------------------------------------------------------- attention


def _attention(node: fx.Node, buffers: Mapping[str, Tensor]) -> Fused | None:
    weights, v = node.args
    softmax = _unguarded(weights, buffers)
    if softmax is None or node.meta["rank"] != 4:
        return None
    if softmax.meta["attributes"].get("axis", -1) not in (-1, 3):
        return None
    scores, mask = _unmasked(softmax.args[0], buffers)
    factors = _factors(scores, buffers) if scores is not None else _Factors()
    if len(factors.nodes) != 1 or not _inside(factors.nodes[0], "MatMul"):
        return None
    q, k = (_factors(arg, buffers) for arg in factors.nodes[0].args if isinstance(arg, fx.Node))
    if len(q.nodes) != 1 or len(k.nodes) != 1:
        return None
    scale = factors.number * q.number * k.number
    return attend, (q.nodes[0], k.nodes[0], v, mask, scale)


def _unguarded(weights: Any, buffers: Mapping[str, Tensor]) -> fx.Node | None:
    """Return the softmax behind ``weights``, maybe with its NaN of masked rows replaced by 0."""
    if _inside(weights, "Softmax"):
        return weights  # type: ignore[no-any-return]
    if not _inside(weights, "Where"):
        return None
    test, zero, softmax = weights.args
    guarded = _inside(test, "IsNaN") and test.args == (softmax,) and _number(zero, buffers) == 0
    return softmax if guarded and _op(softmax) == "Softmax" and len(softmax.users) == 2 else None


def _unmasked(scores: Any, buffers: Mapping[str, Tensor]) -> tuple[fx.Node | None, fx.Node | None]:
    """Take the added mask, unless it is all zeros, off the scores."""
    if not _inside(scores, "Add"):
        return (scores if len(scores.users) == 1 else None), None
    first, second = scores.args
    product, mask = (first, second) if _op(first) in SCORES else (second, first)
    held = buffers.get(mask.meta.get("value", ""))
    return product, None if held is not None and not held.any() else mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(q @ k * scale + mask) @ v; ``k`` is transposed, as ONNX has it."""
    return F.scaled_dot_product_attention(q, k.transpose(-1, -2), v, mask, scale=scale)


SCORES = frozenset({"MatMul", "Mul", "Div"})
FUSERS: dict[str, Callable[[fx.Node, Mapping[str, Tensor]], Fused | None]] = {
    "Add": _affine,
    "Div": _product,
    "MatMul": _attention,
    "Mul": _product,
}
