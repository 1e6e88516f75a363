"""Where samples come from: one small class per kind of data, and the table of kinds.

A source gives sample ``i`` as a dict of tensors: ``image`` [C, H, W] with ``label`` (a class),
``mask`` (a class per pixel) or ``boxes`` [N, 5]; or one entry per model input. Unlabelled
samples have the label -1. What cannot be decoded raises `BadSample`; the loader counts it.
"""

import gzip
import random
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from onnxslim_kd import plugins
from onnxslim_kd.errors import UserError, near_misses
from onnxslim_kd.training.images import (
    BadSample,
    Options,
    Shapes,
    coco,
    folder,
    imagelist,
    reason,
)
from onnxslim_kd.training.transforms import Sample

LABEL_KEYS = ("label", "mask", "boxes", "soft", "ratios")
"""The entries that are no data; the last two are probabilities and the ratios of SSLD's loss."""


class Source(Protocol):
    """Samples by index."""

    @property
    def labels(self) -> np.ndarray[Any, Any] | None:
        """The class of every sample, where it is known beforehand."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def sample(self, index: int, seed: Sequence[int]) -> Sample:
        """Return one sample; chance, if any, comes from ``seed``."""
        ...


# ------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Arrays:
    """Samples in memory: arrays with one row per sample."""

    arrays: Mapping[str, np.ndarray[Any, Any]]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def labels(self) -> np.ndarray[Any, Any] | None:
        """The classes, if the arrays have them."""
        labels = self.arrays.get("label")
        return labels if labels is not None and labels.ndim == 1 else None

    def sample(self, index: int, seed: Sequence[int]) -> Sample:
        """Return row ``index`` of every array."""
        return {name: torch.as_tensor(array[index]) for name, array in self.arrays.items()}


def digits(path: str, options: Options, shapes: Shapes) -> Source:
    """Open scikit-learn's 1797 handwritten digits [1, 8, 8]: 1437 to train on, 360 to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {"train": order[:1437], "test": order[1437:], "all": order}
    split = options.get("split", "train")
    if split not in parts:
        raise UserError(f"digits?split={split}: give train, test or all")
    rows = np.sort(parts[split])
    pixels = (images[rows] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return Arrays({"image": pixels, "label": labels[rows].astype(np.int64)})


def npz(path: str, options: Options, shapes: Shapes) -> Source:
    """Open ``npz:file.npz``: one array per input; ``label`` (or ``y``), ``mask``, ``boxes``."""
    arrays = _read_npz(path)
    for name in ("y", "labels"):
        if name in arrays and name not in shapes:
            arrays["label"] = arrays.pop(name)
    data = [name for name in arrays if name not in LABEL_KEYS]
    if len(data) == 1 and data[0] not in shapes:
        arrays["image"] = arrays.pop(data[0])
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not data or len(set(lengths.values())) != 1:
        raise UserError(f"npz:{path}: the arrays must have one row per sample each, got {lengths}")
    if "label" in arrays and arrays["label"].dtype.kind in "iu":
        arrays["label"] = arrays["label"].astype(np.int64)
    return Arrays(arrays)


def _read_npz(path: str) -> dict[str, np.ndarray[Any, Any]]:
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"npz:{path}: is not an npz file, or cut short")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"npz:{path}: cannot be read: {reason(error)}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise UserError(f"npz:{path}: {name!r} holds {array.dtype}, which are no numbers")
    return arrays


def idx(path: str, options: Options, shapes: Shapes) -> Source:
    """Open ``idx:folder?split=train`` (train or test), the files of MNIST and Fashion-MNIST."""
    stems = {"train": "train", "test": "t10k"}
    split = options.get("split", "train")
    if split not in stems:
        raise UserError(f"idx:{path}?split={split}: give train or test")
    images = _read_idx(_idx_file(path, f"{stems[split]}-images-idx3-ubyte"), 3)
    labels = _read_idx(_idx_file(path, f"{stems[split]}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise UserError(f"idx:{path}: {len(images)} images but {len(labels)} labels")
    return Arrays({"image": images[:, None], "label": labels.astype(np.int64)})


def _idx_file(folder: str, stem: str) -> Path:
    for name in (stem, f"{stem}.gz"):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UserError(f"idx:{folder}: holds no {stem} or {stem}.gz")


def _read_idx(path: Path, rank: int) -> np.ndarray[Any, Any]:
    """Read the IDX format: magic 0x0000, type, rank; big-endian sizes; bytes (Y. LeCun, MNIST)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    header = 4 + 4 * rank
    if len(data) < header or data[:4] != bytes([0, 0, 8, rank]):
        raise UserError(f"{path}: is not an IDX file of {rank} dimensions of bytes")
    shape = struct.unpack(f">{rank}I", data[4:header])
    if len(data) - header != int(np.prod(shape)):
        raise UserError(f"{path}: is cut short: {len(data) - header} bytes for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()  # to be writable


# -------------------------------------------------------------------------------- others


@dataclass(frozen=True)
class Random:
    """Noise in the shape of the model's inputs, for smoke tests and for measuring speed."""

    size: int
    shapes: Shapes
    classes: int

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """The classes: 0, 1, 2 ... and round again."""
        return np.arange(self.size) % self.classes

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, seed: Sequence[int]) -> Sample:
        """Return noise that depends on the index alone."""
        rng = np.random.default_rng(index)
        sample = {
            name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
            for name, shape in self.shapes.items()
        }
        sample["label"] = torch.tensor(index % self.classes)
        return sample


def noise(path: str, options: Options, shapes: Shapes) -> Source:
    """Open ``random?size=256&classes=2&shape=3x224x224``; the shape is the model's by default."""
    if "shape" in options:
        shapes = dict.fromkeys(shapes, tuple(_int(d, "shape") for d in options["shape"].split("x")))
    for name, shape in shapes.items():
        if min(shape, default=1) < 1:
            raise UserError(f"random: the shape of {name} is dynamic; give random?shape=3x224x224")
    size, classes = (_int(options.get(key, default), key) for key, default in RANDOM_DEFAULTS)
    return Random(size, shapes, classes)


def _int(text: str, what: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"random?{what}={text}: give a whole number above 0")
    return int(text)


@dataclass(frozen=True)
class External:
    """A torch Dataset of the user's: items are dicts of tensors, or (image, label) pairs."""

    dataset: Any
    name: str
    labels: None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int, seed: Sequence[int]) -> Sample:
        """Return item ``index`` with every common generator seeded, so that runs can resume.

        Raises:
            BadSample: The user's code fails on it, or gives no numbers.
        """
        state = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        try:
            item = self.dataset[index]
            if not isinstance(item, Mapping):
                item = dict(zip(("image", "label"), item, strict=False))
            return {name: torch.as_tensor(value) for name, value in item.items()}
        except Exception as error:  # it is the user's, and may raise anything
            kind = type(error).__name__
            raise BadSample(f"{self.name}: item {index}: {kind}: {error}") from error


def external(path: str, options: Options) -> Source:
    """Open ``package.module:function?key=value``: a function that returns a torch Dataset."""
    dataset = plugins.call(f"data {path}", plugins.find(path), **options)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{path}: must return a Dataset with a length, got {type(dataset).__name__}"
        )
    return External(dataset, path)


def open_source(spec: str, shapes: Shapes | None = None) -> Source:
    """Open the data that ``spec`` names: ``kind:path?key=value&key=value``.

    Args:
        spec: What the user wrote.
        shapes: The shape of every model input without the batch, 0 for an unknown side.

    Raises:
        UserError: The spec or the files are wrong.
    """
    head, _, query = spec.partition("?")
    kind, _, path = head.partition(":")
    options = dict(part.partition("=")[::2] for part in query.split("&") if part)
    if kind not in SOURCES:
        if path.isidentifier():
            return external(head, options)
        raise UserError(
            f"data {spec!r}: the kind must be one of {', '.join(SOURCES)} or"
            f" package.module:function{near_misses(kind, SOURCES)}"
        )
    source, known = SOURCES[kind]
    for key in options:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise UserError(f"data {spec!r}: option {key!r} is not one of {kind}'s: {listed}")
    return source(path, options, shapes or {"image": (0,)})


RANDOM_DEFAULTS = (("size", "256"), ("classes", "2"))
SOURCES: dict[str, tuple[Callable[[str, Options, Shapes], Source], tuple[str, ...]]] = {
    "digits": (digits, ("split",)),
    "random": (noise, ("size", "classes", "shape")),
    "npz": (npz, ()),
    "idx": (idx, ("split",)),
    "folder": (folder, ()),
    "imagelist": (imagelist, ("root", "unlabelled", "labels", "delimiter")),
    "coco": (coco, ("root",)),
}
