"""Poolings: torch's own where it agrees with ONNX, else sums over the window's offsets."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode
from onnxslim_kd.training.ops_window import Window, torch_pads, window

MAX_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _window(node: OpNode) -> Window:
    kernel = node.ints("kernel_shape") or []
    if len(kernel) not in MAX_POOL:
        raise node.refuse(f"it has {len(kernel)} spatial axes, 1 to 3 are supported")
    return window(node, kernel)


def _native(w: Window) -> bool:
    """Tell whether torch pads alike: on both sides the same, at most half of the kernel."""
    return w.symmetric and all(p <= k // 2 for p, k in zip(w.begin, w.kernel, strict=True))


def _filled(x: Tensor, w: Window, value: float) -> Tensor:
    """Pad (or crop) ``x`` so that the windows end exactly with it."""
    sizes = x.shape[2:]
    begin, _ = w.pads(sizes)
    out = w.output_sizes(sizes)
    end = [
        (o - 1) * s + (k - 1) * d + 1 - n - b
        for o, s, k, d, n, b in zip(
            out, w.strides, w.kernel, w.dilations, sizes, begin, strict=True
        )
    ]
    return F.pad(x, torch_pads(begin, end), value=value)


def _taps(x: Tensor, w: Window) -> Iterator[Tensor]:
    """Yield what each offset of the kernel sees, for all windows at once."""
    reach = [(k - 1) * d for k, d in zip(w.kernel, w.dilations, strict=True)]
    for offsets in itertools.product(*(range(k) for k in w.kernel)):
        begin = [o * d for o, d in zip(offsets, w.dilations, strict=True)]
        seen = x
        for i, b in enumerate(begin):
            seen = seen[_along(i + 2, slice(b, x.shape[i + 2] - reach[i] + b, w.strides[i]))]
        yield seen


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, part)


def _total(x: Tensor, w: Window) -> Tensor:
    return torch.stack(list(_taps(x, w))).sum(0)


# --------------------------------------------------------------------------- maximum


def max_pool(node: OpNode) -> Kernel:
    """Take the largest of each window; the second output holds flat indices."""
    w = _window(node)
    pool, native, indices = MAX_POOL[len(w.kernel)], _native(w), any(node.outputs[1:])
    if native and not indices:
        return lambda x: pool(x, w.kernel, w.strides, w.begin, w.dilations, w.ceil)
    if node.get("storage_order", 0) and indices:
        raise node.refuse("column-major indices are not supported")

    def run(x: Tensor) -> Any:
        lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        filled = _filled(x, w, lowest)
        if not indices:
            return pool(filled, w.kernel, w.strides, 0, w.dilations)
        values, flat = pool(filled, w.kernel, w.strides, 0, w.dilations, return_indices=True)
        return values, _onnx_indices(flat, filled.shape, x.shape, w)

    return run


def _onnx_indices(flat: Tensor, filled: torch.Size, shape: torch.Size, w: Window) -> Tensor:
    """Turn torch's indices into a padded plane into ONNX's indices into the whole input."""
    begin, _ = w.pads(shape[2:])
    position = torch.zeros_like(flat)
    scale = 1
    for axis in reversed(range(len(begin))):
        coordinate = flat % filled[axis + 2] - begin[axis]
        flat = flat // filled[axis + 2]
        position = position + coordinate * scale
        scale *= shape[axis + 2]
    planes = torch.arange(shape[0] * shape[1], device=flat.device)
    return position + scale * planes.reshape(shape[0], shape[1], *[1] * len(begin))


def max_unpool(node: OpNode) -> Kernel:
    """Put values back where MaxPool took them."""
    w = _window(node)
    if node.has(2):
        raise node.refuse("output_shape is not supported")

    def run(x: Tensor, indices: Tensor) -> Tensor:
        sizes = [
            (n - 1) * s + k - b - e
            for n, s, k, b, e in zip(x.shape[2:], w.strides, w.kernel, w.begin, w.end, strict=True)
        ]
        result = x.new_zeros(x.shape[0] * x.shape[1] * math.prod(sizes))
        result = result.scatter(0, indices.reshape(-1), x.reshape(-1))
        return result.reshape(*x.shape[:2], *sizes)

    return run


# ------------------------------------------------------------------- sums and means


def average_pool(node: OpNode) -> Kernel:
    """Average each window; padding counts if asked, what ceil_mode adds beyond never."""
    w = _window(node)
    padding_counts = bool(node.get("count_include_pad", 0))
    if _native(w) and set(w.dilations) == {1}:
        pool = AVG_POOL[len(w.kernel)]
        return lambda x: pool(x, w.kernel, w.strides, w.begin, w.ceil, padding_counts)

    def run(x: Tensor) -> Tensor:
        return _total(_filled(x, w, 0.0), w) / _counts(x, w, padding_counts=padding_counts)

    return run


def _counts(x: Tensor, w: Window, *, padding_counts: bool) -> Tensor:
    """Return how many elements of each window count."""
    sizes = x.shape[2:]
    begin, end = w.pads(sizes)
    inside = x.new_ones(1, 1, *sizes)
    if not padding_counts:
        return _total(_filled(inside, w, 0.0), w)
    padded = F.pad(inside, torch_pads(begin, end), value=1.0)
    filled = _filled(inside, w, 0.0)
    beyond = [f - p for f, p in zip(filled.shape[2:], padded.shape[2:], strict=True)]
    counted = F.pad(padded, torch_pads([0] * len(beyond), beyond))
    return _total(counted, w)


def lp_pool(node: OpNode) -> Kernel:
    """Take the p-norm of each window."""
    w, p = _window(node), node.get("p", 2)

    def run(x: Tensor) -> Tensor:
        powers = _filled(x.abs() ** p, w, 0.0)
        return _total(powers, w) ** (1 / p)

    return run


# ---------------------------------------------------------------------------- global


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def global_average(node: OpNode) -> Kernel:
    """Average over all spatial axes."""
    return lambda x: x.mean(_spatial(x), keepdim=True)


def global_max(node: OpNode) -> Kernel:
    """Take the largest over all spatial axes."""
    return lambda x: x.amax(_spatial(x), keepdim=True)


def global_lp(node: OpNode) -> Kernel:
    """Take the p-norm over all spatial axes."""
    p = node.get("p", 2)
    return lambda x: torch.linalg.vector_norm(x, p, _spatial(x), keepdim=True)


POOL = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average,
    "GlobalLpPool": global_lp,
    "GlobalMaxPool": global_max,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
}
