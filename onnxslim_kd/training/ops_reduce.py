"""Reductions over axes."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode

Reduction: TypeAlias = "Callable[[Tensor, list[int], bool], Tensor]"


def reduction(reduce: Reduction) -> Callable[[OpNode], Kernel]:
    """Lower a Reduce operator: axes are an attribute or an input; none means all."""

    def lower(node: OpNode) -> Kernel:
        keep, noop = bool(node.get("keepdims", 1)), bool(node.get("noop_with_empty_axes", 0))
        given = node.ints("axes")
        axes = node.numbers(1) if node.has(1) else None

        def run(x: Tensor, wanted: Tensor | None = None) -> Tensor:
            dims = axes(wanted) if axes else given
            if not dims and not noop:
                dims = list(range(x.dim()))
            if not dims:  # each element on its own, with what is done before and after the sum
                return reduce(x.unsqueeze(0), [0], False)  # noqa: FBT003 - torch's signature
            return reduce(x, dims, keep)

        return run

    return lower


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    return torch.sum(x, dims, keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    if x.is_floating_point():
        return torch.mean(x, dims, keep)
    count = torch.Size(x.shape[d] for d in dims).numel()
    return torch.div(_sum(x, dims, keep), count, rounding_mode="trunc")


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    for dim in sorted((d % max(x.dim(), 1) for d in dims), reverse=True):
        x = x.prod(dim, keepdim=keep, dtype=x.dtype)
    return x


def _max(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    return torch.amax(x, dims, keep)


def _min(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    return torch.amin(x, dims, keep)


def _l1(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    return _sum(x.abs(), dims, keep)


def _l2(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    norm: Tensor = torch.linalg.vector_norm(x, 2, dims, keep)
    return norm


def _log_sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    return torch.log(torch.sum(x, dims, keep))


def _log_sum_exp(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    return torch.logsumexp(x, dims, keep)


def _sum_square(x: Tensor, dims: list[int], keep: bool) -> Tensor:  # noqa: FBT001
    return _sum(x * x, dims, keep)


REDUCE = {
    "ReduceL1": reduction(_l1),
    "ReduceL2": reduction(_l2),
    "ReduceLogSum": reduction(_log_sum),
    "ReduceLogSumExp": reduction(_log_sum_exp),
    "ReduceMax": reduction(_max),
    "ReduceMean": reduction(_mean),
    "ReduceMin": reduction(_min),
    "ReduceProd": reduction(_prod),
    "ReduceSum": reduction(_sum),
    "ReduceSumSquare": reduction(_sum_square),
}
