"""YOLOv8n (ultralytics, 2023), for benchmarks: C2f splits and joins, SPPF, a head with DFL.

https://docs.ultralytics.com/models/yolov8, written anew from the published layout of the network.
"""

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128, 256)
BINS = 16
"""Bins of the distribution over each side of a box (arXiv:2006.04388)."""


class Conv(nn.Sequential):
    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), nn.SiLU())


class Bottleneck(nn.Module):
    def __init__(self, width: int, *, add: bool) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv(width, width, 3), Conv(width, width, 3))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convs(x)
        return x + y if self.add else y


class C2f(nn.Module):
    """Half of the channels go through a chain of blocks; the result of each is kept."""

    def __init__(self, c_in: int, c_out: int, depth: int, *, add: bool = False) -> None:
        super().__init__()
        self.first, self.last = Conv(c_in, c_out), Conv((2 + depth) * c_out // 2, c_out)
        self.blocks = nn.ModuleList(Bottleneck(c_out // 2, add=add) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        joined: Tensor = self.last(torch.cat(parts, 1))
        return joined


class SPPF(nn.Module):
    """Three poolings, one after the other, side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = Conv(width, width // 2), Conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        joined: Tensor = self.last(torch.cat(parts, 1))
        return joined


class Head(nn.Module):
    """Boxes as expected distances to four sides, and scores of classes, for every cell."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        boxes, scores = max(widths[0] // 4, 4 * BINS), max(widths[0], classes)
        self.boxes = nn.ModuleList(self._branch(w, boxes, 4 * BINS) for w in widths)
        self.scores = nn.ModuleList(self._branch(w, scores, classes) for w in widths)
        self.bins = nn.Conv2d(BINS, 1, 1, bias=False)

    @staticmethod
    def _branch(c_in: int, width: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(
            Conv(c_in, width, 3), Conv(width, width, 3), nn.Conv2d(width, c_out, 1)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        boxes = torch.cat([f(x).flatten(2) for f, x in zip(self.boxes, maps, strict=True)], 2)
        scores = torch.cat([f(x).flatten(2) for f, x in zip(self.scores, maps, strict=True)], 2)
        n, _, cells = boxes.shape
        sides = boxes.view(n, 4, BINS, cells).transpose(1, 2).softmax(1)
        return torch.cat([self.bins(sides).view(n, 4, cells), scores.sigmoid()], 1)


class Yolov8n(nn.Module):
    """A backbone, a pyramid up and down, and a head."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        a, b, c, d, e = WIDTHS
        self.stem = nn.Sequential(
            Conv(3, a, 3, 2), Conv(a, b, 3, 2), C2f(b, b, 1, add=True),
            Conv(b, c, 3, 2), C2f(c, c, 2, add=True),
        )  # fmt: skip
        self.middle = nn.Sequential(Conv(c, d, 3, 2), C2f(d, d, 2, add=True))
        self.deep = nn.Sequential(Conv(d, e, 3, 2), C2f(e, e, 1, add=True), SPPF(e))
        self.up = nn.Upsample(scale_factor=2)
        self.up1, self.up2 = C2f(d + e, d, 1), C2f(c + d, c, 1)
        self.down1, self.down2 = Conv(c, c, 3, 2), Conv(d, d, 3, 2)
        self.out1, self.out2 = C2f(c + d, d, 1), C2f(d + e, e, 1)
        self.head = Head((c, d, e), classes)

    def forward(self, x: Tensor) -> Tensor:
        small = self.stem(x)
        middle = self.middle(small)
        deep = self.deep(middle)
        lifted = self.up1(torch.cat([self.up(deep), middle], 1))
        first = self.up2(torch.cat([self.up(lifted), small], 1))
        second = self.out1(torch.cat([self.down1(first), lifted], 1))
        third = self.out2(torch.cat([self.down2(second), deep], 1))
        found: Tensor = self.head([first, second, third])
        return found
