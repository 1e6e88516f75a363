"""Xception-65 as DeepLab has it (arXiv:1802.02611), with the names of PaddleSeg."""

from torch import Tensor, nn

from onnxslim_kd.zoo.blocks import ConvBN, Names


class Block(nn.Module):
    """Three separable convolutions and a shortcut: projected, plain, or none."""

    def __init__(self, scope: str, c_in: int, widths: tuple[int, int, int], stride: int) -> None:
        super().__init__()
        first, second, c_out = widths
        self.conv1 = separable(f"{scope}/separable_conv1", c_in, first)
        self.conv2 = separable(f"{scope}/separable_conv2", first, second)
        self.conv3 = separable(f"{scope}/separable_conv3", second, c_out, stride=stride)
        project = c_in != c_out or stride > 1
        name = scope_names(f"{scope}/shortcut")
        self.shortcut = ConvBN(name, c_in, c_out, 1, stride=stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output and what a decoder takes from it."""
        middle = self.conv2(self.conv1(x.relu()).relu())
        return self.conv3(middle.relu()) + self.shortcut(x), middle


class Xception65(nn.Module):
    """The features at 1/16 of the image, and those at 1/4 for a decoder."""

    channels, low_channels = 2048, 256

    def __init__(self) -> None:
        super().__init__()
        flow = "xception_65/entry_flow"
        self.conv1 = ConvBN(scope_names(f"{flow}/conv1"), 3, 32, 3, nn.ReLU(), stride=2)
        self.conv2 = ConvBN(scope_names(f"{flow}/conv2"), 32, 64, 3, nn.ReLU())
        self.entry1 = Block(f"{flow}/block1", 64, (128, 128, 128), 2)
        self.entry2 = Block(f"{flow}/block2", 128, (256, 256, 256), 2)
        self.entry3 = Block(f"{flow}/block3", 256, (728, 728, 728), 2)
        self.middle = nn.ModuleList(
            Block(f"xception_65/middle_flow/block{i + 1}", 728, (728, 728, 728), 1)
            for i in range(16)
        )
        flow = "xception_65/exit_flow"
        self.exit1 = Block(f"{flow}/block1", 728, (728, 1024, 1024), 1)
        self.exit2 = nn.Sequential(
            *(
                separable(f"{flow}/block2/separable_conv{i}", c_in, c_out, dilation=2, act=True)
                for i, c_in, c_out in ((1, 1024, 1536), (2, 1536, 1536), (3, 1536, 2048))
            )
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both features."""
        x, _ = self.entry1(self.conv2(self.conv1(x)))
        x, low = self.entry2(x)
        x, _ = self.entry3(x)
        for block in self.middle:
            x, _ = block(x)
        x, _ = self.exit1(x)
        return self.exit2(x), low


def separable(
    scope: str, c_in: int, c_out: int, *, stride: int = 1, dilation: int = 1, act: bool = False
) -> nn.Sequential:
    """Build a depthwise and a pointwise convolution, both with an activation or both without."""
    depthwise, pointwise = scope_names(f"{scope}/depthwise"), scope_names(f"{scope}/pointwise")
    relu = nn.ReLU() if act else None
    options = {"stride": stride, "dilation": dilation, "groups": c_in}
    return nn.Sequential(
        ConvBN(depthwise, c_in, c_in, 3, relu, **options),
        ConvBN(pointwise, c_in, c_out, 1, relu),
    )


def scope_names(scope: str) -> Names:
    """Name as PaddleSeg does: ``xception_65/entry_flow/conv1/BatchNorm/gamma``, ..."""
    norm = f"{scope}/BatchNorm"
    return Names(
        f"{scope}/weights",
        f"{norm}/gamma",
        f"{norm}/beta",
        f"{norm}/moving_mean",
        f"{norm}/moving_variance",
    )
