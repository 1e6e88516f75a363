"""What the architectures share: layers that know their ONNX names, and seeded weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Names(NamedTuple):
    """The ONNX names of a convolution and the BatchNormalization behind it."""

    weights: str
    scale: str
    offset: str
    mean: str
    variance: str


def slim_names(name: str, bn: str | None = None) -> Names:
    """Name as PaddleSlim does: ``conv1_weights``, ``conv1_bn_scale``, ..."""
    bn = bn or f"{name}_bn"
    return Names(f"{name}_weights", f"{bn}_scale", f"{bn}_offset", f"{bn}_mean", f"{bn}_variance")


class ConvBN(nn.Sequential):
    """Convolution, BatchNormalization and, if given, an activation.

    Args:
        names: What the five tensors are called in the ONNX file; None for torch's names.
        c_in: Input channels.
        c_out: Output channels.
        kernel: The kernel's side; the padding keeps the size.
        act: The activation.
        conv: More for `torch.nn.Conv2d`: stride, groups, dilation.
    """

    def __init__(
        self,
        names: Names | None,
        c_in: int,
        c_out: int,
        kernel: int,
        act: nn.Module | None = None,
        **conv: Any,
    ) -> None:
        super().__init__()
        padding = conv.get("dilation", 1) * (kernel - 1) // 2
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, bias=False, **conv)
        self.bn = nn.BatchNorm2d(c_out)
        if act is not None:
            self.act = act
        torch_names = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        self.onnx_names = dict(zip(torch_names, names or torch_names, strict=True))


class Linear(nn.Module):
    """A fully connected layer whose weight lies as the tutorials' does: (inputs, outputs)."""

    def __init__(self, weights: str, offset: str, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c_in, c_out))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.onnx_names = {"weight": weights, "bias": offset}

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight + bias``."""
        return torch.addmm(self.bias, x, self.weight)


class Classifier(nn.Sequential):
    """Global average pooling and one fully connected layer."""

    def __init__(self, weights: str, offset: str, c_in: int, classes: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(weights, offset, c_in, classes)
        )


def relu6() -> nn.Module:
    """Return ReLU6 in the form that becomes one Clip node."""
    return nn.Hardtanh(0.0, 6.0)


def onnx_names(net: nn.Module) -> dict[str, str]:
    """Return what the entries of the net's state dict are called in the ONNX file."""
    names = {name: name for name in net.state_dict()}
    for path, module in net.named_modules():
        for name, own in getattr(module, "onnx_names", {}).items():
            if name != own:
                names[f"{path}.{name}" if path else name] = own
    return names


def initialise(net: nn.Module) -> nn.Module:
    """Give the convolutions He's initialisation, from torch's generator."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Linear):
            nn.init.normal_(module.weight, std=module.weight.shape[0] ** -0.5)
    return net.eval()


def calibrate(net: nn.Module, channels: int, height: int, width: int) -> None:
    """Give every BatchNormalization the statistics of noise images of this size.

    Activations are then of order one, and an untrained net in inference mode tells a right
    pruning from a wrong one. Tiny variances (of a pooled image, of a channel that is nearly dead)
    are no scale to divide by.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    batch = max(2, 2**15 // (height * width))  # small images are few samples for deep layers
    with torch.no_grad():
        net.train()(torch.randn(batch, channels, height, width))
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.clamp_(min=0.1)
        norm.momentum = 0.1
    net.eval()
