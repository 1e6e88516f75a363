"""ONNX's own loss operators."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode


def negative_log_likelihood(node: OpNode) -> Kernel:
    """Negative log-likelihood of log-probabilities."""
    reduction, ignored = node.get("reduction", "mean"), node.get("ignore_index", -100)

    def run(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.nll_loss(x, target.long(), weight, ignore_index=ignored, reduction=reduction)

    return run


def cross_entropy(node: OpNode) -> Kernel:
    """Softmax cross-entropy; the second output holds the log-probabilities."""
    reduction, ignored = node.get("reduction", "mean"), node.get("ignore_index", -100)
    several = len(node.outputs) > 1

    def run(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Any:
        y = torch.log_softmax(x, 1)
        loss = F.nll_loss(y, target.long(), weight, ignore_index=ignored, reduction=reduction)
        return (loss, y) if several else loss

    return run


LOSS = {
    "NegativeLogLikelihoodLoss": negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": cross_entropy,
}
