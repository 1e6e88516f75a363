"""Operators that pick or put elements by index."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode

# ---------------------------------------------------------------------------- gather


def gather(node: OpNode) -> Kernel:
    """Pick slices along an axis."""
    axis, known = node.get("axis", 0), node.constants[1]
    if known is not None and known.dim() == 0:
        node.bound.add(1)
        position = int(known)
        return lambda x, _: x.select(axis, position)
    positive = known is not None and bool((known >= 0).all())

    def run(x: Tensor, index: Tensor) -> Tensor:
        along = axis % x.dim()
        flat = (index if positive else _wrapped(index, x.shape[along])).reshape(-1)
        picked = x.index_select(along, flat)
        return picked.reshape(*x.shape[:along], *index.shape, *x.shape[along + 1 :])

    return run


def _wrapped(index: Tensor, length: int) -> Tensor:
    """Count negative indices from the end."""
    return torch.where(index < 0, index + length, index).to(torch.int64)


def gather_elements(node: OpNode) -> Kernel:
    """Pick one element per index, along an axis."""
    axis = node.get("axis", 0)
    return lambda x, index: torch.gather(x, axis, _wrapped(index, x.shape[axis]))


def gather_nd(node: OpNode) -> Kernel:
    """Pick slices by tuples of indices."""
    batch = node.get("batch_dims", 0)

    def run(x: Tensor, index: Tensor) -> Tensor:
        depth = index.shape[-1]
        leading, inner = x.shape[:batch], x.shape[batch : batch + depth]
        flat = _linear(index, inner)
        count = leading.numel()
        start = torch.arange(count, device=index.device).reshape(
            *leading, *[1] * (flat.dim() - batch)
        )
        rows = x.reshape(count * inner.numel(), *x.shape[batch + depth :])
        picked = rows.index_select(0, (flat + start * inner.numel()).reshape(-1))
        return picked.reshape(*index.shape[:-1], *x.shape[batch + depth :])

    return run


def _linear(index: Tensor, sizes: torch.Size) -> Tensor:
    """Turn tuples of indices into positions in the flattened axes of ``sizes``."""
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for i, length in enumerate(sizes):
        flat = flat * length + _wrapped(index[..., i], length)
    return flat


# --------------------------------------------------------------------------- scatter


def scatter_elements(node: OpNode) -> Kernel:
    """Put one element per index, along an axis."""
    axis, reduction = node.get("axis", 0), node.get("reduction", "none")

    def run(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        where = _wrapped(index, x.shape[axis])
        if reduction == "none":
            return torch.scatter(x, axis, where, updates)
        if reduction == "add":
            return torch.scatter_add(x, axis, where, updates)
        return torch.scatter_reduce(x, axis, where, updates, _REDUCE[reduction])

    return run


def scatter_nd(node: OpNode) -> Kernel:
    """Put slices at tuples of indices."""
    reduction = node.get("reduction", "none")

    def run(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        depth = index.shape[-1]
        inner, rest = x.shape[:depth], x.shape[depth:]
        rows = x.reshape(inner.numel(), *rest)
        flat = _linear(index, inner).reshape(-1)
        values = updates.reshape(flat.numel(), *rest)
        if reduction == "none":
            result = rows.index_put((flat,), values)
        elif reduction == "add":
            result = rows.index_add(0, flat, values)
        else:
            where = flat.reshape(-1, *[1] * len(rest)).expand_as(values)
            result = rows.scatter_reduce(0, where, values, _REDUCE[reduction])
        return result.reshape(x.shape)

    return run


_REDUCE = {"mul": "prod", "max": "amax", "min": "amin"}


# ----------------------------------------------------------------- order and position


def extreme_index(pick: Callable[..., Tensor]) -> Callable[[OpNode], Kernel]:
    """Return the lowering of ArgMax or ArgMin."""

    def lower(node: OpNode) -> Kernel:
        axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
        if not node.get("select_last_index", 0):
            return lambda x: pick(x, axis, keepdim=keep)
        return lambda x: x.shape[axis] - 1 - pick(x.flip(axis), axis, keepdim=keep)

    return lower


def top_k(node: OpNode) -> Kernel:
    """Return the k largest or smallest; equal ones in their order (torch.topk would mix them)."""
    k, axis, largest = node.numbers(1), node.get("axis", -1), bool(node.get("largest", 1))

    def run(x: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
        values, index = torch.sort(x, dim=axis, descending=largest, stable=True)
        wanted = int(k(count)[0])
        return values.narrow(axis, 0, wanted), index.narrow(axis, 0, wanted)

    return run


def non_zero(node: OpNode) -> Kernel:
    """Return the indices of what is not zero, one column each."""
    return lambda x: torch.nonzero(x).t()


def one_hot(node: OpNode) -> Kernel:
    """Put the on-value at each index, the off-value elsewhere."""
    axis, depth = node.get("axis", -1), node.numbers(1)

    def run(index: Tensor, count: Tensor | None, values: Tensor) -> Tensor:
        n = int(depth(count)[0])
        steps = torch.arange(n, device=index.device, dtype=torch.int64)
        place = axis % (index.dim() + 1)
        steps = steps.reshape(-1, *[1] * (index.dim() - place))
        inside = _wrapped(index.to(torch.int64), n).unsqueeze(place) == steps
        return torch.where(inside, values[1], values[0])

    return run


def compress(node: OpNode) -> Kernel:
    """Keep the slices where the condition holds."""
    axis = node.attributes.get("axis")

    def run(x: Tensor, condition: Tensor) -> Tensor:
        chosen = torch.nonzero(condition).reshape(-1)
        return x.reshape(-1)[chosen] if axis is None else x.index_select(axis, chosen)

    return run


def accumulate(kernel: Callable[[Tensor, int], Tensor], neutral: int) -> Callable[[OpNode], Kernel]:
    """Return the lowering of CumSum or CumProd."""

    def lower(node: OpNode) -> Kernel:
        axes, reverse = node.numbers(1), node.get("reverse", 0)
        exclusive = node.get("exclusive", 0)

        def run(x: Tensor, along: Tensor | None) -> Tensor:
            axis = int(axes(along)[0])
            x = x.flip(axis) if reverse else x
            if exclusive:
                first = torch.full_like(x.narrow(axis, 0, 1), neutral)
                x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
            result = kernel(x, axis).to(x.dtype)
            return result.flip(axis) if reverse else result

        return run

    return lower


def reverse_sequence(node: OpNode) -> Kernel:
    """Reverse the first elements of each sequence."""
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        moved = x.movedim((batch, time), (0, 1))
        steps = torch.arange(moved.shape[1], device=x.device)
        ends = lengths.reshape(-1, 1)
        source = torch.where(steps < ends, ends - 1 - steps, steps)
        rows = torch.arange(moved.shape[0], device=x.device).reshape(-1, 1)
        return moved[rows, source].movedim((0, 1), (batch, time))

    return run


def unique(node: OpNode) -> Kernel:
    """Return sorted distinct elements (or slices), where they are, and how many."""
    axis = node.attributes.get("axis")
    if not node.get("sorted", 1):
        raise node.refuse("sorted=0 is not supported")

    def run(x: Tensor) -> Any:
        found, inverse, counts = torch.unique(
            x, sorted=True, return_inverse=True, return_counts=True, dim=axis
        )
        inverse = inverse.reshape(-1)
        places = torch.arange(inverse.numel(), device=x.device)
        first = torch.full_like(counts, inverse.numel())
        first = first.scatter_reduce(0, inverse, places, "amin")
        return found, first, inverse, counts

    return run


INDEX = {
    "ArgMax": extreme_index(torch.argmax),
    "ArgMin": extreme_index(torch.argmin),
    "Compress": compress,
    "CumProd": accumulate(torch.cumprod, 1),
    "CumSum": accumulate(torch.cumsum, 0),
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "NonZero": non_zero,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TopK": top_k,
    "Unique": unique,
}
