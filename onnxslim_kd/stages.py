"""The stages of a run: the fields of a class are its settings, ``run`` is one library call.

A setting that names a model takes the name of an earlier stage or a file; left out, it means the
model made last. The table of all stages stands at the bottom.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.training.config import TrainConfig

Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """Where a stage runs: the run's folder, and what the earlier stages left in it."""

    folder: Path
    name: str
    earlier: Sequence[str]
    """The stages before that made a model."""
    listen: Listener = lambda event: None

    def output(self, ending: str = "onnx") -> Path:
        """Return the path of this stage's artefact."""
        return self.folder / f"{self.name}.{ending}"

    def model(self, given: str | Path | None) -> Path:
        """Return the model that a setting names; of None, the one made last."""
        return self._file(given, "onnx")

    def plan(self, given: str | Path) -> Path:
        """Return the pruning plan that a setting names: of a stage, or a file."""
        return self._file(given, "plan.json")

    def _file(self, given: str | Path | None, ending: str) -> Path:
        if given is None:
            if not self.earlier:
                raise UserError(f"stage {self.name!r}: no stage before it makes a model; name one")
            given = self.earlier[-1]
        return self.folder / f"{given}.{ending}" if str(given) in self.earlier else Path(given)

    def save(self, model: Any) -> list[Path]:
        """Write the model of this stage."""
        model_io.save(model, self.output(), overwrite=True)
        return [self.output()]

    def save_json(self, data: Any) -> list[Path]:
        """Write the numbers of this stage."""
        model_io.write_text(self.output("json"), json.dumps(data, indent=1) + "\n", overwrite=True)
        return [self.output("json")]


class Stage(BaseModel):
    """What all stages have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    makes_model: ClassVar[bool] = True

    def reads(self, place: Place) -> list[Path]:
        """Return the models and plans that this stage reads."""
        return []

    def others(self) -> list[str]:
        """Return what may name data or code that the result depends on."""
        return []

    def run(self, place: Place) -> list[Path]:
        """Carry the stage out and return the files it wrote."""
        raise NotImplementedError


class Export(Stage):
    """Write an architecture of the zoo, or a torch module, as ONNX."""

    arch: str
    """A name of the zoo, or module:function."""
    inputs: dict[str, str] = {}
    """By name: 1x3x224x224."""
    arguments: dict[str, Any] = {}
    weights: Path | None = None
    opset: int = 17
    seed: int = 0

    def others(self) -> list[str]:
        """Return the user's code and the weights."""
        return [self.arch, *([str(self.weights)] if self.weights is not None else [])]

    def run(self, place: Place) -> list[Path]:
        """Export."""
        from onnxslim_kd.zoo.export import export
        from onnxslim_kd.zoo.inputs import Input

        model = export(
            self.arch,
            inputs={name: Input.parse(text) for name, text in self.inputs.items()},
            weights=self.weights,
            arguments=self.arguments,
            opset=self.opset,
            seed=self.seed,
        )
        return place.save(model)


class Prune(Stage):
    """Remove whole channels, with proof; the options of ``onnxslim-kd prune``."""

    model: str | None = None
    pattern: str | None = None
    ratio: float = 0.5
    ratios: dict[str, float] | None = None
    target: dict[Literal["macs", "params", "size", "latency"], float] = Field({}, max_length=1)
    """The share of one quantity that goes (of latency, the share that stays), for a ratio."""
    ignore: str | None = None
    criterion: str = "l1"
    group_score: Literal["first", "mean", "max"] = "first"
    selector: Literal["share", "energy"] = "share"
    round_to: int = Field(default=0, ge=0)
    """0 for what this CPU computes at once."""
    allocation: Literal["uniform", "global", "isomorphic"] = "uniform"
    sensitivity: Path | None = None
    max_loss: float | None = None
    attention: Literal["heads", "dims"] = "heads"
    free_outputs: tuple[str, ...] = ()
    inputs: dict[str, tuple[int, ...]] = {}
    plan: str | None = None
    """Replay this one instead: an earlier stage, or a file."""
    verify: bool = True

    def reads(self, place: Place) -> list[Path]:
        """Return the model, and the plan or the sensitivities."""
        found = [place.model(self.model)]
        if self.plan is not None:
            found.append(place.plan(self.plan))
        return found + ([self.sensitivity] if self.sensitivity is not None else [])

    def run(self, place: Place) -> list[Path]:
        """Plan and cut; the plan is kept beside the model."""
        from onnxslim_kd import api
        from onnxslim_kd.plans import Plan

        reading = api.Reading(
            attention=self.attention, free_outputs=self.free_outputs, inputs=self.inputs or None
        )
        choice = Plan.load(place.plan(self.plan)) if self.plan is not None else self.choice()
        done = api.prune(place.model(self.model), choice, reading=reading, verify=self.verify)
        done.plan.save(place.output("plan.json"), overwrite=True)
        return [*place.save(done.model), place.output("plan.json")]

    def choice(self) -> Any:
        """Return the settings as the library takes them."""
        from onnxslim_kd import sensitivity
        from onnxslim_kd.passes.prune import Choice
        from onnxslim_kd.passes.ratios import Amount
        from onnxslim_kd.passes.targets import LatencyTarget, Target

        target: Target | LatencyTarget | None = None
        for quantity, share in self.target.items():
            target = LatencyTarget(share) if quantity == "latency" else Target(quantity, share)
        curves: dict[str, Any] | None = None
        if self.sensitivity is not None:
            found = sensitivity.load(self.sensitivity)
            curves = {name: found.curve(name) for name in found.losses}
        return Choice(
            pattern=self.pattern,
            ratio=self.ratio,
            ratios=self.ratios,
            ignore=self.ignore,
            criterion=self.criterion,
            group_score=self.group_score,
            amount=Amount(self.round_to, self.selector),
            target=target,
            allocation=self.allocation,
            sensitivity=curves,
            max_loss=self.max_loss,
        )


class Merge(Stage):
    """Join a student, its teachers and the losses."""

    student: str | None = None
    teacher: str | dict[str, str]
    """One, or several by name."""
    losses: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    inputs_map: dict[str, str] = {}
    """Teacher input -> student input."""
    adapt: tuple[str, ...] = ()
    """As on the command line: layout=NHWC, resize=224x224, ..."""
    free_batch: bool = False
    """Make a batch that an exporter fixed to 1 dynamic."""
    seed: int = 0
    verify: bool = True

    def reads(self, place: Place) -> list[Path]:
        """Return the student and the teachers."""
        return [place.model(self.student), *self._teachers(place).values()]

    def others(self) -> list[str]:
        """Return the files and functions of custom losses."""
        options = [spec.options for spec in self._specs()]
        return [str(o[key]) for o in options for key in ("file", "function") if o.get(key)]

    def run(self, place: Place) -> list[Path]:
        """Merge and prove."""
        from onnxslim_kd.passes.adapters import parse
        from onnxslim_kd.passes.batch import free_batch, has_fixed_batch
        from onnxslim_kd.passes.merge import merge
        from onnxslim_kd.verify_merge import verify_merge

        def opened(path: Path) -> model_io.ModelLike:
            return free_batch(path) if self.free_batch and has_fixed_batch(path) else path

        student = opened(place.model(self.student))
        teachers = {name: opened(path) for name, path in self._teachers(place).items()}
        merged = merge(
            student,
            teachers,
            self._specs(),
            inputs_map=self.inputs_map,
            adapters=dict(map(parse, self.adapt)),
            seed=self.seed,
        )
        if self.verify:
            verify_merge(merged, student, teachers, seed=self.seed)
        return place.save(merged)

    def _teachers(self, place: Place) -> dict[str, Path]:
        named = self.teacher if isinstance(self.teacher, dict) else {"teacher": self.teacher}
        return {name: place.model(given) for name, given in named.items()}

    def _specs(self) -> list[Any]:
        from onnxslim_kd.passes import losses

        return [
            losses.parse(loss) if isinstance(loss, str) else losses.from_mapping(loss)
            for loss in self.losses
        ]


class Train(Stage, TrainConfig):
    """Fine-tune or distil; all settings of ``onnxslim-kd train``."""

    model: str | None = None

    def reads(self, place: Place) -> list[Path]:
        """Return the model and those that it takes weights or statistics from."""
        more = [place.model(given) for given in (self.like, self.init_from) if given is not None]
        plan = [place.plan(self.plan)] if self.plan is not None else []
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
            "plan": self.plan and place.plan(self.plan),
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


class InferPrune(Stage):
    """Reduce a model to what inference needs, with proof."""

    model: str | None = None
    keep: str = "student"
    outputs: tuple[str, ...] = ()
    activation: Literal["softmax", "sigmoid"] | None = None
    format: Literal["onnx", "ort"] = "onnx"
    fp16: bool = False
    inputs: dict[str, tuple[int, ...]] = {}
    verify: bool = True

    def reads(self, place: Place) -> list[Path]:
        """Return the model."""
        return [place.model(self.model)]

    def run(self, place: Place) -> list[Path]:
        """Strip, and write the forms asked for."""
        from onnxslim_kd.passes.half import to_half
        from onnxslim_kd.passes.strip import infer_prune
        from onnxslim_kd.runtime import write_ort

        result = infer_prune(
            place.model(self.model),
            keep=self.keep,
            outputs=self.outputs,
            activation=self.activation,
            shapes=self.inputs or None,
            verify=self.verify,
        ).model
        if self.fp16:
            result, _ = to_half(result, self.inputs or None)
        files = place.save(result)
        if self.format == "ort":
            target = place.output("ort")
            model_io.write_file(target, lambda path: write_ort(result, path), overwrite=True)
            files.append(target)
        return files


class Bench(Stage):
    """Measure models against the first of them."""

    makes_model: ClassVar[bool] = False
    models: tuple[str, ...] = Field(min_length=1)
    batches: tuple[int, ...] = ()
    inputs: dict[str, tuple[int, ...]] = {}
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

    makes_model: ClassVar[bool] = False
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


STAGES: dict[str, type[Stage]] = {
    "export": Export,
    "prune": Prune,
    "merge": Merge,
    "train": Train,
    "infer_prune": InferPrune,
    "bench": Bench,
    "eval": Eval,
}
