"""BatchNormalization over the batches of all processes together."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from onnxslim_kd.training.lowering import Lowered
from onnxslim_kd.training.opnode import Modal
from onnxslim_kd.training.ops_norm import BatchNorm


def synchronise(lowered: Lowered) -> None:
    """Let every BatchNormalization of ``lowered`` use the statistics of the whole batch."""
    for key, module in lowered.ops.items():
        if isinstance(module, BatchNorm):
            lowered.ops[key] = SyncBatchNorm(module)


class SyncBatchNorm(Modal):
    """As `BatchNorm`, with sums over all processes; gradients flow through the sums."""

    def __init__(self, local: BatchNorm) -> None:
        torch.nn.Module.__init__(self)
        self.node_name, self.frozen = local.node_name, local.frozen
        self.local = local

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
        """Normalise; in training, also move ``mean`` and ``var``, in place."""
        if not self.training:
            return self.local(x, scale, bias, mean, var)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        kind, x = x.dtype, x.float() if x.element_size() < 4 else x  # sums in bf16 lose too much
        own = x.new_full((1,), x.numel() // x.shape[1])  # an unreadable sample is missing
        sums = all_reduce(torch.cat([x.sum(axes), own]))  # type: ignore[no-untyped-call]
        count = sums[-1]
        mid = sums[:-1] / count
        centred = x - mid.view(shape)
        spread = all_reduce((centred * centred).sum(axes)) / count  # type: ignore[no-untyped-call]
        y = centred * ((spread + self.local.eps).rsqrt() * scale).view(shape) + bias.view(shape)
        with torch.no_grad():
            mean.lerp_(mid, 1 - self.local.momentum)
            var.lerp_(spread, 1 - self.local.momentum)
        y = y.to(kind)
        return (y, mean, var) if self.local.several else y
