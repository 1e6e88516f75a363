"""Whether a stage is up to date: what it was made from, as hashes, beside what it made.

Files count by their content; a folder of images by the names, sizes and times of its files, for
reading all of ImageNet at every start would cost more than most stages.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import google.protobuf.message
import onnx
from pydantic import BaseModel, ConfigDict, ValidationError

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import write_text

FILE = "stages.json"


class Stamp(BaseModel):
    """What a stage was made from, and what it made."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: str
    settings: str
    inputs: dict[str, str]
    """File, data or code -> hash."""
    outputs: dict[str, str] = {}
    """Empty while the stage runs."""
    seconds: float = 0.0

    def reason(self, now: "Stamp") -> str | None:
        """Say why a stage that was stamped like this must run again; None if it need not."""
        if not self.outputs:
            return "it was not finished"
        if self.version != now.version:
            return f"it was made by version {self.version}"
        if self.settings != now.settings:
            return "its settings changed"
        changed = self.inputs.items() ^ now.inputs.items()
        return f"{min(changed)[0]} changed" if changed else None


class Stamps(BaseModel):
    """The stamps of a run's folder, by stage."""

    model_config = ConfigDict(extra="forbid")
    stages: dict[str, Stamp] = {}

    @classmethod
    def load(cls, folder: Path) -> "Stamps":
        """Read the stamps of a folder; none where there are none.

        Raises:
            UserError: The folder holds other things, or damaged stamps.
        """
        path = folder / FILE
        if not path.is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"{folder}: holds files but no run; choose another --dir")
            return cls()
        try:
            return cls.model_validate_json(path.read_text("utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: is damaged; delete the folder to start afresh") from error

    def save(self, folder: Path) -> None:
        """Write the stamps."""
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n", overwrite=True)


def stamp(settings: str, files: Iterable[Path], others: Iterable[str]) -> Stamp:
    """Return the stamp of a stage that has not run."""
    inputs: dict[str, str] = {}
    for path in files:
        inputs[path.name] = inputs.get(path.name, "") + file_hash(path)  # of several so called
    inputs |= {text: found for text in others if (found := _hash_of(text))}
    return Stamp(version=version("onnxslim-kd"), settings=_short(settings.encode()), inputs=inputs)


def hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the hashes of what a stage wrote; a file that is gone has the hash ``gone``."""
    return {
        str(path.relative_to(folder)): file_hash(path) if path.is_file() else "gone"
        for path in files
    }


def file_hash(path: Path) -> str:
    """Hash a file, with the external data of an ONNX model."""
    parts = [_content(path)]
    if path.suffix == ".onnx":
        parts += [_content(path.parent / name) for name in _beside(path)]
    return _short("".join(parts).encode()) if len(parts) > 1 else parts[0]


def _beside(path: Path) -> list[str]:
    """Return the files with external data that an ONNX file names and has."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except google.protobuf.message.DecodeError:  # whoever loads it will say so
        return []
    entries = (e for tensor in graph.initializer for e in tensor.external_data)
    names = {entry.value for entry in entries if entry.key == "location"}
    return sorted(name for name in names if (path.parent / name).is_file())


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _hash_of(text: str) -> str | None:
    """Hash what a setting names, be it a file, a folder, data or code; None for a mere word."""
    head, _, query = text.partition("?")
    kind, _, rest = head.partition(":")
    options = [part.partition("=")[2] for part in query.split("&") if part]
    found = [_path_hash(Path(name)) for name in (head, rest, *options) if name]
    found.append(_code_hash(kind) if rest else None)
    known = [each for each in found if each is not None]
    return _short("".join(known).encode()) if known else None


def _path_hash(path: Path) -> str | None:
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        return None
    listing = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            state = os.stat(os.path.join(folder, name))
            listing.append(f"{folder}/{name} {state.st_size} {state.st_mtime_ns}")
    return _short("\n".join(listing).encode())


def _code_hash(module: str) -> str | None:
    """Hash the file of a user's module, which is not imported for it."""
    local = Path(*module.split(".")).with_suffix(".py")
    if local.is_file():
        return _content(local)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a kind of data such as "npz", or a name with dots
        return None
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return _content(origin) if origin is not None and origin.is_file() else None


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
