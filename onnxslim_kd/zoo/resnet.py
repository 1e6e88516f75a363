"""ResNets (arXiv:1512.03385), named as in PaddleSlim: ``res2a_branch2a_weights``, ..."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from onnxslim_kd.zoo.blocks import Classifier, ConvBN, Names, initialise, slim_names


class Residual(nn.Module):
    """A branch of convolutions, added to the input or to its projection."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return relu(self.branch(x) + self.shortcut(x))


def resnet18(classes: int = 1000) -> nn.Module:
    """Build ResNet-18 with seeded weights."""
    return _resnet(classes, (2, 2, 2, 2), expansion=1)


def resnet34(classes: int = 1000) -> nn.Module:
    """Build ResNet-34 with seeded weights."""
    return _resnet(classes, (3, 4, 6, 3), expansion=1)


def resnet50(classes: int = 1000) -> nn.Module:
    """Build ResNet-50 with seeded weights."""
    return _resnet(classes, (3, 4, 6, 3), expansion=4)


def resnet152(classes: int = 1000) -> nn.Module:
    """Build ResNet-152 with seeded weights."""
    return _resnet(classes, (3, 8, 36, 3), expansion=4)


def _resnet(classes: int, depths: Sequence[int], *, expansion: int) -> nn.Module:
    net = features(depths, expansion)
    net.add_module("fc", Classifier("fc_0.w_0", "fc_0.b_0", 512 * expansion, classes))
    return initialise(net)


def features(depths: Sequence[int], expansion: int) -> nn.Sequential:
    """Build the stem and the four stages, ``res2`` to ``res5``."""
    conv = ConvBN(slim_names("conv1", "bn_conv1"), 3, 64, 7, nn.ReLU(), stride=2)
    net = nn.Sequential(OrderedDict(conv1=conv, pool1=nn.MaxPool2d(3, 2, padding=1)))
    c_in = 64
    for stage, depth in enumerate(depths):
        blocks = nn.Sequential()
        for i in range(depth):
            letter = "abcdefgh"[i] if depth <= 8 else f"b{i}" if i else "a"
            name, width = f"res{stage + 2}{letter}", 64 * 2**stage
            stride = 2 if i == 0 and stage > 0 else 1
            blocks.add_module(name, block(name, c_in, width, stride, expansion))
            c_in = width * expansion
        net.add_module(f"res{stage + 2}", blocks)
    return net


def block(name: str, c_in: int, width: int, stride: int, expansion: int) -> Residual:
    """Build a basic block (``expansion`` 1) or a bottleneck.

    The very first basic block has a projection although the shapes agree: so do the tutorials'.
    """
    c_out = width * expansion
    basic = expansion == 1
    branch = (basic_branch if basic else bottleneck)(name, c_in, width, stride)
    project = c_in != c_out or stride != 1 or name == "res2a"
    shortcut = ConvBN(names(f"{name}_branch1"), c_in, c_out, 1, stride=stride) if project else None
    return Residual(branch, shortcut)


def basic_branch(name: str, c_in: int, width: int, stride: int) -> nn.Sequential:
    """Build two 3 x 3 convolutions."""
    a, b = (names(f"{name}_branch2{letter}") for letter in "ab")
    return nn.Sequential(
        ConvBN(a, c_in, width, 3, nn.ReLU(), stride=stride), ConvBN(b, width, width, 3)
    )


def bottleneck(name: str, c_in: int, width: int, stride: int) -> nn.Sequential:
    """Build a 3 x 3 convolution between two 1 x 1 ones; the last is four times as wide."""
    a, b, c = (names(f"{name}_branch2{letter}") for letter in "abc")
    return nn.Sequential(
        ConvBN(a, c_in, width, 1, nn.ReLU()),
        ConvBN(b, width, width, 3, nn.ReLU(), stride=stride),
        ConvBN(c, width, 4 * width, 1),
    )


def names(name: str) -> Names:
    """Name ``res2a_branch1`` and its normalisation ``bn2a_branch1``."""
    return slim_names(name, f"bn{name[3:]}")
