"""Checkpoints: a folder per moment, whole or not there; resuming needs nothing else.

``DIR/<epoch>`` is the state after so many epochs, ``DIR/<epoch>-<step>`` one inside an epoch. In
it: ``state.safetensors`` (weights, statistics, optimiser, moving average), ``state.json`` (where
the run stood) and, if asked for, ``eval_model.onnx``. A folder is filled beside its place and then
renamed, so a kill at any moment leaves the older ones. The settings are not in it: edit them and
go on.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onnxslim_kd.errors import OperationError, UserError

STATE, TENSORS = "state.json", "state.safetensors"
PLACE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps."""

    epoch: int
    """Epochs that are over."""
    step: int
    """Steps done in the epoch that is not."""
    graph: str
    """The fingerprint of the graph that is trained."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else the run remembers, as JSON: the best model, the history."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.epoch}-{self.step}" if self.step else str(self.epoch)


def fingerprint(model: ir.Model) -> str:
    """Return a hash of the graph without its numbers: nodes, wires, names and shapes."""
    digest = hashlib.sha256()
    for graph in model.graphs():
        for node in graph:
            wires = [value.name if value else "" for value in node.inputs]
            digest.update(repr((node.op_type, wires, [v.name for v in node.outputs])).encode())
        for name, value in sorted(graph.initializers.items()):
            shape = value.const_value.shape.numpy() if value.const_value is not None else ()
            digest.update(repr((name, tuple(shape))).encode())
    return digest.hexdigest()


def make(folder: Path) -> None:
    """Make the folder that checkpoints live in, if it is not there.

    Raises:
        OperationError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperationError(f"checkpoint {folder}: cannot be made: {error.strerror}") from error


def save(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    extras: Mapping[str, Callable[[Path], object]] | None = None,
    keep: int = 3,
) -> Path:
    """Write a checkpoint, whole or not at all, then remove all but the newest ``keep``.

    Args:
        folder: Where checkpoints live; made if it is not there.
        checkpoint: What to write.
        extras: More files: name -> a function that writes it to a path.
        keep: How many checkpoints stay.

    Raises:
        OperationError: The disk refused; the older checkpoints are as they were.
    """
    place, beside = folder / checkpoint.name, folder / f".{checkpoint.name}.{os.getpid()}"
    try:
        make(folder)
        _sweep(folder)
        beside.mkdir()
        save_file(
            {name: t.contiguous() for name, t in checkpoint.tensors.items()}, beside / TENSORS
        )
        for name, write in (extras or {}).items():
            write(beside / name)
        state = {
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "graph": checkpoint.graph,
            "notes": checkpoint.notes,
        }
        (beside / STATE).write_text(json.dumps(state))
        _put_in_place(beside, place)
    except (OSError, SafetensorError) as error:
        raise OperationError(
            f"checkpoint {place}: cannot be written: {error}; the older ones are as they were"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in _places(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _put_in_place(beside: Path, place: Path) -> None:
    for path in (*beside.iterdir(), beside):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if place.exists():  # the same moment again, after the settings were edited
        os.rename(place, place.with_name(f".old.{place.name}.{os.getpid()}"))
    os.rename(beside, place)
    _sweep(place.parent)


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(".*"):
        if path.is_dir() and PLACE.match(path.name.removeprefix(".").removeprefix("old.")):
            shutil.rmtree(path, ignore_errors=True)


def _places(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first, by number."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = PLACE.fullmatch(path.name)
        if match and path.is_dir():
            found.append(((int(match[1]), int(match[2] or 0)), path))
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path, graph: str) -> Checkpoint | None:
    """Return the newest checkpoint, or None where there is none.

    Raises:
        UserError: It is of another graph, or damaged.
    """
    places = _places(folder)
    if not places:
        return None
    place = places[0]
    try:
        state = json.loads((place / STATE).read_text())
        tensors = load_file(place / TENSORS)
        checkpoint = Checkpoint(tensors=tensors, **state)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {place} is damaged: {error}; remove it to go on from the one before"
        ) from error
    if checkpoint.graph != graph:
        raise UserError(
            f"checkpoint {place} is of another graph; give the model it was made with, or another"
            f" folder"
        )
    return checkpoint
