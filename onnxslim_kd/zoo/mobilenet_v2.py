"""MobileNetV2 (arXiv:1801.04381), named as in PaddleSlim: ``conv2_1_expand_weights``, ..."""

from torch import Tensor, nn

from onnxslim_kd.zoo.blocks import Classifier, ConvBN, initialise, relu6, slim_names


class InvertedResidual(nn.Module):
    """Expand, filter in depth, project; added to the input where the shapes agree."""

    def __init__(self, name: str, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = c_in * expand
        self.expand = ConvBN(slim_names(f"{name}_expand"), c_in, wide, 1, relu6())
        self.dwise = ConvBN(
            slim_names(f"{name}_dwise"), wide, wide, 3, relu6(), stride=stride, groups=wide
        )
        self.linear = ConvBN(slim_names(f"{name}_linear"), wide, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.linear(self.dwise(self.expand(x)))
        return x + y if self.residual else y


def mobilenet_v2(classes: int = 1000, scale: float = 1.0) -> nn.Module:
    """Build the net with seeded weights; ``scale`` multiplies all widths."""
    net = features(scale)
    c_in, c_out = int(320 * scale), int(1280 * max(scale, 1.0))
    net.add_module("conv9", ConvBN(slim_names("conv9"), c_in, c_out, 1, relu6()))
    net.add_module("fc10", Classifier("fc10_weights", "fc10_offset", c_out, classes))
    return initialise(net)


def features(scale: float = 1.0, stride_limit: int = 32) -> nn.Sequential:
    """Build the blocks; from ``stride_limit`` on, blocks do not shrink the image any more."""
    c_in, reached = int(32 * scale), 2
    net = nn.Sequential()
    net.add_module("conv1_1", ConvBN(slim_names("conv1_1"), 3, c_in, 3, relu6(), stride=2))
    for stage, (expand, channels, repeats, first) in enumerate(STAGES, start=2):
        c_out = int(channels * scale)
        for i in range(repeats):
            stride = first if i == 0 and reached * first <= stride_limit else 1
            name = f"conv{stage}_{i + 1}"
            net.add_module(name, InvertedResidual(name, c_in, c_out, stride, expand))
            c_in, reached = c_out, reached * stride
    return net


STAGES = (  # expansion, channels, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
