"""Whether an exported model computes what the torch module does."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxslim_kd.errors import OperationError
from onnxslim_kd.model import name_of
from onnxslim_kd.runtime import Session
from onnxslim_kd.zoo.inputs import Input, axis_name

TOLERANCE = 1e-3
"""Relative to the largest output; an untrained net of 150 layers comes to 1e-4."""


def check_outputs(
    spec: str, module: nn.Module, model: ir.Model, inputs: Mapping[str, Input]
) -> None:
    """Compare with torch at the shapes exported and, if axes are dynamic, at others.

    The outputs' shapes are then declared as they were observed.

    Raises:
        OperationError: The outputs differ, or one of the two fails.
    """
    session = Session(model)
    found = []
    for grow in (False, True) if any(value.dynamic for value in inputs.values()) else (False,):
        tensors = {name: value.tensor(grow=grow) for name, value in inputs.items()}
        shapes = ", ".join(f"{name}={'x'.join(map(str, t.shape))}" for name, t in tensors.items())
        advice = "; export with fixed sizes, as in 1!x3x224x224" if grow else ""
        expected = _run_torch(module, tensors, f"{spec} at {shapes}", advice)
        try:
            got = session.run({v.name: tensors[v.name].numpy() for v in session.inputs})
        except OperationError as error:
            raise OperationError(f"{spec} at {shapes}: {error}{advice}") from error
        if len(got) != len(expected):
            raise OperationError(
                f"{spec} returns {len(expected)} tensors, the exported graph {len(got)};"
                f" return every tensor once"
            )
        for (name, array), wanted in zip(got.items(), expected, strict=True):
            if array.shape != wanted.shape or not _close(array, wanted):
                raise OperationError(
                    f"{spec} at {shapes}: output {name} differs from torch's{advice}"
                )
        found.append({name: array.shape for name, array in got.items()})
    _declare_shapes(model, found)


def _declare_shapes(model: ir.Model, found: list[dict[str, tuple[int, ...]]]) -> None:
    """Declare an axis that never changed as fixed."""
    for value in model.graph.outputs:
        name = name_of(value)
        axes = enumerate(zip(*(shapes[name] for shapes in found), strict=True))
        value.shape = ir.Shape(
            [sizes[0] if len(set(sizes)) == 1 else axis_name(name, axis) for axis, sizes in axes]
        )


def _run_torch(
    module: nn.Module, tensors: dict[str, Tensor], what: str, advice: str
) -> list[np.ndarray[Any, Any]]:
    try:
        with torch.no_grad():
            return [result.detach().numpy() for result in module(*tensors.values())]
    except Exception as error:  # the user's forward may raise anything
        raise OperationError(f"{what}: torch fails: {error}{advice}") from error


def _close(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(got, wanted))
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    return bool(np.allclose(got, wanted, rtol=0, atol=TOLERANCE * scale))
