"""Carry a recipe out: stage by stage, in a folder that keeps every artefact.

A stage whose settings, inputs and outputs are as they were, by their hashes, is not run again.
"""

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxslim_kd.errors import OnnxSlimError, OperationError, UserError
from onnxslim_kd.model import write_text
from onnxslim_kd.recipe import Recipe
from onnxslim_kd.report import ReportData, render
from onnxslim_kd.report_markdown import render_markdown
from onnxslim_kd.run_report import collect
from onnxslim_kd.stage import Listener, Place, Stage
from onnxslim_kd.stamps import Stamp, Stamps, hashes, stamp

CONFIG, HTML, MARKDOWN = "config.yaml", "report.html", "report.md"


def run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    listen: Listener = lambda event: None,
) -> ReportData:
    """Run what is not up to date, and write ``report.html`` and ``report.md``.

    Args:
        recipe: What to do.
        folder: Where the artefacts go; it is made, or holds an earlier run.
        resume: Whether a training that was interrupted goes on from its last checkpoint.
        listen: Called with ``stage`` events (name, kind, number, of, reason; seconds at the end)
            and those of training.

    Returns:
        What the reports show.

    Raises:
        UserError: The folder holds something else, or a stage's settings do not fit its model.
        OperationError: A stage failed; those before it need not run again.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("run is for one process; start `onnxslim-kd train` with torchrun instead")
    stamps = Stamps.load(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperationError(f"{folder}: cannot be made: {error.strerror}") from error
    stamps.save(folder)
    write_text(folder / CONFIG, recipe.text, overwrite=True)
    for number, (name, stage) in enumerate(recipe.stages.items(), start=1):
        place = replace(recipe.place(folder, name), listen=listen)
        event = {"event": "stage", "name": name, "kind": type(stage).__name__, "number": number}
        event["of"] = len(recipe.stages)
        now = stamp(stage.model_dump_json(), stage.reads(place), stage.others())
        reason = _reason(stamps.stages.get(name), now, folder)
        listen(event | {"reason": reason, "kept": reason is None})
        if reason is not None:
            seconds = _carry_out(stage, place, stamps, now, resume=resume)
            listen(event | {"seconds": seconds})
    data = collect(recipe, folder)
    write_text(folder / HTML, render(data), overwrite=True)
    write_text(folder / MARKDOWN, render_markdown(data), overwrite=True)
    return data


def pending(recipe: Recipe, folder: Path) -> dict[str, str | None]:
    """Say of every stage why `run` would carry it out; None for one that is up to date.

    Raises:
        UserError: The folder holds something else.
    """
    stamps = Stamps.load(folder)
    found: dict[str, str | None] = {}
    made: dict[Path, str] = {}
    for name, stage in recipe.stages.items():
        place = recipe.place(folder, name)
        first = next((made[path] for path in stage.reads(place) if path in made), None)
        if first is not None:
            found[name] = f"{first} comes first"
        else:
            now = stamp(stage.model_dump_json(), stage.reads(place), stage.others())
            found[name] = _reason(stamps.stages.get(name), now, folder)
        if found[name] is not None:
            made |= {place.output(ending): name for ending in stage.leaves}
    return found


def _reason(before: Stamp | None, now: Stamp, folder: Path) -> str | None:
    """Say why a stage must run; None if it need not."""
    if before is None:
        return "it is new"
    found = hashes(folder, (folder / name for name in before.outputs))
    changed = found.items() - before.outputs.items()
    if changed:
        name, state = min(changed)
        return f"{name} is gone" if state == "gone" else f"{name} changed"
    return before.reason(now)


def _carry_out(stage: Stage, place: Place, stamps: Stamps, now: Stamp, *, resume: bool) -> float:
    """Run a stage and stamp it; until it is finished, its stamp says so."""
    before = stamps.stages.get(place.name)
    if not (resume and before is not None and before.inputs == now.inputs):
        _forget(stage, place)
    stamps.stages[place.name] = now
    stamps.save(place.folder)
    started = time.perf_counter()
    try:
        files = stage.run(place)
    except OnnxSlimError as error:
        raise type(error)(f"stage {place.name!r}: {error}") from error
    seconds = time.perf_counter() - started
    update: Mapping[str, Any] = {"outputs": hashes(place.folder, files), "seconds": seconds}
    stamps.stages[place.name] = now.model_copy(update=update)
    stamps.save(place.folder)
    return seconds


def _forget(stage: Stage, place: Place) -> None:
    """Remove what an earlier, interrupted run of this stage would go on from."""
    for path in map(place.output, stage.begun):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
