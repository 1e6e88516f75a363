"""The stages that make a graph: export, prune, merge and infer-prune."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from onnxslim_kd import model as model_io
from onnxslim_kd.prune_config import PruneConfig, prune
from onnxslim_kd.stage import MODEL, PLAN, SENSITIVITY, Place, Stage


class Export(Stage):
    """Write an architecture of the zoo, or a torch module, as ONNX."""

    arch: str
    """A name of the zoo, or module:function."""
    inputs: dict[str, str] = Field({})
    """By name: 1x3x224x224."""
    arguments: dict[str, Any] = Field({})
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


class Prune(Stage, PruneConfig):
    """Remove whole channels, with proof; all settings of ``onnxslim-kd prune``."""

    leaves = (MODEL, PLAN)
    model: str | None = None

    def reads(self, place: Place) -> list[Path]:
        """Return the model, and the plan or the sensitivities."""
        found = self._located(place)
        more = [file for file in (found.plan, found.sensitivity) if file is not None]
        return [place.model(self.model), *more]

    def others(self) -> list[str]:
        """Return the data that is looked at, and the user's passes."""
        data = [self.data] if self.data is not None and self.looks_at_data else []
        return [*data, *self.passes, *self.passes_after]

    def run(self, place: Place) -> list[Path]:
        """Plan and cut; the plan is kept beside the model."""
        done, _ = prune(place.model(self.model), self._located(place))
        done.plan.save(place.output(PLAN), overwrite=True)
        return [*place.save(done.model), place.output(PLAN)]

    def _located(self, place: Place) -> PruneConfig:
        """Return the settings, with files where stages are named."""
        return self.model_copy(
            update={
                "plan": self.plan and place.file(self.plan, PLAN),
                "sensitivity": self.sensitivity and place.file(self.sensitivity, SENSITIVITY),
            }
        )


class Merge(Stage):
    """Join a student, its teachers and the losses."""

    student: str | None = None
    teacher: str | dict[str, str]
    """One, or several by name."""
    losses: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    inputs_map: dict[str, str] = Field({})
    """Teacher input -> student input."""
    adapt: tuple[str, ...] = ()
    """As on the command line: layout=NHWC, resize=224x224, ..."""
    free_batch: bool = False
    """Make a batch that an exporter fixed to 1 dynamic."""
    seed: int = 0
    inputs: dict[str, tuple[int, ...]] = Field({})
    """Shapes for the comparison, where none of those tried fits."""
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
            shapes = [self.inputs] if self.inputs else []
            verify_merge(merged, student, teachers, shapes=shapes, seed=self.seed)
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


class InferPrune(Stage):
    """Reduce a model to what inference needs, with proof."""

    model: str | None = None
    keep: str = "student"
    outputs: tuple[str, ...] = ()
    activation: Literal["softmax", "sigmoid"] | None = None
    format: Literal["onnx", "ort"] = "onnx"
    fp16: bool = False
    inputs: dict[str, tuple[int, ...]] = Field({})
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
