"""One number for a session on labelled data held in memory: what sensitivity asks for."""

from dataclasses import dataclass
from itertools import islice

import onnx_ir as ir

from onnxslim_kd.errors import UserError
from onnxslim_kd.runtime import Session
from onnxslim_kd.training import metrics
from onnxslim_kd.training.data import Batch
from onnxslim_kd.training.evaluate import Predictor, Reading, open_loader


@dataclass(frozen=True)
class Scorer:
    """A metric over fixed batches.

    Attributes:
        name: Metric and data in words.
        lower_is_better: Whether the metric is an error.
    """

    model: ir.Model
    batches: tuple[Batch, ...]
    metric: str
    name: str
    lower_is_better: bool

    @classmethod
    def of(
        cls,
        model: ir.Model,
        *,
        data: str,
        preprocess: str = "",
        metric: str = "auto",
        samples: int = 1024,
        batch_size: int = 64,
    ) -> "Scorer":
        """Read at most ``samples`` samples into memory.

        Raises:
            UserError: The data is empty or does not fit the model's inputs.
        """
        reading = Reading(data, preprocess, batch_size)
        loader = open_loader(Predictor(model), reading)
        batches = tuple(islice(loader.evaluate(), -(-samples // batch_size)))
        if not batches:
            raise UserError(f"data {data!r} has no samples")
        chosen = metrics.make(metric, batches[0].entries)
        held = sum(len(batch) for batch in batches)
        name = " ".join(filter(None, (metric, "on", data, preprocess, f"({held} samples)")))
        return cls(model, batches, metric, name, chosen.lower_is_better)

    def __call__(self, session: Session) -> float:
        """Return the deciding number of the metric."""
        predictor = Predictor(self.model, session=session)
        collected = metrics.make(self.metric, self.batches[0].entries)
        for batch in self.batches:
            entries = {name: tensor.numpy() for name, tensor in batch.entries.items()}
            collected.update(predictor(batch), entries)
        return next(iter(collected.result().values()))
