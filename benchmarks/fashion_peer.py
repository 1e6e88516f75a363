"""The peer of fashion_mnist.py: Torch-Pruning, and a distillation loop written by hand in torch."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Steps = Iterator[tuple[float, Tensor, Tensor]]
"""Of each step: the learning rate, images and labels."""
CUTS = 12
"""Of the bisection on the ratio."""


def module(net: nn.Module, weights: Mapping[str, np.ndarray[Any, Any]]) -> nn.Module:
    """Fill a net of the zoo with the weights of its ONNX file, ready for Torch-Pruning."""
    from onnxslim_kd.zoo.blocks import onnx_names

    names = onnx_names(net)
    state = {name: torch.tensor(weights[own]) for name, own in names.items() if own in weights}
    net.load_state_dict(state, strict=False)
    own = net.fc if hasattr(net, "fc") else net.fc6
    assert isinstance(own, nn.Sequential)
    matrix, bias = own[2].weight, own[2].bias
    assert isinstance(matrix, Tensor)
    assert isinstance(bias, Tensor)
    linear = nn.Linear(*matrix.shape)  # (inputs, outputs): a layer that the pruner knows
    linear.load_state_dict({"weight": matrix.detach().T, "bias": bias.detach()})
    own[2] = linear
    return net.eval()


def prune(net: nn.Module, share: float, example: Tensor) -> tuple[nn.Module, float]:
    """Remove the weakest channels by L1 so that ``share`` of the MACs goes; return what went."""
    import torch_pruning as tp

    whole, _ = tp.utils.count_ops_and_params(net, example)
    low, high = 0.0, 1.0
    for _ in range(CUTS):
        ratio = (low + high) / 2
        cut = copy.deepcopy(net)
        tp.pruner.MagnitudePruner(
            cut,
            example,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[m for m in cut.modules() if isinstance(m, nn.Linear)],
        ).step()
        gone = 1 - tp.utils.count_ops_and_params(cut, example)[0] / whole
        if abs(gone - share) < 0.01:
            break
        low, high = (ratio, high) if gone < share else (low, ratio)
    return cut, gone


def export(net: nn.Module, path: Path, example: Tensor) -> None:
    """Write ``net`` as ONNX, as torch does it, with the names of ours."""
    with warnings.catch_warnings():  # of the exporter that keeps to opset 17
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            net.eval(),
            (example,),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": [0], "logits": [0]},
        )


def distil(
    student: nn.Module, teacher: nn.Module, steps: Steps, *, decay: float, temperature: float
) -> None:
    """Train ``student`` on labels and on ``teacher``, cross-entropy and KL of weight 1 each."""
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True)
    teacher.eval()
    student.train()
    for rate, images, labels in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            target = F.log_softmax(teacher(images) / temperature, 1)
        scores = student(images)
        logs = F.log_softmax(scores / temperature, 1)
        kl = F.kl_div(logs, target, reduction="batchmean", log_target=True)
        loss = F.cross_entropy(scores, labels) + temperature**2 * kl
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def top1(net: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    net.eval()
    right = [(net(images).argmax(1) == labels) for images, labels in batches]
    return 100 * float(torch.cat(right).float().mean())
