"""What to feed models that are compared: shapes, batches and inputs, checked against the model."""

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import runtime
from onnxslim_kd.errors import NotFoundError, UserError, near_misses
from onnxslim_kd.model import dims, has_rank, name_of

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
SAMPLES = 8
"""Random inputs whose outputs are compared; one is timed."""


@dataclass(frozen=True)
class Workload:
    """One size of inputs: the first feed is timed, the outputs of all are compared."""

    shapes: Mapping[str, Shape]
    feeds: tuple[Mapping[str, Array], ...]


def workloads(
    model: ir.Model,
    shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    batches: Sequence[int] = (),
    inputs: Mapping[str, Array] | None = None,
) -> list[Workload]:
    """Return one workload per entry of ``shapes`` and batch.

    Args:
        model: Whose inputs to fill.
        shapes: Shapes of inputs by name, one mapping per workload; a free first axis that is not
            given is 1.
        batches: Sizes of the free first axes.
        inputs: Arrays instead of random numbers; they settle the shapes.

    Raises:
        UserError: A shape is missing or does not fit; the message names the input.
        NotFoundError: A name is no input of the model.
    """
    if inputs is not None:
        if shapes or batches:
            raise UserError("given inputs settle the shapes; leave out --input and --batch")
        return [_given(model, inputs)]
    made = []
    for asked in shapes or ({},):
        _check_names(model, asked)
        for batch in batches or (None,):
            full = {name_of(v): _shape(v, asked, batch) for v in model.graph.inputs}
            _check_batch(model, full, batch)
            made.append(Workload(full, _random(model, full)))
    return made


def _random(model: ir.Model, shapes: Mapping[str, Shape]) -> tuple[Mapping[str, Array], ...]:
    for value in model.graph.inputs:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise UserError(f"input {value.name} is no tensor, and nothing else can be fed")
    try:
        return tuple(runtime.random_feeds(model, shapes, seed=seed) for seed in range(SAMPLES))
    except MemoryError as error:
        sizes = ", ".join(f"{name} {_text(shape)}" for name, shape in shapes.items())
        raise UserError(f"inputs of this size do not fit into memory: {sizes}") from error


def _shape(value: ir.Value, asked: Mapping[str, Sequence[int]], batch: int | None) -> Shape:
    name, own = name_of(value), _own(value)
    shape = list(asked.get(name, own or ()))
    if own is None and name not in asked:
        raise UserError(f"input {name} has no rank; give its shape: --input {name}=1x3x224x224")
    if shape and (own is None or own[0] is None):
        shape[0] = batch or (shape[0] if shape[0] is not None else 1)
    if None in shape:
        form = "x".join("?" if d is None else str(d) for d in shape)
        raise UserError(f"input {name} is free in size; give every ? of --input {name}={form}")
    _check_fit(name, own, [int(d) for d in shape if d is not None])
    return tuple(int(d) for d in shape if d is not None)


def _own(value: ir.Value) -> tuple[int | None, ...] | None:
    return dims(value) if has_rank(value) else None


def _check_fit(name: str, own: Sequence[int | None] | None, shape: Sequence[int]) -> None:
    fits = own is None or (
        len(own) == len(shape) and all(a in (None, b) for a, b in zip(own, shape, strict=True))
    )
    empty = any(d < 1 for d in shape) and tuple(own or ()) != tuple(shape)
    if not fits or empty:
        wanted = "" if own is None else f", the model takes {_text(own)}"
        raise UserError(f"input {name}: shape {_text(shape)} does not fit{wanted}")


def _check_batch(model: ir.Model, shapes: Mapping[str, Shape], batch: int | None) -> None:
    if batch is not None and all(batch not in shape[:1] for shape in shapes.values()):
        fixed = {name: _text(shape) for name, shape in shapes.items()}
        raise UserError(f"--batch {batch}: every input has a fixed first axis: {fixed}")


def _check_names(model: ir.Model, names: Iterable[str]) -> None:
    known = [name_of(value) for value in model.graph.inputs]
    for name in names:
        if name not in known:
            raise NotFoundError(
                f"the model has no input {name}, it has {', '.join(known)}"
                f"{near_misses(name, known)}"
            )


def _text(shape: Sequence[int | None]) -> str:
    return "x".join("?" if d is None else str(d) for d in shape) or "(scalar)"


def _given(model: ir.Model, inputs: Mapping[str, Array]) -> Workload:
    _check_names(model, inputs)
    for value in model.graph.inputs:
        name = name_of(value)
        if name not in inputs:
            raise UserError(f"the inputs given hold no array for input {name}")
        if value.dtype is not None and _kind(value.dtype) != inputs[name].dtype.type:
            raise UserError(
                f"input {name}: {inputs[name].dtype} given, the model takes"
                f" {_kind(value.dtype).__name__}"
            )
        _check_fit(name, _own(value), inputs[name].shape)
    return Workload({name: array.shape for name, array in inputs.items()}, (inputs,))


def _kind(dtype: ir.DataType) -> type:
    """The type of an array that holds such a tensor; npz files hold strings as text."""
    return np.str_ if dtype == ir.DataType.STRING else dtype.numpy().type


def read_inputs(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read an npz file with one array per input.

    Raises:
        UserError: The file is missing, no npz, or holds Python objects.
    """
    try:
        with Path(path).open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise UserError(f"{path}: is no npz file; write one with numpy.savez")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: cannot be read as npz: {error}") from error


def parse_shapes(texts: Sequence[str]) -> list[dict[str, Shape]]:
    """Read ``name=1x3x224x224`` texts; a name given twice makes a sweep.

    Raises:
        UserError: A text is malformed, or two inputs are given unequally often.
    """
    given: dict[str, list[Shape]] = {}
    for text in texts:
        name, _, shape = text.rpartition("=")
        parts = shape.replace(",", "x").split("x") if shape else []
        if not name or not all(part.strip().isdigit() for part in parts):
            raise UserError(f"--input {text}: write it as name=1x3x224x224")
        given.setdefault(name, []).append(tuple(int(part) for part in parts))
    length = max(map(len, given.values()), default=0)
    for name, shapes in given.items():
        if len(shapes) not in (1, length):
            raise UserError(
                f"--input {name} is given {len(shapes)} times and another input {length} times;"
                f" give each once or equally often"
            )
    return [{name: s[i % len(s)] for name, s in given.items()} for i in range(length)]
