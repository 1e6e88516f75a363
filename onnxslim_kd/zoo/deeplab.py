"""DeepLabV3+ (arXiv:1802.02611), with the names and the two forms of PaddleSeg's tutorial.

Over Xception-65 it has the pyramid and the decoder; over MobileNetV2 it has neither.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from onnxslim_kd.zoo import mobilenet_v2
from onnxslim_kd.zoo.blocks import ConvBN, initialise
from onnxslim_kd.zoo.xception import Xception65, scope_names, separable

RATES = (6, 12, 18)
"""Dilations of the pyramid at 1/16 of the image."""


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.image_pool = conv("encoder/image_pool", c_in, 256)
        self.aspp0 = conv("encoder/aspp0", c_in, 256)
        self.aspp = nn.ModuleList(
            separable(f"encoder/aspp{i}", c_in, 256, dilation=rate, act=True)
            for i, rate in enumerate(RATES, start=1)
        )
        self.concat = conv("encoder/concat", 5 * 256, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fused scales."""
        image = resize(self.image_pool(x.mean((2, 3), keepdim=True)), x)
        scales = [image, self.aspp0(x), *(branch(x) for branch in self.aspp)]
        fused: Tensor = self.concat(torch.cat(scales, 1))
        return fused


class Decoder(nn.Module):
    """Refine the features with those at 1/4 of the image."""

    def __init__(self, low_channels: int) -> None:
        super().__init__()
        self.low = conv("decoder/concat", low_channels, 48)
        self.refine = nn.Sequential(
            separable("decoder/separable_conv1", 256 + 48, 256, act=True),
            separable("decoder/separable_conv2", 256, 256, act=True),
        )

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """Return the features at the resolution of ``low``."""
        low = self.low(low)
        refined: Tensor = self.refine(torch.cat([resize(x, low), low], 1))
        return refined


class DeepLabXception(nn.Module):
    """Xception-65, pyramid, decoder."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Xception65()
        self.encoder = Pyramid(Xception65.channels)
        self.decoder = Decoder(Xception65.low_channels)
        self.logit = logit(256, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        x, low = self.backbone(image)
        return resize(self.logit(self.decoder(self.encoder(x), low)), image)


class DeepLabMobileNet(nn.Module):
    """MobileNetV2 at 1/16 of the image, and the logits."""

    def __init__(self, classes: int, scale: float) -> None:
        super().__init__()
        self.backbone = mobilenet_v2.features(scale, stride_limit=16)
        self.logit = logit(int(320 * scale), classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        return resize(self.logit(self.backbone(image)), image)


def deeplabv3p_xception65(classes: int = 19) -> nn.Module:
    """Build the tutorial's teacher with seeded weights."""
    return initialise(DeepLabXception(classes))


def deeplabv3p_mobilenet_v2(classes: int = 19, scale: float = 1.0) -> nn.Module:
    """Build the tutorial's student with seeded weights."""
    return initialise(DeepLabMobileNet(classes, scale))


def conv(scope: str, c_in: int, c_out: int) -> ConvBN:
    """Build a pointwise convolution with an activation."""
    return ConvBN(scope_names(scope), c_in, c_out, 1, nn.ReLU())


def logit(c_in: int, classes: int) -> nn.Conv2d:
    """Build the last convolution."""
    layer = nn.Conv2d(c_in, classes, 1)
    layer.onnx_names = {"weight": "logit/weights", "bias": "logit/biases"}  # type: ignore[assignment]
    return layer


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Scale ``x`` to the size of ``like``."""
    return interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)
