"""Batches in an order that is a function of (seed, epoch), so that a run resumes anywhere.

Nothing here keeps a random state: the order of an epoch comes from (seed, epoch), a sample's
augmentation from (seed, epoch, index). A file that cannot be decoded leaves its batch, is counted
and reported; it is never replaced by another sample.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from onnxslim_kd.errors import OnnxSlimError, UserError
from onnxslim_kd.training.datasets import Source
from onnxslim_kd.training.images import UNLABELLED, BadSample
from onnxslim_kd.training.transforms import Preprocess, Sample

Key = tuple[int, int]
"""(epoch, index); epoch -1 is evaluation, without chance."""
EVALUATION = -1
NO_BOX = -1.0


@dataclass(frozen=True)
class Batch:
    """One batch: tensors by entry, and the samples they came from."""

    entries: Sample
    indices: list[int]
    bad: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class Loader:
    """Gives a source's batches.

    Args:
        source: The samples.
        preprocess: The line applied to each.
        batch_size: Over all processes together.
        seed: Of order and augmentation.
        workers: Processes that decode; 0 decodes in this one.
        shard: (rank, processes); every process gets its part of each training batch.
        max_bad: How many samples may fail to decode before it is an error; None for none, where
            the user cannot set it.
    """

    source: Source
    preprocess: Preprocess
    batch_size: int
    seed: int = 0
    workers: int = 0
    shard: tuple[int, int] = (0, 1)
    max_bad: int | None = None
    bad: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size % self.shard[1]:
            raise UserError(
                f"batch_size {self.batch_size} does not divide by {self.shard[1]} processes"
            )

    @property
    def steps(self) -> int:
        """Whole batches in an epoch of training; the rest of the order waits for the next one."""
        return len(self.source) // self.batch_size

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Give the training batches of ``epoch`` from batch ``start`` on, empty ones too.

        Raises:
            UserError: The source is smaller than a batch, or too many samples are bad.
        """
        if self.steps == 0:
            raise UserError(
                f"the data set has {len(self.source)} samples, less than one batch of"
                f" {self.batch_size}; lower batch_size"
            )
        rank, processes = self.shard
        local = self.batch_size // processes
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source))
        rows = order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)
        mine = rows[start:, rank * local : (rank + 1) * local]
        return self._batches([[(epoch, int(index)) for index in row] for row in mine])

    def evaluate(self, limit: int | None = None) -> Iterator[Batch]:
        """Give every sample once, in order, without chance; the last batch may be smaller."""
        count = len(self.source) if limit is None else min(limit, len(self.source))
        keys = [(EVALUATION, index) for index in range(count)]
        size = self.batch_size
        return self._readable([keys[start : start + size] for start in range(0, count, size)])

    def some(self, batches: int) -> list[Batch]:
        """Return up to ``batches`` batches from all over the source, without chance."""
        order = np.random.default_rng(self.seed).permutation(len(self.source))
        rows = order[: batches * self.batch_size]
        keys = [(EVALUATION, int(index)) for index in rows]
        size = self.batch_size
        parts = [keys[start : start + size] for start in range(0, len(keys), size)]
        return list(self._readable(parts))

    def _readable(self, keys: Sequence[Sequence[Key]]) -> Iterator[Batch]:
        return (batch for batch in self._batches(keys) if len(batch))

    def _batches(self, keys: Sequence[Sequence[Key]]) -> Iterator[Batch]:
        dataset = _Keyed(self.source, self.preprocess, self.seed)
        batches: Any = DataLoader(
            dataset,
            batch_sampler=keys,  # type: ignore[arg-type]  # our keys are pairs, not numbers
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # its own: the global one stays as it is
        )
        for batch in batches:
            if isinstance(batch, OnnxSlimError):
                raise batch
            self._count(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        self.bad.update(batch.bad)
        if len(self.bad) > (self.max_bad or 0):
            held = "1 sample" if len(self.bad) == 1 else f"{len(self.bad)} samples"
            allowed = "" if self.max_bad is None else f", {self.max_bad} are allowed (max_bad)"
            first = next(iter(self.bad.values()))
            raise UserError(f"{held} cannot be read{allowed}; the first: {first}")


def _leave_signals(worker: int) -> None:
    """Let Ctrl-C be the parent's business: it ends its workers after the checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Keyed(Dataset[Any]):
    """Samples by (epoch, index); errors come back as values, for workers garble exceptions."""

    def __init__(self, source: Source, preprocess: Preprocess, seed: int) -> None:
        self.source, self.preprocess, self.seed = source, preprocess, seed

    def __getitem__(self, key: Key) -> tuple[int, Sample | BadSample | OnnxSlimError]:
        epoch, index = key
        seeds = [self.seed, epoch + 1, index]
        rng = None if epoch == EVALUATION else np.random.default_rng(seeds)
        try:
            return index, self.preprocess(self.source.sample(index, seeds), rng)
        except (BadSample, OnnxSlimError) as error:
            return index, error


def collate(items: Sequence[tuple[int, Any]]) -> Batch | OnnxSlimError:
    """Stack samples; give back the first error that is not about a single sample."""
    for _, item in items:
        if isinstance(item, OnnxSlimError):
            return item
    good = [(index, item) for index, item in items if not isinstance(item, BadSample)]
    bad = [(index, str(item)) for index, item in items if isinstance(item, BadSample)]
    try:
        entries = (
            {name: _stacked(name, [item[name] for _, item in good]) for name in good[0][1]}
            if good
            else {}
        )
    except UserError as error:
        return error
    return Batch(entries, [index for index, _ in good], bad)


def _stacked(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    if name == "boxes":
        most = max(len(tensor) for tensor in tensors)
        pads = [tensor.new_full((most - len(tensor), 5), NO_BOX) for tensor in tensors]
        tensors = [torch.cat(pair) for pair in zip(tensors, pads, strict=True)]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        listed = ", ".join(str(list(shape)) for shape in sorted(shapes)[:3])
        raise UserError(
            f"samples of {name!r} differ in shape ({listed}); add resize=HxW or crop=HxW to"
            f" preprocess"
        )
    return torch.stack(tensors)


def check_labels(source: Source, classes: int | None) -> None:
    """Refuse class labels outside of the model's classes, before anything runs.

    Raises:
        UserError: A label is not in 0 to classes - 1, and not -1 (unlabelled).
    """
    if classes is None or source.labels is None or source.labels.dtype.kind not in "iu":
        return
    wrong = np.flatnonzero((source.labels < UNLABELLED) | (source.labels >= classes))
    if len(wrong):
        raise UserError(_outside(f"sample {wrong[0]}", int(source.labels[wrong[0]]), classes))


def check_batch(batch: Batch, classes: int | None) -> None:
    """Refuse labels outside of the model's classes that only a batch shows.

    Raises:
        UserError: As `check_labels`; masks count as well.
    """
    for key in ("label", "mask"):
        labels = batch.entries.get(key)
        if classes is None or labels is None or labels.is_floating_point():
            continue
        rows = ((labels < UNLABELLED) | (labels >= classes)).reshape(len(labels), -1)
        if bool(rows.any()):
            row = int(rows.any(1).nonzero()[0])
            label = int(labels[row].reshape(-1)[rows[row]][0])
            raise UserError(_outside(f"sample {batch.indices[row]}", label, classes))


def check_range(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels outside of the classes, where only the loss knows their number.

    Raises:
        UserError: As `check_labels`.
    """
    wrong = labels[(labels < UNLABELLED) | (labels >= classes)]
    if len(wrong):
        raise UserError(_outside("a sample", int(wrong[0]), classes))


def _outside(sample: str, label: int, classes: int) -> str:
    return (
        f"{sample} has label {label}, the model has {classes} classes"
        f" (0 to {classes - 1}; -1 is unlabelled)"
    )
