"""The stages that change weights: train and calibrate."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import OperationError
from onnxslim_kd.stage import PLAN, Place, Stage
from onnxslim_kd.training.config import TrainConfig


class Train(Stage, TrainConfig):
    """Fine-tune or distil; all settings of ``onnxslim-kd train``."""

    begun = ("checkpoints", "jsonl")
    model: str | None = None

    @model_validator(mode="after")
    def _check_places(self) -> "Train":
        for name in {"checkpoint", "log"} & self.model_fields_set:
            raise ValueError(f"{name} has its place in the run's folder; leave it out")
        return self

    def reads(self, place: Place) -> list[Path]:
        """Return the model and those that it takes weights or statistics from."""
        more = [place.model(given) for given in (self.like, self.init_from) if given is not None]
        plan = [place.file(self.plan, PLAN)] if self.plan is not None else []
        return [place.model(self.model), *more, *plan]

    def others(self) -> list[str]:
        """Return the data, and the user's metric and loss."""
        return [self.data, self.val_data or "", self.metric, self.labels.loss]

    def run(self, place: Place) -> list[Path]:
        """Train; the log and the checkpoints are kept beside the model."""
        from onnxslim_kd.training.engine import train
        from onnxslim_kd.training.journal import journal

        log = place.output("jsonl")
        given = {
            "like": self.like and place.model(self.like),
            "init_from": self.init_from and place.model(self.init_from),
            "plan": self.plan and place.file(self.plan, PLAN),
            "checkpoint": place.output("checkpoints"),
        }
        config = TrainConfig(**(self._settings() | given))
        model = model_io.load(place.model(self.model))
        with journal(place.listen, log, self.tensorboard) as listen:
            outcome = train(model, config, listen)
        if not outcome.finished:
            raise OperationError(
                f"stage {place.name!r} was interrupted; --resume goes on from there"
            )
        return [*place.save(outcome.model), log]

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in TrainConfig.model_fields}


class Calibrate(Stage):
    """Re-estimate BatchNormalization from unlabelled data; nothing is trained."""

    model: str | None = None
    data: str
    preprocess: str = ""
    like: str | None = None
    """The model before it was pruned; needed where BatchNormalization was folded."""
    plan: str | None = None
    """The pruning plan that leads from ``like`` to the model."""
    batches: int = Field(default=8, ge=1)
    batch_size: int = Field(default=64, ge=1)

    def reads(self, place: Place) -> list[Path]:
        """Return the model, the original and the plan."""
        given = [place.model(self.model), self._like(place), self._plan(place)]
        return [path for path in given if path is not None]

    def others(self) -> list[str]:
        """Return the data."""
        return [self.data]

    def run(self, place: Place) -> list[Path]:
        """Calibrate."""
        from onnxslim_kd.training import bn

        model = model_io.load(place.model(self.model))
        some = bn.some_batches(
            model,
            self.data,
            preprocess=self.preprocess,
            batches=self.batches,
            size=self.batch_size,
        )
        bn.calibrate(model, some, self._like(place), self._plan(place))
        return place.save(model)

    def _like(self, place: Place) -> Path | None:
        return place.model(self.like) if self.like is not None else None

    def _plan(self, place: Place) -> Path | None:
        return place.file(self.plan, PLAN) if self.plan is not None else None
