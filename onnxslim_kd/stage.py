"""What every stage of a run has: its settings, where it runs, and what it leaves there.

A setting that names a model, a plan or sensitivities takes the name of an earlier stage that makes
such a thing, or a file. A model that is left out is the one made last.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import UserError

Listener = Callable[[Mapping[str, Any]], None]
MODEL, PLAN, SENSITIVITY = "onnx", "plan.json", "sensitivity.json"
"""The endings of what other stages can read."""
STUDY = "study.json"
"""The ending of what a search goes on from."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs: the run's folder, and what the earlier stages leave in it."""

    folder: Path
    name: str
    earlier: Mapping[str, Sequence[str]]
    """The endings of what each stage before leaves, in their order."""
    listen: Listener = lambda event: None

    def output(self, ending: str = MODEL) -> Path:
        """Return the path of this stage's artefact."""
        return self.folder / f"{self.name}.{ending}"

    def model(self, given: str | Path | None) -> Path:
        """Return the model that a setting names; of None, the one made last."""
        if given is None:
            made = [name for name, endings in self.earlier.items() if MODEL in endings]
            if not made:
                raise UserError(f"stage {self.name!r}: no stage before it makes a model; name one")
            given = made[-1]
        return self.file(given, MODEL)

    def file(self, given: str | Path, ending: str) -> Path:
        """Return what a setting names: what an earlier stage leaves with this ending, or a file."""
        left = ending in self.earlier.get(str(given), ())
        return self.folder / f"{given}.{ending}" if left else Path(given)

    def files(self) -> set[Path]:
        """Return everything that the stages before leave."""
        return {
            self.folder / f"{name}.{ending}"
            for name, endings in self.earlier.items()
            for ending in endings
        }

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
    leaves: ClassVar[tuple[str, ...]] = (MODEL,)
    """The endings of what later stages can read."""
    begun: ClassVar[tuple[str, ...]] = ()
    """The endings of what a stage that was interrupted goes on from."""

    def reads(self, place: Place) -> list[Path]:
        """Return the files that this stage reads, those of earlier stages among them."""
        return []

    def others(self) -> list[str]:
        """Return what may name data or code that the result depends on."""
        return []

    def run(self, place: Place) -> list[Path]:
        """Carry the stage out and return the files it wrote."""
        raise NotImplementedError
