"""Write files whole or not at all: beside the target, to the disk, then in its place."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from onnxslim_kd.access import bytes_of, graphs
from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.streaming import write_beside, write_whole

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
    if external_data:
        check_writable(target.with_name(f"{target.name}.data"), overwrite=overwrite)
        _save_two_files(model, target)
    else:
        write_file(target, lambda file: write_whole(model, file), overwrite=overwrite)


def _save_two_files(model: ir.Model, target: Path) -> None:
    """Write both in a folder beside, where they have the names that they will have."""
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            write_beside(model, Path(folder) / target.name)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the .data file first
                _put(file, target.parent / file.name)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror or error}") from error


def _put(file: Path, target: Path) -> None:
    """Move a file into place, once all of it is on the disk: a power cut leaves no half."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(file, target)


def check_writable(target: Path, *, overwrite: bool) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        UserError: The folder is missing or read-only, the file exists, or it is no file at all.
    """
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target}: the folder {target.parent} is read-only")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; give a file name")
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"{target}: exists; choose another name or pass --force")
    if target.exists() and not target.is_file():  # /dev/null would be replaced by a file
        raise UserError(f"{target}: is a device or a pipe; give a file name")


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers."""
    tensors = [v.const_value for g in graphs(model) for v in g.initializers.data.values()]
    return sum(bytes_of(tensor) for tensor in tensors if tensor is not None)


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> None:
    """Write a text file (plan, report, JSON), whole or not at all.

    Raises:
        UserError: As in `save`.
        OperationError: As in `save`.
    """
    write_file(path, lambda file: file.write_text(text, "utf-8"), overwrite=overwrite)


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
        _put(beside, target)
    except OSError as error:
        raise OperationError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
