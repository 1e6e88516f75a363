"""From a batch to the graph's inputs: images, labels, and the seeded masks that losses ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.roles import Roles
from onnxslim_kd.training.data import Batch

ENTRIES = {"class": "label"}
"""The kind of a label input -> the entry that fills it, where it has not the same name."""


@dataclass(frozen=True)
class Feeder:
    """Fills the inputs of one graph.

    Args:
        model: Whose graph inputs are filled.
        roles: Of a merged model; None for a plain one.
        seed: Of the masks.
        device: Where the tensors go.
        shard: (rank, processes); masks are drawn for the whole batch and each process takes its
            part, so that many processes train as one does.
    """

    model: ir.Model
    roles: Roles | None = None
    seed: int = 0
    device: str = "cpu"
    shard: tuple[int, int] = (0, 1)

    def __call__(self, batch: Batch, step: int = 0, skip: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return a tensor for every graph input but those in ``skip``.

        Raises:
            UserError: The data has nothing for an input, or not in its shape.
        """
        masks = {mask.input: mask.keep for mask in (self.roles.masks if self.roles else ())}
        feeds = {}
        for number, value in enumerate(self.model.graph.inputs):
            name = model_io.name_of(value)
            if name in skip:
                continue
            if name in masks:
                seeds = [self.seed, step, number]
                tensor = self._mask(value, masks[name], len(batch), seeds)
            else:
                tensor = self._entry(value, batch)
            feeds[name] = tensor.to(self.device, non_blocking=True)
        return feeds

    def data_inputs(self) -> list[ir.Value]:
        """Return the inputs that hold data, not labels or masks."""
        inputs = list(self.model.graph.inputs)
        if self.roles is None:
            return inputs
        others = {label.input for label in self.roles.labels}
        others |= {mask.input for mask in self.roles.masks}
        return [value for value in inputs if value.name not in others]

    def extras(self) -> list[str]:
        """Return the inputs that evaluation does not need: labels and masks."""
        data = {value.name for value in self.data_inputs()}
        names = [model_io.name_of(value) for value in self.model.graph.inputs]
        return [name for name in names if name not in data]

    def zeros(self, value: ir.Value, size: int) -> Tensor:
        """Return zeros for an input that nothing of interest reads."""
        sides = [side or 1 for side in model_io.dims(value)[1:]]
        return torch.zeros((size, *sides), dtype=_torch_dtype(value))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every data input without the batch, 0 for an unknown side."""
        values = self.data_inputs()
        names = [model_io.name_of(value) for value in values]
        if len(values) == 1:
            names = ["image"]
        sides = [[side or 0 for side in model_io.dims(value)[1:]] for value in values]
        return {name: tuple(shape) for name, shape in zip(names, sides, strict=True)}

    def _entry(self, value: ir.Value, batch: Batch) -> Tensor:
        name = model_io.name_of(value)
        roles = self.roles.labels if self.roles else ()
        labels = {label.input: ENTRIES.get(label.kind, label.kind) for label in roles}
        key = name if name in batch.entries else labels.get(name, name)
        if key not in batch.entries and name not in labels and len(self.data_inputs()) == 1:
            key = "image"
        if key not in batch.entries:
            raise UserError(
                f"the data has no {key!r} for the model's input {name!r}, only"
                f" {', '.join(sorted(batch.entries))}"
            )
        tensor = batch.entries[key]
        if value.shape is not None:
            if tensor.ndim == 1 and len(value.shape) == 2:  # Paddle's labels are [B, 1]
                tensor = tensor.unsqueeze(1)
            _check_shape(value, tensor)
        dtype = _torch_dtype(value)
        if dtype == torch.uint8 and tensor.is_floating_point():  # an image, from 0 to 1 by now
            tensor = (tensor * 255).round()
        return tensor.to(dtype)

    def _mask(self, value: ir.Value, keep: float, size: int, seeds: Sequence[int]) -> Tensor:
        rank, processes = self.shard
        sides = model_io.dims(value)[1:]
        if None in sides:
            raise UserError(f"mask input {value.name!r} has a dynamic shape beside the batch")
        draws = np.random.default_rng(seeds).random((size * processes, *sides))  # type: ignore[arg-type]
        mine = draws[rank * size : (rank + 1) * size] < keep
        return torch.from_numpy(mine).to(_torch_dtype(value))


def _check_shape(value: ir.Value, tensor: Tensor) -> None:
    expected = model_io.dims(value)
    fits = len(expected) == tensor.ndim and all(
        side is None or side == given
        for side, given in zip(expected[1:], tensor.shape[1:], strict=True)
    )
    if not fits:
        wanted = ["batch", *("?" if side is None else side for side in expected[1:])]
        raise UserError(
            f"input {value.name!r} has shape [{', '.join(map(str, wanted))}], the data gives"
            f" {list(tensor.shape)}; change preprocess"
        )


def _torch_dtype(value: ir.Value) -> torch.dtype:
    dtype: Any = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    if dtype.name == "bfloat16":
        return torch.bfloat16
    return torch.from_numpy(np.empty(0, dtype)).dtype
