"""How good outputs are against ground truth: numbers in, numbers out, no torch.

A metric sees batch after batch and gives its result at the end. The first entry of a result is
the one by which the best model is chosen; ``lower_is_better`` says in which direction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from onnxslim_kd import plugins
from onnxslim_kd.errors import OperationError, UserError, near_misses
from onnxslim_kd.training.images import UNLABELLED

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


class Metric(Protocol):
    """Collects batches, then gives numbers."""

    lower_is_better: bool

    def update(self, outputs: Arrays, entries: Arrays) -> None:
        """Take in the outputs of one batch and the entries (labels) it had."""
        ...

    def result(self) -> dict[str, float]:
        """Return the numbers, the deciding one first."""
        ...


def first(outputs: Arrays) -> Array:
    """Return the model's first output."""
    return next(iter(outputs.values()))


def _entry(entries: Arrays, name: str) -> Array:
    if name not in entries:
        raise UserError(f"the metric needs {name!r} in the data, which has {', '.join(entries)}")
    return entries[name]


def class_axis(scores: Sequence[int], labels: Sequence[int]) -> int | None:
    """Return the axis of ``scores`` that ``labels`` count along, None where they do not fit.

    As for the losses: the last one of [N, C] and [N, L, C], the second of [N, C, H, W]; then the
    other of the two, as in [N, C, L] and [N, H, W, C]. Axes of size 1 may be missing in the labels.
    """
    labels = _long(labels)
    for axis in (1, len(scores) - 1) if len(scores) > 3 else (len(scores) - 1, 1):
        if 0 < axis < len(scores) and _long((*scores[:axis], *scores[axis + 1 :])) == labels:
            return axis
    return None


def _long(shape: Sequence[int]) -> list[int]:
    return [*shape[:1], *(side for side in shape[1:] if side != 1)]


def _check_classes(labels: Array, classes: int) -> None:
    wrong = labels[(labels < UNLABELLED) | (labels >= classes)]
    if wrong.size:
        raise UserError(
            f"the data has label {wrong[0]}, the model has {classes} classes (0 to {classes - 1};"
            f" {UNLABELLED} is unlabelled)"
        )


@dataclass
class Accuracy:
    """Top-1 and top-5 in percent; unlabelled samples do not count."""

    lower_is_better: bool = False
    right: Array = field(default_factory=lambda: np.zeros(2))
    count: int = 0
    classes: int = 0

    def update(self, outputs: Arrays, entries: Arrays) -> None:
        """Count the labels among the best 1 and 5 of the first output [B, C] (or [B, L, C])."""
        scores, labels = first(outputs), _entry(entries, "label")
        axis = class_axis(scores.shape, labels.shape)
        if axis is None:
            raise UserError(
                f"the output {list(scores.shape)} has no score per class for labels"
                f" {list(labels.shape)}; give a metric"
            )
        scores = np.moveaxis(scores, axis, -1).reshape(-1, scores.shape[axis])
        labels = labels.reshape(-1)
        _check_classes(labels, scores.shape[1])
        scores, labels = scores[labels != UNLABELLED], labels[labels != UNLABELLED]
        self.classes = scores.shape[1]
        # Ties count against the model: a constant output must not look right, nor one of NaN.
        own = np.take_along_axis(scores, labels[:, None], 1)
        ranks = (~(scores < own)).sum(1)
        self.right += [(ranks <= 1).sum(), (ranks <= 5).sum()]
        self.count += len(labels)

    def result(self) -> dict[str, float]:
        """Return top1 and, with more than five classes, top5."""
        top1, top5 = (100 * self.right / max(self.count, 1)).tolist()
        return {"top1": top1, "top5": top5} if self.classes > 5 else {"top1": top1}


@dataclass
class MeanIoU:
    """Mean intersection over union in percent, over the classes that occur (VOC)."""

    lower_is_better: bool = False
    matrix: Array | None = None

    def update(self, outputs: Arrays, entries: Arrays) -> None:
        """Count pixels; the first output is [B, C, H, W] scores or [B, H, W] classes."""
        truth = _entry(entries, "mask")
        scores = first(outputs)
        found = scores.argmax(1) if scores.ndim == 4 else scores
        if found.shape != truth.shape:
            raise UserError(f"the output gives {found.shape} classes, the masks are {truth.shape}")
        classes = scores.shape[1] if scores.ndim == 4 else int(max(found.max(), truth.max())) + 1
        _check_classes(truth, classes)
        self._grow(max(classes, int(truth.max()) + 1))
        assert self.matrix is not None
        counted = truth != UNLABELLED
        np.add.at(self.matrix, (truth[counted], found[counted].astype(np.int64)), 1)

    def _grow(self, size: int) -> None:
        old = self.matrix if self.matrix is not None else np.zeros((0, 0), np.int64)
        more = max(size - len(old), 0)
        self.matrix = np.pad(old, ((0, more), (0, more)))

    def result(self) -> dict[str, float]:
        """Return miou and the pixel accuracy."""
        if self.matrix is None:
            return {"miou": 0.0, "pixels": 0.0}
        right = np.diag(self.matrix)
        union = self.matrix.sum(0) + self.matrix.sum(1) - right
        ious = right[union > 0] / union[union > 0]
        return {
            "miou": 100 * float(ious.mean()) if len(ious) else 0.0,
            "pixels": 100 * float(right.sum() / max(self.matrix.sum(), 1)),
        }


@dataclass
class CocoMap:
    """COCO's mAP in percent, by pycocotools.

    The first output is [B, N, 6]: x1, y1, x2, y2, score, class, in pixels of the model's input.
    """

    lower_is_better: bool = False
    images: int = 0
    truths: list[dict[str, Any]] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)

    def update(self, outputs: Arrays, entries: Arrays) -> None:
        """Collect true and found boxes."""
        rows = first(outputs)
        if rows.ndim != 3 or rows.shape[-1] != 6:
            raise UserError(
                f"the metric map needs an output [batch, boxes, 6] (x1, y1, x2, y2, score, class),"
                f" got {list(rows.shape)}; write your own as module:function"
            )
        for boxes, detections in zip(_entry(entries, "boxes"), rows, strict=True):
            self.images += 1
            for box in boxes[boxes[:, 4] >= 0]:
                record = self._record(box[:4], box[4])
                self.truths.append({**record, "id": len(self.truths) + 1, "iscrowd": 0})
            for row in detections[detections[:, 4] > 0]:
                self.found.append({**self._record(row[:4], row[5]), "score": float(row[4])})

    def _record(self, box: Array, label: float) -> dict[str, Any]:
        x, y, right, bottom = (float(side) for side in box)
        bbox, area = [x, y, right - x, bottom - y], (right - x) * (bottom - y)
        return {"image_id": self.images, "category_id": int(label), "bbox": bbox, "area": area}

    def result(self) -> dict[str, float]:
        """Return map (IoU 0.5 to 0.95) and map50."""
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError as error:
            raise UserError(
                "the metric map needs pycocotools: pip install 'onnxslim-kd[detection]'"
            ) from error
        import contextlib
        import io

        if not self.truths or not self.found:
            return {"map": 0.0, "map50": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            truth = COCO()
            labels = {record["category_id"] for record in [*self.truths, *self.found]}
            truth.dataset = {
                "images": [{"id": number + 1} for number in range(self.images)],
                "annotations": self.truths,
                "categories": [{"id": label} for label in sorted(labels)],
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(self.found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {"map": 100 * float(evaluation.stats[0]), "map50": 100 * float(evaluation.stats[1])}


@dataclass
class Average:
    """The mean over samples of what a function gives per batch."""

    function: Callable[[Arrays, Arrays], Mapping[str, float] | float]
    name: str = "metric"
    lower_is_better: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def update(self, outputs: Arrays, entries: Arrays) -> None:
        """Call the function on one batch."""
        value = plugins.call(f"metric {self.name}", self.function, outputs, entries)
        numbers = value if isinstance(value, Mapping) else {self.name: value}
        size = len(first(outputs))
        for name, given in numbers.items():
            try:
                number = float(given)
            except (TypeError, ValueError):
                kind = type(given).__name__
                raise OperationError(f"metric {name} gives a {kind}, not a number") from None
            if not np.isfinite(number):
                raise OperationError(f"metric {name} is {number} after {self.count} samples")
            self.sums[name] = self.sums.get(name, 0.0) + number * size
        self.count += size

    def result(self) -> dict[str, float]:
        """Return the means."""
        return {name: total / max(self.count, 1) for name, total in self.sums.items()}


def make(name: str, entries: Mapping[str, object]) -> Metric:
    """Return the metric ``name``; ``auto`` chooses by the labels that the data has.

    Raises:
        UserError: The name is not known, or auto finds no labels.
    """
    if name == "auto":
        kinds = [AUTO[key] for key in AUTO if key in entries]
        if not kinds:
            raise UserError("the data has no label, mask or boxes to measure by; give a metric")
        name = kinds[0]
    if name in METRICS:
        return METRICS[name]()
    if ":" in name:
        function = plugins.find(name)
        lower = bool(getattr(function, "lower_is_better", False))
        return Average(function, name.partition(":")[2], lower)
    raise UserError(
        f"metric {name!r} is not one of {', '.join(METRICS)} or module:function (train has loss"
        f" as well){near_misses(name, METRICS)}"
    )


AUTO = {"label": "top1", "mask": "miou", "boxes": "map"}
METRICS: dict[str, Callable[[], Metric]] = {"top1": Accuracy, "miou": MeanIoU, "map": CocoMap}
