"""What the report of a run shows, from what its stages left behind."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from onnxslim_kd import bench, machine, sensitivity
from onnxslim_kd import cost as costs
from onnxslim_kd import model as model_io
from onnxslim_kd.draw import draw
from onnxslim_kd.plans import Plan
from onnxslim_kd.recipe import Recipe
from onnxslim_kd.report import Curve, Layer, Metric, ModelRow, Plot, Refusal, ReportData
from onnxslim_kd.report_parts import curves, from_bench, plan_parts
from onnxslim_kd.shapes import sample
from onnxslim_kd.stage import MODEL, PLAN, SENSITIVITY
from onnxslim_kd.stages_graph import Merge, Prune
from onnxslim_kd.stages_measure import Bench, Eval, Sensitivity
from onnxslim_kd.stages_train import Train

LOWER = frozenset({"loss"})
"""Metrics of which less is better."""
TITLES = {
    "top1": "Top-1",
    "top5": "Top-5",
    "miou": "mIoU",
    "pixels": "Pixels",
    "map": "mAP",
    "map50": "mAP50",
}
"""Metrics that are shares, in per cent."""


def collect(recipe: Recipe, folder: Path) -> ReportData:
    """Return everything that the stages of a finished run have to show."""
    measured = [_bench(folder / f"{name}.json") for name, _ in _all(recipe, Bench)]
    data = from_bench(measured[-1]) if measured else ReportData()
    scores = [
        metric
        for name, stage in _all(recipe, Eval)
        for metric in _scores(folder / f"{name}.json", stage)
    ]
    plots = [
        plot.model_copy(update={"title": f"{name}: {plot.title}"})
        for name, _ in _all(recipe, Train)
        for plot in curves(folder / f"{name}.jsonl")
    ]
    return data.model_copy(
        update={
            "title": recipe.title,
            "metrics": (*data.metrics, *scores),
            "models": _models(recipe, folder, measured),
            "learning": tuple(plots),
            "graph_svg": _picture(recipe, folder),
            "sensitivity": _sensitivity(recipe, folder),
            "configuration": recipe.text,
            "versions": data.versions or machine.environment().versions,
            **_plans(recipe, folder),
        }
    )


def _all(recipe: Recipe, kind: type[Any]) -> list[tuple[str, Any]]:
    return [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, kind)]


def _bench(file: Path) -> bench.Report:
    return TypeAdapter(bench.Report).validate_json(file.read_text("utf-8"))


def _scores(file: Path, stage: Eval) -> Iterable[Metric]:
    """Hold the last model of an evaluation against its first."""
    found = json.loads(file.read_text("utf-8"))
    before, after = found[stage.models[0]], found[stage.models[-1]]
    for name in after if len(found) > 1 else ():
        lower = name in LOWER
        yield Metric(
            name=TITLES.get(name, name),
            before=before[name],
            after=after[name],
            unit="%" if name in TITLES else "",
            better="lower" if lower else "higher",
        )


def _models(recipe: Recipe, folder: Path, measured: list[bench.Report]) -> tuple[ModelRow, ...]:
    """Say of every model that was measured what is known of it."""
    shapes = measured[-1].cases[0].shapes if measured else None
    paths: dict[str, Path] = {}
    found: dict[str, dict[str, float]] = {}
    for kind in (Eval, Bench):
        for name, stage in _all(recipe, kind):
            paths |= zip(stage.models, stage.reads(recipe.place(folder, name)), strict=True)
    for name, path in paths.items():
        model = model_io.load(path)
        cost = costs.cost(model, sample(model, shapes))
        weights = cost.parameters / 1e6
        found[name] = {"M MACs": cost.macs / 1e6, "M parameters": weights}
        found[name]["MB"] = path.stat().st_size / 1e6
    for name, _ in _all(recipe, Eval):
        for model_name, scores in json.loads((folder / f"{name}.json").read_text("utf-8")).items():
            found[model_name] |= {_title(metric): value for metric, value in scores.items()}
    for name, stage in _all(recipe, Bench):
        rows = _bench(folder / f"{name}.json").cases[0].rows
        for model_name, row in zip(stage.models, rows, strict=True):
            found[model_name]["ms"] = row.latency.median
    return tuple(ModelRow(name=name, values=values) for name, values in found.items())


def _title(metric: str) -> str:
    return f"{TITLES[metric]} %" if metric in TITLES else metric


def _plans(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Join the plans of all prune stages; of a layer pruned twice, its first and last width."""
    layers: dict[str, Layer] = {}
    refusals: dict[str, Refusal] = {}
    notes: list[str] = []
    for name, _ in _all(recipe, Prune):
        parts = plan_parts(Plan.load(folder / f"{name}.{PLAN}"))
        for layer in parts["layers"]:
            first = layers.get(layer.name, layer)
            layers[layer.name] = layer.model_copy(update={"before": first.before})
        refusals |= {refusal.name: refusal for refusal in parts["refusals"]}
        notes += parts["plan_notes"]
    return {
        "layers": tuple(layers.values()),
        "refusals": tuple(refusals.values()),
        "plan_notes": tuple(notes),
    }


def _sensitivity(recipe: Recipe, folder: Path) -> Plot | None:
    """Draw what was measured in this run, or else the file that a cut followed."""
    files = [folder / f"{name}.{SENSITIVITY}" for name, _ in _all(recipe, Sensitivity)]
    files += [s.sensitivity for _, s in _all(recipe, Prune) if s.sensitivity is not None]
    if not files:
        return None
    found = sensitivity.load(files[0])
    lines = tuple(Curve(name=n, points=tuple(found.curve(n))) for n in found.losses)
    where = found.measure.split(" on ", 1)[-1]
    return Plot(
        title=f"What silencing them costs ({where})",
        x_label="share of channels silenced",
        y_label="lost",
        curves=lines,
    )


def _picture(recipe: Recipe, folder: Path) -> str | None:
    """Draw the merged graph, which shows most; else the model made last."""
    made = [name for name, stage in recipe.stages.items() if MODEL in stage.leaves]
    merged = [name for name, _ in _all(recipe, Merge)]
    chosen = (merged or made)[-1:]
    return draw(folder / f"{chosen[0]}.{MODEL}") if chosen else None
