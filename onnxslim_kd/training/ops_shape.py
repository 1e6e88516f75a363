"""Shapes: their arithmetic, and operators that move elements without computing."""

from typing import Any

import torch
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode, torch_dtype

# --------------------------------------------------------------------- sizes, makers


def shape(node: OpNode) -> Kernel:
    """Return the sizes, on the CPU."""
    start, end = node.get("start", 0), node.attributes.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def size(node: OpNode) -> Kernel:
    """Return the number of elements, on the CPU."""
    return lambda x: torch.tensor(x.numel())


def constant(node: OpNode) -> Kernel:
    """Return the tensor, number or list in the attribute."""
    ((name, value),) = node.attributes.items()
    if name in ("sparse_value", "value_string", "value_strings"):
        raise node.refuse(f"{name} is not supported")
    if isinstance(value, Tensor):
        return lambda: value
    dtype = torch.float32 if name.startswith("value_float") else torch.int64
    return lambda: torch.tensor(value, dtype=dtype)


def constant_of_shape(node: OpNode) -> Kernel:
    """Fill a shape with one number."""
    sizes, value = node.numbers(0), node.get("value", torch.zeros(1))
    return lambda x: torch.full(sizes(x), value.item(), dtype=value.dtype)


def arange(node: OpNode) -> Kernel:
    """Count from start to limit by delta."""
    node.host.update((0, 1, 2))

    def run(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, last, step = start.item(), limit.item(), delta.item()
        if (last - first) * step <= 0:
            return torch.empty(0, dtype=start.dtype)
        return torch.arange(first, last, step, dtype=start.dtype)

    return run


def eye_like(node: OpNode) -> Kernel:
    """Make a matrix with ones on its k-th diagonal."""
    k, code = node.get("k", 0), node.attributes.get("dtype")

    def run(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape, dtype=x.dtype if code is None else torch_dtype(code))
        return torch.triu(torch.tril(ones, k), k).to(x.device)

    return run


# -------------------------------------------------------------------------- reshapes


def reshape(node: OpNode) -> Kernel:
    """Reshape; 0 keeps a size unless allowzero, -1 takes what is left."""
    sizes, keep = node.numbers(1), not node.get("allowzero", 0)
    fixed = node.fixed(1)
    if fixed is not None and not (keep and 0 in fixed):
        return lambda x, _: x.reshape(fixed)

    def run(x: Tensor, target: Tensor | None) -> Tensor:
        wanted = sizes(target)
        if keep:
            wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        return x.reshape(wanted)

    return run


def flatten(node: OpNode) -> Kernel:
    """Make a matrix: axes before ``axis``, and the others."""
    axis = node.get("axis", 1)

    def run(x: Tensor) -> Tensor:
        rows = x.shape[:axis].numel()
        return x.reshape(rows, -1 if x.numel() else x.shape[axis:].numel())

    return run


def squeeze(node: OpNode) -> Kernel:
    """Remove axes of size 1, those given or all."""
    if not node.has(1):
        return lambda x, *_: x.squeeze()
    axes = node.numbers(1)
    return lambda x, wanted: x.squeeze(tuple(axes(wanted)))


def unsqueeze(node: OpNode) -> Kernel:
    """Insert axes of size 1, counted in the result."""
    axes = node.numbers(1)
    fixed = node.fixed(1)
    if fixed is not None and len(fixed) == 1:
        (axis,) = fixed
        return lambda x, _: x.unsqueeze(axis)

    def run(x: Tensor, wanted: Tensor | None) -> Tensor:
        numbers = axes(wanted)
        rank = x.dim() + len(numbers)
        for axis in sorted(n % rank for n in numbers):
            x = x.unsqueeze(axis)
        return x

    return run


def transpose(node: OpNode) -> Kernel:
    """Permute axes; by default reverse them."""
    perm = node.ints("perm")
    if perm is None:
        return lambda x: x.permute(*reversed(range(x.dim())))
    return lambda x: x.permute(perm)


def expand(node: OpNode) -> Kernel:
    """Broadcast to a shape; sizes of 1 there keep the input's."""
    sizes = node.numbers(1)

    def run(x: Tensor, target: Tensor | None) -> Tensor:
        shape: torch.Size = torch.broadcast_shapes(x.shape, sizes(target))  # type: ignore[no-untyped-call]
        return x.expand(shape)

    return run


def tile(node: OpNode) -> Kernel:
    """Repeat along each axis."""
    repeats = node.numbers(1)
    return lambda x, target: x.repeat(repeats(target))


def depth_to_space(node: OpNode) -> Kernel:
    """Move channels into blocks of pixels."""
    block, columns_first = node.get("blocksize", 1), node.get("mode", "DCR") == "CRD"

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if columns_first:
            return torch.pixel_shuffle(x, block)
        parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(n, c // block**2, h * block, w * block)

    return run


def space_to_depth(node: OpNode) -> Kernel:
    """Move blocks of pixels into channels."""
    block = node.get("blocksize", 1)

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(n, c * block**2, h // block, w // block)

    return run


# ------------------------------------------------------------------------- joins, cuts


def concat(node: OpNode) -> Kernel:
    """Join along an axis."""
    axis = node.get("axis", 0)
    return lambda *inputs: torch.cat(inputs, axis)


def split(node: OpNode) -> Kernel:
    """Cut along an axis: by sizes, or into as equal parts as there are outputs."""
    axis, count = node.get("axis", 0), node.get("num_outputs", len(node.outputs))
    sizes = node.numbers(1) if node.has(1) else None
    single = len(node.outputs) == 1

    def run(x: Tensor, wanted: Tensor | None = None) -> Any:
        parts = sizes(wanted) if sizes else -(-x.shape[axis] // count)
        result = torch.split(x, parts, axis)
        return result[0] if single else result

    return run


def cut(node: OpNode) -> Kernel:
    """Slice along axes; backwards, a start before the first element is the first element."""
    starts, ends = node.numbers(1), node.numbers(2)
    axes = node.numbers(3) if node.has(3) else None
    steps = node.numbers(4) if node.has(4) else None

    def run(
        x: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        axis: Tensor | None = None,
        step: Tensor | None = None,
    ) -> Tensor:
        first = starts(start)
        along = axes(axis) if axes else range(len(first))
        strides = steps(step) if steps else [1] * len(first)
        for a, b, e, s in zip(along, first, ends(end), strides, strict=True):
            x = _cut_axis(x, a, slice(b if s > 0 else max(b, -x.shape[a]), e, s))
        return x

    return run


def _cut_axis(x: Tensor, axis: int, part: slice) -> Tensor:
    begin, end, step = part.indices(x.shape[axis])
    axis %= x.dim()
    everything = (slice(None),) * axis
    if step > 0:
        return x[(*everything, slice(begin, max(end, begin), step))]
    wanted = range(begin, end, step)  # torch has no negative steps
    if not wanted:
        return x[(*everything, slice(0, 0))]
    return x[(*everything, slice(wanted[-1], begin + 1, -step))].flip(axis)


def trilu(node: OpNode) -> Kernel:
    """Keep the upper or lower triangle."""
    keep = torch.triu if node.get("upper", 1) else torch.tril
    if not node.has(1):
        return lambda x, *_: keep(x)
    diagonal = node.numbers(1)
    return lambda x, k: keep(x, diagonal(k)[0])


SHAPE = {
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Range": arange,
    "Reshape": reshape,
    "Shape": shape,
    "Size": size,
    "Slice": cut,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
