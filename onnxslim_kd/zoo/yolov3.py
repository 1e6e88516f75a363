"""YOLOv3 (arXiv:1804.02767) with the raw maps as outputs, named as in PaddleDetection 0.x."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from onnxslim_kd.zoo import mobilenet_v1, resnet
from onnxslim_kd.zoo.blocks import ConvBN, Names, initialise

ANCHORS = 3
"""Per scale."""


class DetectionBlock(nn.Module):
    """Five convolutions to the next scale, one more to this scale's output."""

    def __init__(self, index: int, c_in: int, width: int, c_out: int) -> None:
        super().__init__()
        name = f"yolo_block.{index}"
        self.route = nn.Sequential(
            conv(f"{name}.0.0", c_in, width, 1),
            conv(f"{name}.0.1", width, 2 * width, 3),
            conv(f"{name}.1.0", 2 * width, width, 1),
            conv(f"{name}.1.1", width, 2 * width, 3),
            conv(f"{name}.2", 2 * width, width, 1),
        )
        self.tip = conv(f"{name}.tip", width, 2 * width, 3)
        self.output = nn.Conv2d(2 * width, c_out, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the next scale takes, and the output map."""
        route = self.route(x)
        return route, self.output(self.tip(route))


class YOLOv3(nn.Module):
    """A backbone in stages and one detection block per scale, coarse to fine."""

    def __init__(self, stages: Sequence[nn.Module], widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        self.onnx_names = {}
        above = 0
        for i, c_in in enumerate(reversed(widths)):
            width = 512 // 2**i
            self.blocks.append(DetectionBlock(i, above + c_in, width, ANCHORS * (5 + classes)))
            output = f"yolo_output.{i}.conv"
            self.onnx_names[f"blocks.{i}.output.weight"] = f"{output}.weights"
            self.onnx_names[f"blocks.{i}.output.bias"] = f"{output}.bias"
            above = width // 2
            if i + 1 < len(widths):
                self.transitions.append(conv(f"yolo_transition.{i}", width, above, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one map per scale: (batch, anchors x (5 + classes), height, width)."""
        features, x = [], image
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        route, maps = None, []
        for i, block in enumerate(self.blocks):
            x = features[-1 - i]
            if route is not None:
                smaller = self.transitions[i - 1](route)
                x = torch.cat([interpolate(smaller, scale_factor=2.0, mode="nearest"), x], 1)
            route, output = block(x)
            maps.append(output)
        return tuple(maps)


def yolov3_mobilenet_v1(classes: int = 80, scale: float = 1.0) -> nn.Module:
    """Build the net with seeded weights; ``scale`` multiplies the backbone's widths."""
    layers = list(mobilenet_v1.features(scale))
    stages = [nn.Sequential(*part) for part in (layers[:5], layers[5:7], layers[7:])]
    widths = [mobilenet_v1.width(channels, scale) for channels in (256, 512, 1024)]
    return initialise(YOLOv3(stages, widths, classes))


def yolov3_resnet34(classes: int = 80) -> nn.Module:
    """Build the net with seeded weights."""
    *first, fourth, fifth = resnet.features((3, 4, 6, 3), expansion=1)
    return initialise(YOLOv3([nn.Sequential(*first), fourth, fifth], (128, 256, 512), classes))


def conv(name: str, c_in: int, c_out: int, kernel: int) -> ConvBN:
    """Build a convolution with a leaky activation."""
    norm = f"{name}.bn"
    names = Names(
        f"{name}.conv.weights", f"{norm}.scale", f"{norm}.offset", f"{norm}.mean", f"{norm}.var"
    )
    return ConvBN(names, c_in, c_out, kernel, nn.LeakyReLU(0.1))
