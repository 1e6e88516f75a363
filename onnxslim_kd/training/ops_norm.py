"""Normalisations, softmax and dropout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, Modal, OpNode


class BatchNorm(Modal):
    """Batch statistics in training, running ones in inference.

    As ONNX says, and unlike torch, the running variance follows the *biased* batch variance:
    running = momentum * running + (1 - momentum) * batch.
    """

    def __init__(self, node: OpNode) -> None:
        super().__init__(node)
        self.eps = node.get("epsilon", 1e-5)
        self.momentum = node.get("momentum", 0.9)
        self.several = len(node.outputs) > 1

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
        """Normalise; in training, also move ``mean`` and ``var``, in place."""
        if not self.training:
            y = F.batch_norm(x, mean, var, scale, bias, False, 0.0, self.eps)  # noqa: FBT003
        else:
            moved = mean.clone(), var.clone()  # autograd keeps what torch is given
            y = F.batch_norm(x, *moved, scale, bias, True, 1 - self.momentum, self.eps)  # noqa: FBT003
            self._follow(mean, var, moved, x.numel() // x.shape[1])
        return (y, mean, var) if self.several else y

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, moved: tuple[Tensor, Tensor], n: int) -> None:
        """Take over the running statistics, of which torch's variance is n / (n - 1) too large."""
        mean.copy_(moved[0])
        var.mul_(self.momentum / n).add_(moved[1], alpha=(n - 1) / n)


class Dropout(Modal):
    """Dropout: in training by its ratio, in inference nothing."""

    def __init__(self, node: OpNode) -> None:
        super().__init__(node)
        self.ratio = node.numbers(1) if node.has(1) else (lambda _: [0.5])
        self.several = len(node.outputs) > 1
        node.host.add(2)

    def forward(self, x: Tensor, ratio: Tensor | None = None, mode: Tensor | None = None) -> Any:
        """Drop, and scale what stays."""
        del mode  # the module's own mode decides
        if not self.several:
            return F.dropout(x, self.ratio(ratio)[0], training=True) if self.training else x
        kept = torch.ones_like(x, dtype=torch.bool)
        if self.training:
            drop = self.ratio(ratio)[0]
            kept = torch.rand_like(x) >= drop
            x = x * kept / (1 - drop)
        return x, kept


def instance_norm(node: OpNode) -> Kernel:
    """Normalise each channel of each sample."""
    eps = node.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return torch.group_norm(x, x.shape[1], scale, bias, eps)

    return run


def group_norm(node: OpNode) -> Kernel:
    """Normalise groups of channels; until opset 20 scale and bias are per group."""
    eps, groups = node.get("epsilon", 1e-5), node.get("num_groups", 1)
    per_group = node.since < 21

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if per_group:
            scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
        return torch.group_norm(x, groups, scale, bias, eps)

    return run


def layer_norm(node: OpNode) -> Kernel:
    """Normalise the axes from ``axis`` on."""
    axis, eps = node.get("axis", -1), node.get("epsilon", 1e-5)
    several = any(node.outputs[1:])

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            y = F.layer_norm(x, shape, scale, bias, eps)
        else:
            y = F.layer_norm(x, shape, eps=eps) * scale
            y = y if bias is None else y + bias
        return (y, *_moments(x, axis, eps)) if several else y

    return run


def _moments(x: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return the mean and the inverse deviation that LayerNormalization may output."""
    dims = list(range(axis % x.dim(), x.dim()))
    held = x.float() if x.element_size() < 4 else x
    var, mean = torch.var_mean(held, dims, correction=0, keepdim=True)
    return mean, torch.rsqrt(var + eps)


def rms_norm(node: OpNode) -> Kernel:
    """Divide by the root mean square of the axes from ``axis`` on."""
    axis, eps = node.get("axis", -1), node.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[axis:], eps=eps) * scale

    return run


def lrn(node: OpNode) -> Kernel:
    """Normalise by the squares of neighbouring channels."""
    size, alpha = node.get("size", 1), node.get("alpha", 1e-4)
    beta, bias = node.get("beta", 0.75), node.get("bias", 1.0)

    def run(x: Tensor) -> Tensor:
        around = [0, 0] * (x.dim() - 2) + [(size - 1) // 2, size // 2]
        squares = F.pad(x.square(), around).unfold(1, size, 1).sum(-1)
        return x / (bias + alpha / size * squares) ** beta

    return run


def lp_norm(node: OpNode) -> Kernel:
    """Divide by the norm along an axis; zero stays zero."""
    axis, p = node.get("axis", -1), node.get("p", 2)
    return lambda x: F.normalize(x, p, axis)


def mean_variance(node: OpNode) -> Kernel:
    """Subtract the mean and divide by the deviation."""
    axes = node.ints("axes") or [0, 2, 3]

    def run(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (torch.sqrt(var) + 1e-9)

    return run


def softmax(node: OpNode) -> Kernel:
    """Softmax along one axis."""
    axis = node.get("axis", -1)
    return lambda x: torch.softmax(x, axis)


def log_softmax(node: OpNode) -> Kernel:
    """Logarithm of softmax along one axis."""
    axis = node.get("axis", -1)
    return lambda x: torch.log_softmax(x, axis)


def hardmax(node: OpNode) -> Kernel:
    """One at the first largest element along one axis."""
    axis = node.get("axis", -1)

    def run(x: Tensor) -> Tensor:
        first = x.argmax(axis, keepdim=True)
        return torch.zeros_like(x).scatter(axis, first, 1.0)

    return run


NORM = {
    "BatchNormalization": BatchNorm,
    "Dropout": Dropout,
    "GroupNormalization": group_norm,
    "Hardmax": hardmax,
    "InstanceNormalization": instance_norm,
    "LRN": lrn,
    "LayerNormalization": layer_norm,
    "LogSoftmax": log_softmax,
    "LpNormalization": lp_norm,
    "MeanVarianceNormalization": mean_variance,
    "RMSNormalization": rms_norm,
    "Softmax": softmax,
}
