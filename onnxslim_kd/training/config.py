"""Every setting of a training run; unknown keys and impossible values are refused by name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onnxslim_kd.errors import UserError, near_misses
from onnxslim_kd.training.schedules import Schedule

Settings = TypeVar("Settings", bound=BaseModel)
Part: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimizer(_Strict):
    """What turns gradients into steps."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    betas: tuple[Part, Part] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    decay_vectors: bool = False
    """Whether norms and biases (vectors, [C, 1, 1] among them) decay as well."""
    no_decay: tuple[str, ...] = ()
    """Patterns of more parameters that do not decay."""

    @model_validator(mode="after")
    def _check(self) -> "Optimizer":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Group(_Strict):
    """Other settings for the parameters that match; the first group that matches counts."""

    match: str
    lr_factor: float = Field(default=1.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class _Timed(_Strict):
    start_epoch: int | None = Field(default=None, ge=0)
    end_epoch: int | None = Field(default=None, ge=1)
    """The first epoch without it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        start = self.start_epoch or 0
        if self.end_epoch is not None and self.end_epoch <= start:
            raise ValueError(f"it ends at epoch {self.end_epoch} and starts at {start}")
        return self


class Term(_Timed):
    """What to change about one loss term of the merged graph."""

    weight: float | None = None


class Labels(_Timed):
    """The trainer's own loss on ground truth, besides the terms inside the graph."""

    weight: float | None = Field(default=None, ge=0)
    """None is 1 for a plain model and 0 for a merged one."""
    loss: str = "ce"
    """ce (cross-entropy), bce (of one score, or several independent ones), mse, or
    module:function(outputs, entries) -> scalar tensor."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)


class Sparsity(_Strict):
    """Shrink whole channels while training, so that a later cut loses less."""

    pattern: str
    strength: float = Field(default=1e-4, gt=0)


class Cut(_Strict):
    """Prune before ``epoch`` begins."""

    epoch: int = Field(ge=0)
    pattern: str
    ratio: float = Field(gt=0, lt=1)


class TrainConfig(_Strict):
    """A training run. The model comes separately; nothing here is stored in checkpoints."""

    data: str = "digits"
    val_data: str | None = None
    """None evaluates on digits?split=test for digits and otherwise not at all."""
    preprocess: str = ""
    max_bad: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=64, ge=1)
    """Samples per optimiser step, over all processes and accumulated parts together."""
    seed: int = Field(default=0, ge=0)

    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    groups: tuple[Group, ...] = ()
    clip_norm: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, ge=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    terms: dict[str, Term] = {}
    labels: Labels = Labels()
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    mutual: bool = False
    """Mutual learning: the teacher trains as well."""
    bn: Literal["auto", "keep", "reinsert", "none", "frozen"] = "auto"
    like: Path | None = None
    """The original of a pruned model: its statistics set re-inserted BatchNormalizations."""
    plan: Path | None = None
    """The pruning plan that leads from ``like`` to the model."""
    init_from: Path | None = None
    init_shapes: bool = False
    """Whether the shapes of ``init_from``, a pruned file, become the model's."""
    cuts: tuple[Cut, ...] = ()
    sparsity: Sparsity | None = None

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    amp: Literal["none", "bf16", "fp16"] = "none"
    channels_last: bool = True
    compile: bool = False
    sync_bn: bool = False
    teacher_runtime: Literal["auto", "ort", "torch"] = "auto"
    cache_teacher: bool = False
    cache_mib: int = Field(default=4096, ge=1)

    metric: str = "auto"
    """auto, top1, miou, map, loss, or module:function(outputs, entries) -> numbers to average."""
    eval_every: int = Field(default=1, ge=1)
    checkpoint: Path | None = None
    checkpoint_steps: int | None = Field(default=None, ge=1)
    keep: int = Field(default=3, ge=1)
    """How many checkpoints stay, the newest ones."""
    save_eval_model: bool = True
    log: Path | None = None
    log_steps: int = Field(default=20, ge=1)
    tensorboard: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}"
            )
        if self.labels.mixup and self.labels.cutmix:
            raise ValueError("labels.mixup and labels.cutmix exclude each other")
        for setting, needed in NEEDS.items():
            if getattr(self, setting) and not getattr(self, needed):
                raise ValueError(f"{setting} has no effect without {needed}")
        late = [cut.epoch for cut in self.cuts if cut.epoch >= self.epochs]
        if late:
            raise ValueError(
                f"a cut after {late[0]} epochs never comes: there are {self.epochs}, and training"
                f" goes on after the last cut"
            )
        return self


def parse(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the config that ``settings`` describe.

    Raises:
        UserError: A key is not known (the nearest is named) or a value is impossible.
    """
    return validated(TrainConfig, settings)


def validated(kind: type[Settings], settings: Mapping[str, Any], *place: str) -> Settings:
    """Return ``settings`` as a ``kind``; ``place`` is where they stand in the user's file.

    Raises:
        UserError: A key is not known (the nearest is named) or a value is impossible.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        found = (_sentence(kind, place, entry) for entry in error.errors())
        raise UserError("; ".join(found)) from error


def read(path: Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings of a YAML file with ``a.b=value`` overrides applied.

    Raises:
        UserError: The file is not YAML, or an override is not ``key=value``.
    """
    settings: Any = {}
    if path is not None:
        try:
            settings = yaml.safe_load(path.read_text("utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read: {why}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{path}: is not YAML: {_one_line(error)}") from error
        if not isinstance(settings, dict):
            raise UserError(f"{path}: must hold settings, got a {type(settings).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} must be key=value, for instance epochs=5")
        try:
            put(settings, key, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r} is not YAML: {_one_line(error)}") from error
    return dict(settings)


def _one_line(error: yaml.YAMLError) -> str:
    """Say what is wrong and where, of the several lines that the parser has for it."""
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or error}{place}"


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested settings; lists take their index.

    Raises:
        UserError: The path does not exist in a list, or goes through a plain value.
    """
    *parents, last = key.split(".")
    place: Any = settings
    try:
        for part in parents:
            place = place.setdefault(part, {}) if isinstance(place, dict) else place[int(part)]
        if isinstance(place, dict):
            place[last] = value
        else:
            place[int(last)] = value
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"override {key!r} does not fit the settings: {error}") from error


def _sentence(kind: type[BaseModel], place: Iterable[str], entry: Any) -> str:
    where = ".".join(str(part) for part in (*place, *entry["loc"]))
    if entry["type"] == "extra_forbidden":
        known = _fields(kind, entry["loc"][:-1])
        return f"setting {where!r} is not known{near_misses(str(entry['loc'][-1]), known)}"
    if entry["type"] == "missing":
        return f"setting {where!r} is missing"
    message = entry["msg"].removeprefix("Value error, ")
    if not entry["loc"]:
        return f"setting {where!r}: {message}" if where else str(message)
    return f"setting {where!r}: {message}, got {entry['input']!r}"


def _fields(kind: Any, path: Iterable[Any]) -> list[str]:
    """Return the names of the settings below ``path``."""
    for part in path:
        if part in getattr(kind, "model_fields", {}):
            annotation = kind.model_fields[part].annotation
            inner = [annotation, *getattr(annotation, "__args__", ())]
            kind = next((model for model in inner if hasattr(model, "model_fields")), kind)
    return list(kind.model_fields)


NEEDS = {"plan": "like", "init_shapes": "init_from"}
"""Settings that say nothing without another."""
