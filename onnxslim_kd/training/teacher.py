"""The frozen teacher, apart from the student: its own module or session, and its cache.

A teacher that does not train needs no gradient, no training mode and no torch: its nodes leave the
trained graph, and what they gave comes in as inputs. Its BatchNormalizations cannot drift.
"""

import gc
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor

from onnxslim_kd import model as model_io
from onnxslim_kd import runtime
from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.training.lowering import lower
from onnxslim_kd.training.opnode import torch_dtype
from onnxslim_kd.training.tidy import tidied

Feeds = Mapping[str, Tensor]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Split:
    """A merged graph in two: the teacher, and the rest with the teacher's values as inputs."""

    whole: ir.Model
    teacher: ir.Model
    rest: ir.Model
    values: tuple[str, ...]
    """What goes from one to the other."""


def split(model: ir.Model, prefixes: tuple[str, ...]) -> Split | None:
    """Take the nodes whose names begin with a prefix out of a copy of ``model``.

    Returns:
        The two parts, or None where no such node is needed by the rest.
    """
    rest = model.clone()
    inside = {node for node in rest.graph if str(node.name).startswith(prefixes)}
    border = [
        value
        for node in rest.graph
        if node in inside
        for value in node.outputs
        if value.is_graph_output() or any(user not in inside for user, _ in value.uses())
    ]
    if not border:
        return None
    values = tuple(model_io.name_of(value) for value in border)
    teacher = tidied(model, values)
    for value, name in zip(border, values, strict=True):
        value.name = f"{name}_of_teacher"
        outside = ir.Value(name=name, shape=value.shape, type=value.type)
        value.replace_all_uses_with(outside, replace_graph_outputs=True)
        rest.graph.inputs.append(outside)
    common.RemoveUnusedNodesPass()(rest)
    return Split(model, teacher, rest, values)


class Teacher:
    """Computes the teacher's values for a batch.

    Args:
        parts: From `split`.
        engine: ort or torch.
        device: Where the values go.
        cache: Where outputs are kept; None for nowhere.
    """

    def __init__(
        self, parts: Split, *, engine: str, device: str, cache: "Cache | None" = None
    ) -> None:
        self.values = parts.values
        self.engine = engine
        self.inputs = [model_io.name_of(value) for value in parts.teacher.graph.inputs]
        self.device = device
        self.cache = cache
        self._session: runtime.Session | None = None
        if engine == "ort":
            self._session = self._opened(parts)
        else:
            self._module = lower(parts.teacher, trainable=()).to(device).eval()
            values = parts.teacher.graph.outputs  # autocast gives what it computed in
            self._types = {model_io.name_of(v): torch_dtype(v.dtype) for v in values if v.dtype}

    def _opened(self, parts: Split) -> runtime.Session:
        """Open a session that maps its weights, and let the models map theirs as well.

        What is mapped stays readable without its name, so that even a process that is killed
        leaves no files; where a mapped file cannot be deleted (Windows) they go with the teacher.
        """
        folder = Path(tempfile.mkdtemp(prefix="onnxslim-kd-teacher-"))
        remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name, model in (("rest", parts.rest), ("teacher", parts.teacher)):
            model_io.save(model, folder / f"{name}.onnx", external_data=True)
            _park((parts.whole, model), folder / f"{name}.onnx")
        gc.collect()  # graphs are cycles: the copies made on the way hold the weights as well
        compiled = folder / "compiled.onnx"
        runtime.write_compiled(folder / "teacher.onnx", compiled)
        threads = torch.get_num_threads()
        session = runtime.Session(compiled, threads=threads, spin=False, arena=False)
        if os.name == "posix":
            remove()
        return session

    def __call__(self, feeds: Feeds, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the teacher's values for ``feeds``, made of the samples ``indices``."""
        if self.cache is None:
            return self.compute(feeds)
        held = self.cache.read(indices)
        if held is None:
            held = self.compute(feeds)
            self.cache.write(indices, held)
        return {name: tensor.to(self.device) for name, tensor in held.items()}

    @torch.no_grad()
    def compute(self, feeds: Feeds) -> dict[str, Tensor]:
        """Return the teacher's values for ``feeds``, past the cache."""
        if self._session is None:
            given = {name: feeds[name] for name in self.inputs}
            found = self._module.forward(given, self.values)
            return {
                name: tensor.to(self._types.get(name, tensor.dtype))
                for name, tensor in found.items()
            }
        arrays = {name: feeds[name].cpu().contiguous().numpy() for name in self.inputs}
        results = self._session.run(arrays, self.values)
        return {name: torch.from_numpy(array).to(self.device) for name, array in results.items()}


def _park(models: Iterable[ir.Model], path: Path) -> None:
    """Let the weights of ``models`` be read from ``path``: training has copies of its own.

    All of them, for they may be views of the bytes of one file.
    """
    held = ir.load(path).graph.initializers
    for model in models:
        for name in held.keys() & model.graph.initializers.keys():
            tensor = held[name].const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8:
                mapped = ir.Tensor(tensor.numpy(), tensor.dtype, name=name)  # the file may go
                model.graph.initializers[name].const_value = mapped


class Cache:
    """Outputs per sample on disk, as many samples as fit the limit.

    Args:
        samples: How many there are.
        limit: Bytes on disk.
    """

    def __init__(self, samples: int, limit: int) -> None:
        self._samples, self._limit = samples, limit
        self._stores: dict[str, Array] = {}
        self._held = np.zeros(samples, bool)

    def read(self, indices: Sequence[int]) -> dict[str, Tensor] | None:
        """Return the values of the samples, or None where one of them is not held."""
        if not self._stores or not self._held[indices].all():
            return None
        return {name: torch.from_numpy(store[indices]) for name, store in self._stores.items()}

    def write(self, indices: Sequence[int], values: Feeds) -> None:
        """Keep the values of the samples that are within the limit.

        Raises:
            UserError: A value has not one row per sample.
        """
        if not self._stores:
            self._open(len(indices), values)
        rows = [row for row, index in enumerate(indices) if index < len(self._held)]
        kept = [indices[row] for row in rows]
        for name, store in self._stores.items():
            store[kept] = values[name][rows].cpu().numpy()
        self._held[kept] = True

    def _open(self, batch: int, values: Feeds) -> None:
        for name, tensor in values.items():
            if tensor.ndim == 0 or len(tensor) != batch:
                raise UserError(
                    f"cache_teacher: {name} has shape {list(tensor.shape)}, not one row per sample"
                )
        each = sum(tensor[0].numel() * tensor.element_size() for tensor in values.values())
        rows = min(self._samples, self._limit // max(each, 1))
        if rows == 0:
            raise UserError(
                f"cache_teacher: a sample takes {each} bytes, more than cache_mib holds"
            )
        for name, tensor in values.items():
            shape = (rows, *tensor.shape[1:])
            dtype = tensor.cpu().numpy().dtype
            with tempfile.TemporaryFile() as file:  # what is mapped needs no name
                self._stores[name] = _reserved(np.memmap(file, dtype, "w+", shape=shape), file)
        self._held = np.zeros(self._samples, bool)


def _reserved(store: Array, file: IO[bytes]) -> Array:
    """Take the space on disk now: a mapping that meets a full disk later kills the process.

    Raises:
        OperationError: There is not enough.
    """
    reserve = getattr(os, "posix_fallocate", None)  # not on Windows and macOS
    if reserve is not None:
        try:
            reserve(file.fileno(), 0, store.nbytes)
        except OSError as error:
            raise OperationError(
                f"cache_teacher: cannot keep {store.nbytes} bytes in {tempfile.gettempdir()}:"
                f" {error.strerror}; free some or lower cache_mib"
            ) from error
    return store
