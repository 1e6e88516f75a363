"""Resize and sampling on grids.

Every mode of Resize is separable: along one axis it is a choice of indices (nearest) or a small
matrix (linear, cubic), made once per pair of sizes. Torch's own kernels, which are faster, take
the two-dimensional cases in which they compute the same.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode

Array: TypeAlias = np.ndarray[Any, Any]


class Resize:
    """The attributes of one node, and the matrices it has needed so far."""

    def __init__(self, node: OpNode) -> None:
        self.mode = node.get("mode", "nearest")
        self.coordinates = node.get("coordinate_transformation_mode", "half_pixel")
        self.nearest = node.get("nearest_mode", "round_prefer_floor")
        self.cubic = node.get("cubic_coeff_a", -0.75)
        self.exclude = bool(node.get("exclude_outside", 0))
        self.antialias = bool(node.get("antialias", 0))
        self.axes = node.ints("axes")
        self.policy = node.get("keep_aspect_ratio_policy", "stretch")
        self.scales = node.numbers(2) if node.has(2) else None
        self.sizes = node.numbers(3) if node.has(3) else None
        if self.coordinates == "tf_crop_and_resize":
            raise node.refuse("coordinate mode tf_crop_and_resize is not supported")
        node.host.add(1)
        self._held: dict[tuple[int, int, float, torch.device], Tensor] = {}

    def __call__(
        self,
        x: Tensor,
        roi: Tensor | None = None,
        scales: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Resize ``x`` along the axes that change."""
        del roi
        axes = self.axes or list(range(x.dim()))
        plan = self._plan(x, [a % x.dim() for a in axes], scales, sizes)
        if self._is_native(x, plan):
            return self._native(x, plan)
        for axis, (out, scale) in plan.items():
            if out != x.shape[axis] or scale != 1:
                x = self._along(x, axis, out, scale)
        return x

    def _plan(
        self, x: Tensor, axes: list[int], scales: Tensor | None, sizes: Tensor | None
    ) -> dict[int, tuple[int, float]]:
        """Return the new size and the scale of each axis."""
        given = self.sizes(sizes) if self.sizes else []
        if not given:
            assert self.scales is not None
            factors = self.scales(scales)
            return {a: (int(x.shape[a] * f), f) for a, f in zip(axes, factors, strict=True)}
        ratios = [n / x.shape[a] for a, n in zip(axes, given, strict=True)]
        if self.policy != "stretch":
            ratio = min(ratios) if self.policy == "not_larger" else max(ratios)
            return {a: (math.floor(x.shape[a] * ratio + 0.5), ratio) for a in axes}
        return {a: (n, r) for a, n, r in zip(axes, given, ratios, strict=True)}

    # ------------------------------------------------------------------ torch's kernels

    def _is_native(self, x: Tensor, plan: dict[int, tuple[int, float]]) -> bool:
        if x.dim() != 4 or self.antialias or self.exclude or not x.is_floating_point():
            return False
        exact = all(out == x.shape[a] * scale for a, (out, scale) in plan.items())
        planes = all(plan[a] == (x.shape[a], 1) for a in (0, 1) if a in plan)
        if self.mode == "nearest":
            kind = (self.coordinates, self.nearest) == ("asymmetric", "floor")
        else:
            kind = self.coordinates in _ALIGN and (self.mode == "linear" or self.cubic == -0.75)
            if self.coordinates == "pytorch_half_pixel":  # torch's only while there are several
                kind = kind and all(out > 1 for out, _ in plan.values())
        return exact and planes and kind

    def _native(self, x: Tensor, plan: dict[int, tuple[int, float]]) -> Tensor:
        size = [plan[a][0] if a in plan else x.shape[a] for a in (2, 3)]
        if self.mode == "nearest":
            return F.interpolate(x, size, mode="nearest")
        mode = "bilinear" if self.mode == "linear" else "bicubic"
        return F.interpolate(x, size, mode=mode, align_corners=_ALIGN[self.coordinates])

    # --------------------------------------------------------------------- one axis

    def _along(self, x: Tensor, axis: int, out: int, scale: float) -> Tensor:
        key = (x.shape[axis], out, scale, x.device)
        if key not in self._held:
            self._held[key] = self._table(*key[:3]).to(x.device)
        table = self._held[key]
        if self.mode == "nearest":
            return x.index_select(axis, table)
        held = x.movedim(axis, -1)
        return torch.matmul(held, table.to(x.dtype).t()).movedim(-1, axis)

    def _table(self, n: int, out: int, scale: float) -> Tensor:
        source = _source(self.coordinates, n, out, scale)
        if self.mode == "nearest":
            rounded = np.clip(_ROUND[self.nearest](source), 0, n - 1)
            return torch.from_numpy(rounded.astype(np.int64))
        return torch.from_numpy(self._matrix(source, n, scale))

    def _matrix(self, source: Array, n: int, scale: float) -> Array:
        """Return how much each input position counts for each output position."""
        stretch = max(1.0, 1 / scale) if self.antialias else 1.0
        radius = (1 if self.mode == "linear" else 2) * stretch
        matrix = np.zeros((len(source), n))
        for row, centre in enumerate(source):
            near = np.arange(math.floor(centre - radius), math.ceil(centre + radius) + 1)
            weights = self._filter((near - centre) / stretch)
            if self.exclude:
                weights = weights * ((near >= 0) & (near < n))
            np.add.at(matrix[row], np.clip(near, 0, n - 1), weights / weights.sum())
        return matrix

    def _filter(self, distance: Array) -> Array:
        t: Array = np.abs(distance)
        if self.mode == "linear":
            tent: Array = np.maximum(1 - t, 0)
            return tent
        a = self.cubic
        inner = ((a + 2) * t - (a + 3)) * t * t + 1
        outer = a * (((t - 5) * t + 8) * t - 4)
        return np.where(t <= 1, inner, np.where(t < 2, outer, 0))


def _source(mode: str, n: int, out: int, scale: float) -> Array:
    """Return where each output position lies in the input, rounded as ONNX Runtime does."""
    x = np.arange(out, dtype=np.float32)
    if mode == "align_corners":
        return x * ((n - 1) / (out - 1)) if out > 1 else x * 0
    if mode == "asymmetric":
        return x / scale
    if mode == "pytorch_half_pixel" and out == 1:
        return x * 0
    if mode == "half_pixel_symmetric":
        centre = n / 2 * (1 - out / (n * scale))
        return centre + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5


_ALIGN = {"half_pixel": False, "pytorch_half_pixel": False, "align_corners": True}
_ROUND: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def resize(node: OpNode) -> Kernel:
    """Resize by scales or to sizes."""
    plan = Resize(node)
    return lambda *inputs: plan(*inputs)


def upsample(node: OpNode) -> Kernel:
    """Resize by scales, as before there was Resize."""
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    plan = Resize(replace(node, attributes={**node.attributes, **old}))
    plan.scales = node.numbers(1)
    return lambda x, scales: plan(x, None, scales)


def grid_sample(node: OpNode) -> Kernel:
    """Sample at given places."""
    mode = node.get("mode", "linear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    padding, align = node.get("padding_mode", "zeros"), bool(node.get("align_corners", 0))

    def run(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=align)

    return run


def affine_grid(node: OpNode) -> Kernel:
    """Return the places that an affine map samples."""
    size, align = node.numbers(1), bool(node.get("align_corners", 0))
    return lambda theta, wanted: F.affine_grid(theta, size(wanted), align_corners=align)


RESIZE = {
    "AffineGrid": affine_grid,
    "GridSample": grid_sample,
    "Resize": resize,
    "Upsample": upsample,
}
