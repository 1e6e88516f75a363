"""Image files as samples: lists, folders and COCO annotations; decoded on demand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from onnxslim_kd.errors import UserError
from onnxslim_kd.training.transforms import Sample

Options = Mapping[str, str]
Shapes = Mapping[str, tuple[int, ...]]
UNLABELLED = -1
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class BadSample(Exception):
    """A sample that cannot be read: missing, cut short, not an image."""


def reason(error: Exception) -> str:
    """Say why a file cannot be read, without its name: the sentence has it already."""
    return getattr(error, "strerror", None) or str(error)


@dataclass(frozen=True)
class Images:
    """Image files, decoded on demand; the label is a class, a mask's file or boxes."""

    files: Sequence[Path]
    labels: np.ndarray[Any, Any] | None = None
    masks: Sequence[Path] | None = None
    boxes: Sequence[np.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, seed: Sequence[int]) -> Sample:
        """Decode one image and its label."""
        sample = {"image": decode(self.files[index])}
        if self.labels is not None:
            sample["label"] = torch.tensor(int(self.labels[index]))
        if self.masks is not None:
            sample["mask"] = _decode_mask(self.masks[index])
        if self.boxes is not None:
            sample["boxes"] = torch.as_tensor(self.boxes[index], dtype=torch.float32)
        return sample


def decode(path: Path) -> torch.Tensor:
    """Return the image as uint8 [3, H, W].

    Raises:
        BadSample: The file is missing or is no whole image.
    """
    return torch.from_numpy(_pixels(path, "RGB")).permute(2, 0, 1)


def _decode_mask(path: Path) -> torch.Tensor:
    mask = torch.from_numpy(_pixels(path, None)).long()
    if mask.ndim != 2:
        raise BadSample(f"{path}: a mask has one channel (grey or palette), not {mask.shape[-1]}")
    return torch.where(mask == 255, UNLABELLED, mask)  # 255 is VOC's and Cityscapes' "ignore"


def _pixels(path: Path, mode: str | None) -> np.ndarray[Any, Any]:
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}: {reason(error)}") from error


def folder(path: str, options: Options, shapes: Shapes) -> Images:
    """Open ``folder:root``: one sub-folder per class, classes in the order of their names."""
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"folder:{path}: no such folder")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not names:
        raise UserError(f"folder:{path}: holds no sub-folder per class")
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise UserError(
            f"folder:{path}: no image ({', '.join(sorted(SUFFIXES))}) in any sub-folder"
        )
    return Images([file for file, _ in found], np.array([label for _, label in found]))


def imagelist(path: str, options: Options, shapes: Shapes) -> Images:
    """Open ``imagelist:train.txt?root=DIR&unlabelled=more.txt``: lines ``path label``.

    With ``labels=mask`` the second column is a mask's file. Unlabelled lines have no second
    column, or one that is not read; their label is -1, which no loss counts as a class.
    """
    root = Path(options.get("root", Path(path).parent))
    delimiter = options.get("delimiter", " ")
    rows = _rows(Path(path), delimiter)
    more = _rows(Path(options["unlabelled"]), delimiter) if "unlabelled" in options else []
    files = [root / name for name, _ in rows + more]
    if options.get("labels") == "mask":
        if more:
            raise UserError(f"imagelist:{path}: unlabelled lists go with class labels only")
        return Images(files, masks=[root / label for _, label in rows])
    labels = [_class(path, number, label) for number, (_, label) in enumerate(rows, 1)]
    return Images(files, np.array(labels + [UNLABELLED] * len(more)))


def _rows(path: Path, delimiter: str) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    rows = [line.strip() for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path}: the list is empty")
    # The label is the last column: a path may hold the delimiter itself.
    pairs = [row.rpartition(delimiter) if delimiter in row else (row, "", "") for row in rows]
    return [(pair[0].strip(), pair[2].strip()) for pair in pairs]


def _class(path: str, line: int, label: str) -> int:
    try:
        return int(label)
    except ValueError:
        raise UserError(
            f"{path}: line {line}: the label must be a whole number, got {label!r};"
            f" give lists without labels as ?unlabelled=FILE"
        ) from None


def coco(path: str, options: Options, shapes: Shapes) -> Images:
    """Open ``coco:annotations.json?root=DIR``: boxes (x1, y1, x2, y2, class from 0)."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        order = {category["id"]: n for n, category in enumerate(content["categories"])}
        boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            box = [x, y, x + width, y + height, order[entry["category_id"]]]
            boxes[entry["image_id"]].append(box)
    except OSError as error:
        raise UserError(f"coco:{path}: cannot be read: {reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"coco:{path}: is not a COCO annotation file: {what}") from error
    root = Path(options.get("root", Path(path).parent))
    files = [root / image["file_name"] for image in content["images"]]
    return Images(files, boxes=[np.array(rows).reshape(-1, 5) for rows in boxes.values()])
