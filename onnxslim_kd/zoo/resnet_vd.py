"""ResNet-D (arXiv:1812.01187), named as in PaddleSlim: ``res2a_branch2a_weights``, ..."""

from collections import OrderedDict

from torch import nn

from onnxslim_kd.zoo.blocks import Classifier, ConvBN, initialise
from onnxslim_kd.zoo.resnet import Residual, bottleneck, names


def resnet50_vd(classes: int = 1000) -> nn.Module:
    """Build ResNet50-vd with seeded weights."""
    stem = nn.Sequential(
        ConvBN(names("conv1_1"), 3, 32, 3, nn.ReLU(), stride=2),
        ConvBN(names("conv1_2"), 32, 32, 3, nn.ReLU()),
        ConvBN(names("conv1_3"), 32, 64, 3, nn.ReLU()),
    )
    net = nn.Sequential(OrderedDict(conv1=stem, pool1=nn.MaxPool2d(3, 2, padding=1)))
    c_in = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        blocks = nn.Sequential()
        for i in range(depth):
            name, width = f"res{stage + 2}{'abcdef'[i]}", 64 * 2**stage
            stride = 2 if i == 0 and stage > 0 else 1
            branch = bottleneck(name, c_in, width, stride)
            blocks.add_module(name, Residual(branch, shortcut(name, c_in, 4 * width, stride)))
            c_in = 4 * width
        net.add_module(f"res{stage + 2}", blocks)
    net.add_module("fc", Classifier("fc_0.w_0", "fc_0.b_0", c_in, classes))
    return initialise(net)


def shortcut(name: str, c_in: int, c_out: int, stride: int) -> nn.Module | None:
    """Build the projection; one that halves the image averages instead of skipping pixels."""
    if c_in == c_out and stride == 1:
        return None
    project = ConvBN(names(f"{name}_branch1"), c_in, c_out, 1)
    if stride == 1:
        return project
    return nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), project)
