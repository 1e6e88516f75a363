"""One YAML file for a whole run: which stages, in which order, with which settings.

stages:
  original: {do: export, arch: digits_cnn}     # its artefact is original.onnx
  pruned: {do: prune, pattern: conv.*}         # of the model made last
  bench: {models: [original, pruned]}          # a stage called as what it does needs no `do`
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from onnxslim_kd.errors import NotFoundError, UserError, near_misses
from onnxslim_kd.stage import Place, Stage
from onnxslim_kd.stages import STAGES
from onnxslim_kd.stages_measure import Eval
from onnxslim_kd.stages_train import Train
from onnxslim_kd.training import config as configs

INCLUDE = "include"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Settings(BaseModel):
    """The top of the file; what stands beside ``stages`` holds for every stage that takes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    title: str = ""
    data: str | None = None
    val_data: str | None = None
    preprocess: str | None = None
    workers: int | None = None
    seed: int | None = None
    stages: dict[Name, dict[str, Any] | None] = Field(min_length=1)

    def common(self) -> dict[str, Any]:
        """Return what stages take from here."""
        return self.model_dump(exclude={"title", "stages"}, exclude_none=True)


@dataclass(frozen=True)
class Recipe:
    """A run that was read and checked."""

    title: str
    stages: Mapping[str, Stage]
    """In the order of the file."""
    text: str
    """The file with everything included and overridden."""

    def place(self, folder: Path, name: str) -> Place:
        """Return where the stage ``name`` runs."""
        before = list(self.stages)[: list(self.stages).index(name)]
        return Place(folder, name, {earlier: self.stages[earlier].leaves for earlier in before})


def read(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a run's file.

    Args:
        path: The file.
        overrides: Settings by their place: ``stages.distilled.epochs=5``, ``losses.0=...``.

    Raises:
        UserError: The file cannot be read, a setting is not known (the nearest is named) or
            impossible, or a stage reads what is neither a stage before it nor a file.
    """
    held = included(path)
    for override in overrides:
        _put(held, override)
    recipe = parse(held, path.stem)
    for name, stage in recipe.stages.items():
        _check_reads(recipe, name, stage)
    return recipe


def parse(held: Mapping[str, Any], title: str) -> Recipe:
    """Return the run that settings describe, whether the files that it reads are there or not.

    Raises:
        UserError: A setting is not known or impossible.
    """
    settings = configs.validated(Settings, held)
    common = settings.common()
    stages = {name: _stage(name, own or {}, common) for name, own in settings.stages.items()}
    text = yaml.safe_dump(dict(held), sort_keys=False, width=100)
    return Recipe(settings.title or title, stages, text)


def _stage(name: str, own: Mapping[str, Any], common: Mapping[str, Any]) -> Stage:
    verb = str(own.get("do", name)).replace("-", "_")
    if verb not in STAGES:
        asked = f"do: {own['do']}" if "do" in own else "its name"
        raise NotFoundError(
            f"stage {name!r}: {asked} is none of {', '.join(STAGES)}{near_misses(verb, STAGES)};"
            f" say what it does with `do:`"
        )
    kind = STAGES[verb]
    shared = {key: value for key, value in common.items() if key in kind.model_fields}
    if kind is Eval:
        shared["data"] = _held_out(name, own, common)
    if kind is Train and not own.get("data") and "data" not in common:
        raise UserError(f"stage {name!r}: give data, for this stage or beside `stages`")
    settings = shared | {key: value for key, value in own.items() if key != "do"}
    return configs.validated(kind, settings, "stages", name)


def _held_out(name: str, own: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """Return what to evaluate on, unless the stage says it itself."""
    if "val_data" in common or "data" in own:
        return str(common.get("val_data", ""))
    if str(common.get("data", "digits")).split("?")[0] == "digits":
        return "digits?split=test"
    raise UserError(f"stage {name!r}: give data, or val_data beside `stages`")


def _check_reads(recipe: Recipe, name: str, stage: Stage) -> None:
    """Refuse a model that is neither made before nor a file, before any work is done."""
    place = recipe.place(Path(), name)
    for path in stage.reads(place):
        if path not in place.files() and not path.is_file():
            raise NotFoundError(
                f"stage {name!r} reads {str(path)!r}, which is neither a stage before it nor a"
                f" file{near_misses(str(path), place.earlier)}"
            )


# ------------------------------------------------------------------------------- reading


def included(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file and those it includes; what it says itself goes over what they say.

    Args:
        path: The file.
        above: The files that include it.

    Raises:
        UserError: A file cannot be read, or includes itself.
    """
    if path.resolve() in above:
        raise UserError(f"{path}: includes itself")
    held = configs.read(path)
    files = held.pop(INCLUDE, [])
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"{path}: include must be a list of files, got {files!r}")
    found: dict[str, Any] = {}
    for file in files:
        found = _over(found, included(path.parent / file, (*above, path.resolve())))
    return _over(found, held)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``above`` over ``below``: mappings are joined, all else is replaced."""
    joined = dict(below)
    for key, value in above.items():
        old = joined.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        joined[key] = _over(old, value) if both else value  # type: ignore[arg-type]
    return joined


def _put(held: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"-o {override!r}: expected key.path=value, as in stages.train.epochs=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text  # no YAML, but a pattern or an address
    configs.put(held, key, value)
