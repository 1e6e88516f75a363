"""MobileNetV1 (arXiv:1704.04861), named as in PaddleSlim: ``conv2_1_dw_weights``, ..."""

from torch import nn

from onnxslim_kd.zoo.blocks import Classifier, ConvBN, initialise, slim_names


def mobilenet_v1(classes: int = 1000, scale: float = 1.0) -> nn.Module:
    """Build the net with seeded weights; ``scale`` multiplies all widths."""
    return initialise(nn.Sequential(features(scale), Classifier(*FC, width(1024, scale), classes)))


def features(scale: float = 1.0) -> nn.Sequential:
    """Build everything before the classifier."""
    c_in = width(32, scale)
    net = nn.Sequential()
    net.add_module("conv1", ConvBN(slim_names("conv1"), 3, c_in, 3, nn.ReLU(), stride=2))
    for name, wide, stride in BLOCKS:
        c_out = width(wide, scale)
        net.add_module(name, separable(name, c_in, c_out, stride))
        c_in = c_out
    return net


def separable(name: str, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Build a depthwise and a pointwise convolution."""
    depthwise, pointwise = slim_names(f"{name}_dw"), slim_names(f"{name}_sep")
    return nn.Sequential(
        ConvBN(depthwise, c_in, c_in, 3, nn.ReLU(), stride=stride, groups=c_in),
        ConvBN(pointwise, c_in, c_out, 1, nn.ReLU()),
    )


def width(channels: int, scale: float) -> int:
    """Return the scaled number of channels."""
    return int(channels * scale)


FC = ("fc7_weights", "fc7_offset")
BLOCKS = (  # name, channels, stride
    ("conv2_1", 64, 1),
    ("conv2_2", 128, 2),
    ("conv3_1", 128, 1),
    ("conv3_2", 256, 2),
    ("conv4_1", 256, 1),
    ("conv4_2", 512, 2),
    ("conv5_1", 512, 1),
    ("conv5_2", 512, 1),
    ("conv5_3", 512, 1),
    ("conv5_4", 512, 1),
    ("conv5_5", 512, 1),
    ("conv5_6", 1024, 2),
    ("conv6", 1024, 1),
)
