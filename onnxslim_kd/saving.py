"""Write files whole or not at all: beside the target, to the disk, then in its place."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.normalise import SMALL

TWO_GB = 2**31 - 2**20
"""Protobuf refuses messages of 2 GiB; the margin is for the graph around the weights."""


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    external_data: bool | None = None,
) -> None:
    """Write ``model`` to ``path``, whole or not at all.

    Args:
        model: The model; it stays as it is, its memory-mapped weights are streamed.
        path: Where to. With external data a second file, ``<path>.data``, stands beside it.
        overwrite: Whether a file that is there may be replaced.
        external_data: True or False to ask for it, None for "where protobuf cannot hold it".

    Raises:
        UserError: The folder is missing, or the file is there and ``overwrite`` is False.
        OperationError: The disk refused (full, read-only).
    """
    target = Path(path)
    check_writable(target, overwrite=overwrite)
    if external_data is None:
        external_data = weight_bytes(model) > TWO_GB
    try:
        folder = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        _write(model, Path(folder) / target.name, external_data=external_data)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the .data file first
            os.replace(file, target.parent / file.name)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(target: Path, *, overwrite: bool) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        UserError: The folder is missing or read-only, or the file exists.
    """
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target}: the folder {target.parent} is read-only")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; give a file name")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists; choose another name or pass --force")


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def _write(model: ir.Model, path: Path, *, external_data: bool) -> None:
    if external_data:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=SMALL)
    else:
        with embedded(model):
            proto = ir.serde.serialize_model(model)
        weights = {tensor.name for tensor in proto.graph.initializer}
        infos = [info for info in proto.graph.value_info if info.name not in weights]
        del proto.graph.value_info[:]  # a weight says its shape itself
        proto.graph.value_info.extend(infos)
        path.write_bytes(proto.SerializeToString())
    for file in path.parent.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


@contextmanager
def embedded(model: ir.Model) -> Iterator[None]:
    """Serialise external tensors by value for the time of the block."""
    values = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    held = [value.const_value for value in values]
    try:
        for value, tensor in zip(values, held, strict=True):
            assert tensor is not None
            value.const_value = ir.Tensor(tensor.numpy(), name=tensor.name)
        yield
    finally:
        for value, tensor in zip(values, held, strict=True):
            value.const_value = tensor


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> None:
    """Write a text file (plan, report, JSON), whole or not at all.

    Raises:
        UserError: As in `save`.
        OperationError: As in `save`.
    """
    write_file(path, lambda file: file.write_text(text), overwrite=overwrite)


def write_file(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = False
) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place.

    Raises:
        UserError: As in `save`.
        OperationError: As in `save`.
    """
    target = Path(path)
    check_writable(target, overwrite=overwrite)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
