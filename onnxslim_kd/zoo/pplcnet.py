"""PP-LCNet (arXiv:2109.15099); its parts are called as in PaddleClas: ``blocks2``, ``se``, ..."""

from torch import Tensor, nn

from onnxslim_kd.zoo.blocks import ConvBN, Linear, initialise


class SqueezeExcite(nn.Module):
    """Weigh the channels by what the whole image holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 4, 1)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighed image."""
        hidden = self.conv1(nn.functional.adaptive_avg_pool2d(x, 1)).relu()
        return x * nn.functional.hardsigmoid(self.conv2(hidden))


class DepthwiseSeparable(nn.Sequential):
    """A depthwise convolution, perhaps squeeze and excite, a pointwise convolution."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, *, se: bool) -> None:
        super().__init__()
        self.dw_conv = ConvBN(None, c_in, c_in, kernel, nn.Hardswish(), stride=stride, groups=c_in)
        if se:
            self.se = SqueezeExcite(c_in)
        self.pw_conv = ConvBN(None, c_in, c_out, 1, nn.Hardswish())


def pplcnet_x2_5(classes: int = 1000, scale: float = 2.5) -> nn.Module:
    """Build the net with seeded weights; ``scale`` multiplies all widths but the last."""
    c_in = width(16, scale)
    net = nn.Sequential()
    net.add_module("conv1", ConvBN(None, 3, c_in, 3, nn.Hardswish(), stride=2))
    for name, layers in STAGES.items():
        blocks = nn.Sequential()
        for kernel, channels, stride, se in layers:
            c_out = width(channels, scale)
            blocks.append(DepthwiseSeparable(c_in, c_out, kernel, stride, se=se))
            c_in = c_out
        net.add_module(name, blocks)
    net.add_module("avg_pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("last_conv", nn.Conv2d(c_in, 1280, 1, bias=False))
    net.add_module("act", nn.Hardswish())
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", Linear("fc.weight", "fc.bias", 1280, classes))
    return initialise(net)


def width(channels: int, scale: float) -> int:
    """Return the scaled number of channels, a multiple of 8 not far below."""
    wide = channels * scale
    rounded = max(8, int(wide + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wide else rounded


STAGES = {  # kernel, channels, stride, squeeze and excite
    "blocks2": [(3, 32, 1, False)],
    "blocks3": [(3, 64, 2, False), (3, 64, 1, False)],
    "blocks4": [(3, 128, 2, False), (3, 128, 1, False)],
    "blocks5": [(3, 256, 2, False), *[(5, 256, 1, False)] * 5],
    "blocks6": [(5, 512, 2, True), (5, 512, 1, True)],
}
