"""Measure and run any ONNX model on ONNX Runtime, with the data and metrics of training."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from onnxslim_kd import model as model_io
from onnxslim_kd import roles as roles_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.runtime import Array, Session
from onnxslim_kd.training import metrics
from onnxslim_kd.training.data import Batch, Loader
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.feeds import Feeder
from onnxslim_kd.training.images import Images
from onnxslim_kd.training.transforms import Preprocess


@dataclass(frozen=True)
class Reading:
    """Which data to read, and how."""

    data: str = "digits?split=test"
    preprocess: str = ""
    batch_size: int = 64
    workers: int = 0
    max_bad: int | None = None


@dataclass(frozen=True)
class Measured:
    """The numbers of an evaluation."""

    metrics: dict[str, float]
    samples: int
    bad: int
    seconds: float


class Predictor:
    """A model on ONNX Runtime that takes batches; of a merged model, the student.

    Raises:
        UserError: The provider is not available here.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        provider: str = "cpu",
        threads: int = 0,
        session: Session | None = None,
    ) -> None:
        roles = roles_io.read(model)
        self.model = model
        self.feeder = Feeder(model, roles)
        self.outputs = [model_io.name_of(value) for value in model.graph.outputs]
        if roles is not None:
            self.outputs = list(roles.student_outputs)
        self._session = session or Session(model, provider=provider, threads=threads)
        self.fixed = fixed_batch(model)

    def __call__(self, batch: Batch) -> dict[str, Array]:
        """Return the outputs for a batch; a model with a fixed batch gets it in its pieces."""
        feeds = self.feeder(batch, skip=self.feeder.extras())
        feeds |= self._fillers(len(batch))
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
        if self.fixed is None or self.fixed == len(batch):
            return self._session.run(arrays, self.outputs)
        pieces = [self._piece(arrays, start) for start in range(0, len(batch), self.fixed)]
        joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in self.outputs}
        return {name: array[: len(batch)] for name, array in joined.items()}

    def _piece(self, arrays: dict[str, Array], start: int) -> dict[str, Array]:
        assert self.fixed is not None
        held = {}
        for name, array in arrays.items():
            rows = array[start : start + self.fixed]
            held[name] = np.pad(rows, [(0, self.fixed - len(rows))] + [(0, 0)] * (rows.ndim - 1))
        return self._session.run(held, self.outputs)

    def _fillers(self, size: int) -> dict[str, Tensor]:
        """Return zeros for inputs that only losses read: the runtime wants them all the same."""
        names = self.feeder.extras()
        values = [value for value in self.model.graph.inputs if value.name in names]
        return {model_io.name_of(v): self.feeder.zeros(v, size) for v in values}


def fixed_batch(model: ir.Model) -> int | None:
    """Return the batch size that the inputs are made for, None for any."""
    sizes = {
        model_io.dims(value)[0]
        for value in model.graph.inputs
        if model_io.has_rank(value) and len(model_io.dims(value))
    }
    return sizes.pop() if len(sizes) == 1 else None


def open_loader(predictor: Predictor, reading: Reading) -> Loader:
    """Return the batches that ``reading`` asks for."""
    source = open_source(reading.data, predictor.feeder.shapes())
    return Loader(
        source,
        Preprocess(reading.preprocess),
        reading.batch_size,
        workers=reading.workers,
        max_bad=reading.max_bad,
    )


def evaluate(predictor: Predictor, reading: Reading, metric: str = "auto") -> Measured:
    """Measure a model on labelled data.

    Raises:
        UserError: Data, labels or metric do not fit the model.
    """
    loader = open_loader(predictor, reading)
    chosen: metrics.Metric | None = None
    started, samples = time.perf_counter(), 0
    for batch in loader.evaluate():
        chosen = chosen or metrics.make(metric, batch.entries)
        entries = {name: tensor.numpy() for name, tensor in batch.entries.items()}
        chosen.update(predictor(batch), entries)
        samples += len(batch)
    if chosen is None:
        raise UserError(f"data {reading.data!r} has no samples")
    seconds = time.perf_counter() - started
    return Measured(chosen.result(), samples, len(loader.bad), seconds)


@dataclass(frozen=True)
class Guess:
    """The likeliest classes of one image."""

    file: Path
    classes: list[int]
    scores: list[float]
    names: list[str]


def infer(
    predictor: Predictor,
    files: list[Path],
    reading: Reading,
    *,
    topk: int = 5,
    names: list[str] | None = None,
) -> Iterator[Guess]:
    """Give the ``topk`` classes of every image; scores are probabilities.

    Raises:
        UserError: An image cannot be read, or the model does not give a score per class.
    """
    loader = Loader(Images(files), Preprocess(reading.preprocess), reading.batch_size)
    for batch in loader.evaluate():
        scores = metrics.first(predictor(batch))
        if scores.ndim < 2 or scores.size != scores.shape[0] * scores.shape[1]:
            raise UserError(
                f"infer needs a score per class, the model's first output is {list(scores.shape)}"
            )
        for index, row in zip(batch.indices, _probabilities(scores), strict=True):
            best = np.argsort(-row, kind="stable")[:topk]
            labels = [names[i] if names and i < len(names) else str(i) for i in best]
            yield Guess(files[index], best.tolist(), row[best].tolist(), labels)


def _probabilities(scores: Array) -> Array:
    rows: Any = scores.reshape(scores.shape[0], -1).astype(np.float64)
    if (rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-3):
        return np.asarray(rows)
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
