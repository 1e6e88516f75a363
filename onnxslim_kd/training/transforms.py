"""From a decoded image to what the model eats: one line, the same in train, eval and infer.

A line is steps with commas between them: ``random-crop=224,flip,normalize=imagenet``. A step with
chance in it has a fixed form outside of training (`random-crop` becomes resize + centre crop,
`flip` nothing), so that one line serves everywhere. Chance is drawn from the generator given,
hence a sample depends on its seed alone.

Images are tensors [C, H, W], uint8 or float; masks [H, W] and boxes [N, 5] (x1, y1, x2, y2,
class) go through the same geometry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onnxslim_kd.errors import UserError, near_misses

Sample = dict[str, Tensor]
Rng = np.random.Generator
MASK_IGNORE = -1
"""The class of mask pixels that padding made."""


@dataclass(frozen=True)
class Preprocess:
    """The steps of one line, parsed and checked.

    Raises:
        UserError: A step is not known, or its value makes no sense.
    """

    line: str = ""

    def __post_init__(self) -> None:
        self._steps()
        for place, name in enumerate(self.names):
            for late in self.names[place + 1 :]:
                if late in NOT_AFTER.get(name, ()):
                    raise UserError(f"preprocess: {late} must come before {name}")

    def _parts(self) -> list[str]:
        return [part.strip() for part in self.line.split(",") if part.strip()]

    def _steps(self) -> "list[Step]":
        return [_step(part) for part in self._parts()]

    @property
    def names(self) -> list[str]:
        """The steps without their values."""
        return [part.partition("=")[0] for part in self._parts()]

    @property
    def is_random(self) -> bool:
        """Whether training samples differ from epoch to epoch."""
        return not RANDOM.isdisjoint(self.names)

    def __call__(self, sample: Sample, rng: Rng | None = None) -> Sample:
        """Return the sample, changed; chance comes from ``rng``, None means none (evaluation)."""
        if "image" not in sample:
            return sample
        sample = dict(sample)
        for step in self._steps():
            sample = step(sample, rng)
        if sample["image"].dtype == torch.uint8:
            sample["image"] = sample["image"].float() / 255
        return sample


Step = Callable[[Sample, Rng | None], Sample]


@cache
def _step(text: str) -> Step:
    name, _, value = text.partition("=")
    if name not in STEPS:
        raise UserError(
            f"preprocess step {name!r} is not one of {', '.join(STEPS)}{near_misses(name, STEPS)}"
        )
    try:
        return STEPS[name](value)
    except ValueError as error:
        raise UserError(f"preprocess step {text!r}: {error}") from error


# --------------------------------------------------------------- the three geometric moves


def _resized(sample: Sample, height: int, width: int) -> Sample:
    image = sample["image"]
    old_h, old_w = image.shape[-2:]
    if (old_h, old_w) == (height, width):
        return sample
    sample["image"] = F.interpolate(
        image[None], (height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]
    if "mask" in sample:
        mask = sample["mask"][None, None].float()  # class ids are exact in float32
        sample["mask"] = F.interpolate(mask, (height, width), mode="nearest-exact")[0, 0].long()
    if "boxes" in sample:
        factor = torch.tensor([width / old_w, height / old_h, width / old_w, height / old_h, 1.0])
        sample["boxes"] = sample["boxes"] * factor
    return sample


def _cropped(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cut out a window; where it leaves the image there are zeros."""
    image = sample["image"]
    rows, columns = image.shape[-2:]
    pad = (-left, left + width - columns, -top, top + height - rows)  # negative pads crop
    sample["image"] = F.pad(image, pad)
    if "mask" in sample:
        sample["mask"] = F.pad(sample["mask"], pad, value=MASK_IGNORE)
    if "boxes" in sample:
        boxes = sample["boxes"] - torch.tensor([left, top, left, top, 0.0])
        boxes[:, 0:4:2].clamp_(0, width)
        boxes[:, 1:4:2].clamp_(0, height)
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        sample["boxes"] = boxes[kept]
    return sample


def _flipped(sample: Sample) -> Sample:
    width = sample["image"].shape[-1]
    sample["image"] = sample["image"].flip(-1)
    if "mask" in sample:
        sample["mask"] = sample["mask"].flip(-1)
    if "boxes" in sample:
        boxes = sample["boxes"].clone()
        boxes[:, 0], boxes[:, 2] = width - sample["boxes"][:, 2], width - sample["boxes"][:, 0]
        sample["boxes"] = boxes
    return sample


def _short_side(sample: Sample, length: int) -> Sample:
    height, width = sample["image"].shape[-2:]
    factor = length / min(height, width)
    return _resized(sample, max(round(height * factor), 1), max(round(width * factor), 1))


def _centre(sample: Sample, height: int, width: int) -> Sample:
    rows, columns = sample["image"].shape[-2:]
    return _cropped(sample, (rows - height) // 2, (columns - width) // 2, height, width)


# ------------------------------------------------------------------------------- the steps


def _size(value: str) -> tuple[int, int]:
    sides = [int(part) if part.isdecimal() else 0 for part in value.split("x")]
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise ValueError("give a size such as 224 or 224x320")
    return sides[0], sides[-1]


def resize(value: str) -> Step:
    """``resize=256``: the short side; ``resize=224x320``: height and width."""
    height, width = _size(value)
    if "x" in value:
        return lambda sample, _: _resized(sample, height, width)
    return lambda sample, _: _short_side(sample, height)


def crop(value: str) -> Step:
    """``crop=224``: the centre."""
    height, width = _size(value)
    return lambda sample, _: _centre(sample, height, width)


def random_crop(value: str) -> Step:
    """``random-crop=224``: 8 to 100 % of the area, any place; else 8/7 resize and the centre."""
    height, width = _size(value)

    def step(sample: Sample, rng: Rng | None) -> Sample:
        if rng is None:
            return _centre(_short_side(sample, round(max(height, width) * 8 / 7)), height, width)
        rows, columns = sample["image"].shape[-2:]
        area = rows * columns * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        high = int(np.clip(round(np.sqrt(area / aspect)), 1, rows))
        wide = int(np.clip(round(np.sqrt(area * aspect)), 1, columns))
        top, left = int(rng.integers(rows - high + 1)), int(rng.integers(columns - wide + 1))
        return _resized(_cropped(sample, top, left, high, wide), height, width)

    return step


def shift(value: str) -> Step:
    """``shift=4``: move by up to 4 pixels, zeros come in (pad and crop)."""
    most = int(value) if value.isdecimal() else 0
    if most < 1:
        raise ValueError("give the most pixels to move by, such as 4")

    def step(sample: Sample, rng: Rng | None) -> Sample:
        if rng is None:
            return sample
        top, left = (int(move) for move in rng.integers(-most, most + 1, 2))
        height, width = sample["image"].shape[-2:]
        return _cropped(sample, top, left, height, width)

    return step


def flip(value: str) -> Step:
    """``flip``: left to right, half of the time; ``flip=0.2``: as often as that."""
    often = float(value or 0.5)
    if not 0 <= often <= 1:
        raise ValueError("give a probability from 0 to 1")

    def step(sample: Sample, rng: Rng | None) -> Sample:
        return _flipped(sample) if rng is not None and rng.random() < often else sample

    return step


def colour(value: str) -> Step:
    """``colour=0.4``: brightness, contrast and saturation times 1 +- 0.4, in this order."""
    much = float(value)
    if not 0 <= much < 1:
        raise ValueError("give a strength from 0 to below 1")

    def step(sample: Sample, rng: Rng | None) -> Sample:
        if rng is None:
            return sample
        image = sample["image"]
        top = 255.0 if image.dtype == torch.uint8 else 1.0
        out = image.float()
        bright, contrast, saturation = rng.uniform(1 - much, 1 + much, 3).tolist()
        out = (out * bright).clamp(0, top)
        mean = _luma(out).mean()
        out = ((out - mean) * contrast + mean).clamp(0, top)
        grey = _luma(out)
        out = ((out - grey) * saturation + grey).clamp(0, top)
        sample["image"] = out.to(image.dtype)
        return sample

    return step


def _luma(image: Tensor) -> Tensor:
    if image.shape[0] != 3:
        return image.mean(0, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601
    return (image * weights).sum(0, keepdim=True)


def normalize(value: str) -> Step:
    """``normalize=imagenet`` or ``normalize=MEAN:STD``, each one number or one per channel (a/b/c).

    The image is in 0 to 1 then: uint8 is divided by 255 first.
    """
    means, colon, stds = NORMALS.get(value, value).partition(":")
    if not colon:
        raise ValueError(f"give {', '.join(NORMALS)} or MEAN:STD")
    mean = torch.tensor([float(part) for part in means.split("/")]).view(-1, 1, 1)
    std = torch.tensor([float(part) for part in stds.split("/")]).view(-1, 1, 1)
    if not bool((std > 0).all()):  # nor NaN
        raise ValueError("the deviations must be above 0")

    def step(sample: Sample, _: Rng | None) -> Sample:
        image = sample["image"]
        if len({len(mean), len(std), image.shape[0]} - {1}) > 1:
            raise UserError(
                f"normalize={value} has {max(len(mean), len(std))} channels, the image has"
                f" {image.shape[0]}; add rgb or gray before it"
            )
        values = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        sample["image"] = (values - mean) / std
        return sample

    return step


def _channels(count: int) -> Callable[[str], Step]:
    def make(value: str) -> Step:
        if value:
            raise ValueError("it takes no value")

        def step(sample: Sample, _: Rng | None) -> Sample:
            image = sample["image"]
            if image.shape[0] != count:
                grey = image[:1] if image.shape[0] != 3 else _luma(image.float()).to(image.dtype)
                sample["image"] = grey.expand(count, -1, -1).contiguous()
            return sample

        return step

    return make


def _rearranged(change: Callable[[Tensor], Tensor]) -> Callable[[str], Step]:
    def make(value: str) -> Step:
        if value:
            raise ValueError("it takes no value")

        def step(sample: Sample, _: Rng | None) -> Sample:
            sample["image"] = change(sample["image"]).contiguous()
            return sample

        return step

    return make


NORMALS = {"imagenet": "0.485/0.456/0.406:0.229/0.224/0.225", "half": "0.5:0.5"}
RANDOM = {"random-crop", "shift", "flip", "colour"}
STEPS: dict[str, Callable[[str], Step]] = {
    "resize": resize,
    "crop": crop,
    "random-crop": random_crop,
    "shift": shift,
    "flip": flip,
    "colour": colour,
    "normalize": normalize,
    "gray": _channels(1),
    "rgb": _channels(3),
    "bgr": _rearranged(lambda image: image.flip(0)),
    "nhwc": _rearranged(lambda image: image.movedim(0, -1)),
}
NOT_AFTER = {"nhwc": frozenset(STEPS), "normalize": frozenset({"colour"})}
"""What the others would spoil: they want channels first, colour wants numbers from 0 to 1."""
