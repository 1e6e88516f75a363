"""The stages that measure: bench, eval, sensitivity and search."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from onnxslim_kd import model as model_io
from onnxslim_kd.search_config import SearchConfig
from onnxslim_kd.stage import PLAN, SENSITIVITY, STUDY, Place, Stage


class Bench(Stage):
    """Measure models against the first of them."""

    leaves = ()
    models: tuple[str, ...] = Field(min_length=1)
    batches: tuple[int, ...] = ()
    inputs: dict[str, tuple[int, ...]] = Field({})
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: int = Field(default=0, ge=0)
    rounds: int = 30
    seconds: float = 30.0
    profile: bool = False

    def reads(self, place: Place) -> list[Path]:
        """Return the models."""
        return list(map(place.model, self.models))

    def run(self, place: Place) -> list[Path]:
        """Measure."""
        from onnxslim_kd.bench import Setting, bench

        setting = Setting(self.provider, self.threads, self.rounds, self.seconds, self.profile)
        shapes = [self.inputs] if self.inputs else []
        found = bench(self.reads(place), shapes=shapes, batches=self.batches, setting=setting)
        model_io.write_text(place.output("json"), found.to_json(), overwrite=True)
        return [place.output("json")]


class Eval(Stage):
    """Measure models on labelled data."""

    leaves = ()
    models: tuple[str, ...] = Field(min_length=1)
    data: str
    preprocess: str = ""
    metric: str = "auto"
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default=0, ge=0)
    max_bad: int = Field(default=0, ge=0)
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: int = Field(default=0, ge=0)

    def reads(self, place: Place) -> list[Path]:
        """Return the models."""
        return list(map(place.model, self.models))

    def others(self) -> list[str]:
        """Return the data and the user's metric."""
        return [self.data, self.metric]

    def run(self, place: Place) -> list[Path]:
        """Measure."""
        return place.save_json(dict(self._measured(place)))

    def _measured(self, place: Place) -> Iterator[tuple[str, dict[str, float]]]:
        from onnxslim_kd.training.evaluate import Predictor, Reading, evaluate

        reading = Reading(self.data, self.preprocess, self.batch_size, self.workers, self.max_bad)
        for name, path in zip(self.models, self.reads(place), strict=True):
            model = model_io.load(path)
            predictor = Predictor(model, provider=self.provider, threads=self.threads)
            yield name, evaluate(predictor, reading, self.metric).metrics


class Sensitivity(Stage):
    """Measure what silencing a share of each group's channels costs."""

    leaves = (SENSITIVITY,)
    begun = (SENSITIVITY,)
    model: str | None = None
    pattern: str = ".*"
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    criterion: str = "l1"
    data: str | None = None
    """None measures how far the outputs move on random inputs."""
    preprocess: str = ""
    metric: str = "auto"
    samples: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=64, ge=1)
    inputs: dict[str, tuple[int, ...]] = Field({})
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: int = Field(default=0, ge=0)

    def reads(self, place: Place) -> list[Path]:
        """Return the model."""
        return [place.model(self.model)]

    def others(self) -> list[str]:
        """Return the data and the user's metric."""
        return [self.data or "", self.metric]

    def run(self, place: Place) -> list[Path]:
        """Measure point by point, into a file that can be gone on with."""
        from onnxslim_kd import api, sensitivity
        from onnxslim_kd.measures import Measure
        from onnxslim_kd.passes.matching import match

        analysis = api.inspect(place.model(self.model), api.Reading(inputs=self.inputs))
        measure = Measure(self.data, self.preprocess, self.metric, self.samples, self.batch_size)
        job = sensitivity.Job(
            analysis,
            [p for p in match(analysis, self.pattern) if p.produces],
            *measure.score(analysis),
            criterion=self.criterion,
            ratios=self.ratios,
            samples=measure.looked_at(analysis, self.criterion),
        )
        output = place.output(SENSITIVITY)
        for _ in sensitivity.run(job, output, provider=self.provider, threads=self.threads):
            pass
        return [output]


class Search(Stage, SearchConfig):
    """Search for the ratios that cost the least under a budget; a prune stage takes the plan."""

    leaves = (PLAN,)
    begun = (STUDY,)
    model: str | None = None

    def reads(self, place: Place) -> list[Path]:
        """Return the model."""
        return [place.model(self.model)]

    def others(self) -> list[str]:
        """Return the data and the user's metric."""
        return [self.data or "", self.metric]

    def run(self, place: Place) -> list[Path]:
        """Carry out the trials, into a file that can be gone on with, and plan the best one."""
        from onnxslim_kd import search

        job, refused = self.job(place.model(self.model))
        study = place.output(STUDY)
        for _ in search.run(job, study, self.trials, **self.runtime):
            pass
        search.plan(job, search.load(study), refused).save(place.output(PLAN), overwrite=True)
        return [study, place.output(PLAN)]
