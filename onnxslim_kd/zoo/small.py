"""Small nets for demonstrations and tests, with names in the tutorials' manner."""

from collections import OrderedDict

from torch import nn

from onnxslim_kd.zoo.blocks import Classifier, ConvBN, initialise, relu6, slim_names
from onnxslim_kd.zoo.mobilenet_v2 import InvertedResidual
from onnxslim_kd.zoo.resnet import Residual, basic_branch, names


def digits_cnn(classes: int = 10, channels: int = 1, width: int = 32) -> nn.Module:
    """Build three convolutions for images of 8 x 8 and up; ``width`` is the first one's."""
    net = nn.Sequential(
        OrderedDict(
            conv1=ConvBN(slim_names("conv1"), channels, width, 3, nn.ReLU()),
            conv2=ConvBN(slim_names("conv2"), width, 2 * width, 3, nn.ReLU(), stride=2),
            conv3=ConvBN(slim_names("conv3"), 2 * width, 4 * width, 3, nn.ReLU()),
            fc=Classifier("fc4_weights", "fc4_offset", 4 * width, classes),
        )
    )
    return initialise(net)


def resnet20(classes: int = 10, channels: int = 3, width: int = 16) -> nn.Module:
    """Build the ResNet-20 for CIFAR (arXiv:1512.03385), images of 28 x 28 or 32 x 32."""
    net = nn.Sequential()
    conv1 = ConvBN(slim_names("conv1", "bn_conv1"), channels, width, 3, nn.ReLU())
    net.add_module("conv1", conv1)
    c_in = width
    for stage in range(3):
        c_out = width * 2**stage
        for i in range(3):
            name = f"res{stage + 2}{'abc'[i]}"
            stride = 2 if c_in != c_out else 1
            shortcut = None
            if stride == 2:
                shortcut = ConvBN(names(f"{name}_branch1"), c_in, c_out, 1, stride=stride)
            net.add_module(name, Residual(basic_branch(name, c_in, c_out, stride), shortcut))
            c_in = c_out
    net.add_module("fc", Classifier("fc_0.w_0", "fc_0.b_0", c_in, classes))
    return initialise(net)


def mobilenet_small(
    classes: int = 10, channels: int = 3, width: int = 16, stride: int = 1
) -> nn.Module:
    """Build a short MobileNetV2 for images of 28 x 28 or 32 x 32; ``stride`` is the stem's."""
    net = nn.Sequential()
    stem = ConvBN(slim_names("conv1_1"), channels, width, 3, relu6(), stride=stride)
    net.add_module("conv1_1", stem)
    c_in = width
    for stage in range(3):
        c_out = width * 2**stage
        for i in range(2):
            name, halve = f"conv{stage + 2}_{i + 1}", 2 if i == 0 and stage > 0 else 1
            net.add_module(name, InvertedResidual(name, c_in, c_out, halve, expand=4))
            c_in = c_out
    net.add_module("conv5", ConvBN(slim_names("conv5"), c_in, 4 * c_in, 1, relu6()))
    net.add_module("fc6", Classifier("fc6_weights", "fc6_offset", 4 * c_in, classes))
    return initialise(net)
