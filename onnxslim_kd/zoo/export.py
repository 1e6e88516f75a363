"""From a torch module to an ONNX model that can still be pruned and trained.

Exporters fold BatchNormalization into convolutions and rename the weights; pruning by name and
training want neither. So: the TorchScript exporter, told to leave training mode and constants
alone, with the module in inference mode. It shares equal tensors; that is undone, because two
layers whose scales are all 1 today need not stay equal.
"""

import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils import _pytree as pytree

from onnxslim_kd import model as model_io
from onnxslim_kd import plugins
from onnxslim_kd.errors import NotFoundError, OperationError, UserError, near_misses
from onnxslim_kd.runtime import Session
from onnxslim_kd.zoo import ZOO
from onnxslim_kd.zoo.blocks import onnx_names
from onnxslim_kd.zoo.weights import load_weights

OPSETS = range(17, 21)
"""Those that the TorchScript exporter writes and `model.load` would not have to raise."""
KEY = "onnxslim_kd.export"
TOLERANCE = 1e-4
"""Between torch and ONNX Runtime, relative to the largest output."""


@dataclass(frozen=True)
class Input:
    """One input: its shape while exporting, and which axes may have any size afterwards."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    dynamic: tuple[int, ...] = (0,)

    @classmethod
    def parse(cls, text: str) -> "Input":
        """Read ``1x3x224x224`` or ``1x77:int64``.

        The first axis is dynamic; ``1?x3x224?x224?`` marks others, ``1!x3x224x224`` fixes all.

        Raises:
            UserError: The text has another form.
        """
        sizes, _, dtype = text.partition(":")
        found = [re.fullmatch(r"([1-9]\d*)([?!]?)", size) for size in sizes.split("x")]
        dims = [match.groups() for match in found if match is not None]
        if len(dims) < len(found):
            raise UserError(f"{text!r} is no shape; write it like 1x3x224x224 or 1x77:int64")
        dynamic = tuple(axis for axis, (_, mark) in enumerate(dims) if mark == "?")
        if not any(mark for _, mark in dims):
            dynamic = (0,)
        return cls(tuple(int(size) for size, _ in dims), dtype or "float32", dynamic)

    def tensor(self, *, grow: bool = False) -> Tensor:
        """Make noise of this shape, or of one that differs along the dynamic axes."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"{self.dtype!r} is no torch dtype; try float32 or int64")
        shape = list(self.shape)
        for axis in self.dynamic if grow else ():
            shape[axis] = shape[axis] + 1 if axis == 0 else shape[axis] * 2
        if dtype.is_floating_point:
            return torch.randn(shape).to(dtype)
        return torch.randint(0, 2, shape).to(dtype)


def export(
    spec: str,
    *,
    inputs: Mapping[str, Input | Sequence[int]] | None = None,
    weights: str | Path | None = None,
    arguments: Mapping[str, object] | None = None,
    opset: int = 17,
    seed: int = 0,
) -> ir.Model:
    """Export an architecture with live BatchNormalization and its own parameter names.

    Args:
        spec: A name of the zoo, or ``package.module:function`` that returns a torch module.
        inputs: The inputs, by name. A sequence of sizes means float32 with a dynamic first axis.
            Names that are parameters of ``forward`` are matched by name, others in order.
        weights: A state dict (.safetensors, .npz, .pt) to load, by torch's names or the ONNX ones.
        arguments: Keyword arguments of the function, such as ``classes``.
        opset: The ONNX opset, 17 to 20.
        seed: For the initial weights.

    Returns:
        A checked model whose outputs in ONNX Runtime equal the torch module's.

    Raises:
        UserError: The spec, an input, an argument or the weights do not fit.
        OperationError: The user's code fails, or the module cannot be exported faithfully.
    """
    if opset not in OPSETS:
        raise UserError(f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[-1]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(spec, arguments or {})
        wanted = _inputs(spec, inputs)
        if weights is not None:
            load_weights(module, weights)
        model = _export(spec, module, wanted, opset)
        _check_outputs(spec, module, model, wanted)
    shapes = {name: list(value.shape) for name, value in wanted.items()}
    model.metadata_props[KEY] = json.dumps({"spec": spec, "inputs": shapes, "seed": seed})
    return model


def build(spec: str, arguments: Mapping[str, object]) -> nn.Module:
    """Build the torch module that ``spec`` names, in inference mode.

    Raises:
        UserError: The spec or its arguments do not fit, or it gives no module.
        OperationError: The user's function fails.
    """
    if ":" not in spec and spec not in ZOO:
        raise NotFoundError(
            f"{spec!r} is no architecture of the zoo{near_misses(spec, ZOO)};"
            f" list them with --list, or give package.module:function"
        )
    function = plugins.find(ZOO[spec].spec if spec in ZOO else spec)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{spec}{inspect.signature(function)}: {error}") from error
    try:
        module = function(**arguments)
    except Exception as error:  # a user's function may raise anything
        raise OperationError(f"{spec} fails: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"{spec} returns a {type(module).__name__}, not a torch module")
    return module.eval()


def _inputs(spec: str, inputs: Mapping[str, Input | Sequence[int]] | None) -> dict[str, Input]:
    if not inputs:
        if spec not in ZOO:
            raise UserError(f"{spec}: name its inputs, for example --input image=1x3x224x224")
        return {"image": Input(ZOO[spec].shape)}
    return {
        name: value if isinstance(value, Input) else Input(tuple(value))
        for name, value in inputs.items()
    }


# ----------------------------------------------------------------------------- export


def _export(spec: str, module: nn.Module, inputs: Mapping[str, Input], opset: int) -> ir.Model:
    names = _in_order(module, inputs)
    args, kwargs = _call(module, {name: inputs[name].tensor() for name in names})
    axes = {name: {axis: _axis_name(name, axis) for axis in inputs[name].dynamic} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "You are using the legacy TorchScript")
                warnings.filterwarnings("ignore", "The feature will be removed")
                warnings.filterwarnings("ignore", category=TracerWarning)
                torch.onnx.export(
                    module,
                    args,
                    path,
                    kwargs=kwargs,
                    input_names=names,
                    dynamic_axes=axes,
                    opset_version=opset,
                    training=torch.onnx.TrainingMode.PRESERVE,
                    do_constant_folding=False,
                    dynamo=False,
                )
        except Exception as error:  # torch, or the user's forward, may raise anything
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise OperationError(f"{spec} cannot be exported: {reason}") from error
        model = ir.load(path)
        ir.external_data.load_to_model(model)
    return _cleaned(spec, module, model)


def _in_order(module: nn.Module, inputs: Mapping[str, Input]) -> list[str]:
    """Order the inputs as ``forward`` does: the exporter names them by position."""
    known = list(inspect.signature(module.forward).parameters)
    if all(name in known for name in inputs):
        return sorted(inputs, key=known.index)
    return list(inputs)


def _call(
    module: nn.Module, tensors: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return the arguments, by name where ``forward`` knows all names."""
    known = inspect.signature(module.forward).parameters
    return ((), tensors) if all(n in known for n in tensors) else (tuple(tensors.values()), {})


def _axis_name(name: str, axis: int) -> str:
    return "batch" if axis == 0 else f"{name}_{axis}"


def _cleaned(spec: str, module: nn.Module, model: ir.Model) -> ir.Model:
    _unshare(module, model.graph)
    _rename(module, model.graph)
    outputs = ZOO[spec].outputs if spec in ZOO else ()
    for index, value in enumerate(model.graph.outputs):
        only = "output" if len(model.graph.outputs) == 1 else f"output_{index}"
        value.name = outputs[index] if outputs else only
        value.shape = None  # the exporter invents a name for each axis; inference knows better
    model.producer_name, model.producer_version = "onnxslim-kd", None
    model_io.normalised(model)
    with model_io.without_weights(model) as proto:
        try:
            onnx.checker.check_model(proto, full_check=True)
        except onnx.checker.ValidationError as error:
            raise OperationError(f"{spec}: the exporter wrote an invalid model: {error}") from error
    return model


def _unshare(module: nn.Module, graph: ir.Graph) -> None:
    """Give every parameter its own initializer again, tied parameters apart."""
    state = module.state_dict(keep_vars=True)
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Identity" else None
        name = node.outputs[0].name
        if source is None or source.const_value is None or name not in state:
            continue
        assert source.name is not None
        own = source
        if state[source.name].data_ptr() != state[name].data_ptr():
            own = model_io.new_initializer(graph, f"{name}.own", state[name].detach().numpy())
        node.outputs[0].replace_all_uses_with(own)
        graph.remove(node, safe=True)
        own.name = name if own is not source else own.name


def _rename(module: nn.Module, graph: ir.Graph) -> None:
    for torch_name, name in onnx_names(module).items():
        if torch_name in graph.initializers:
            graph.initializers[torch_name].name = name


# ------------------------------------------------------------------------------ check


def _check_outputs(
    spec: str, module: nn.Module, model: ir.Model, inputs: Mapping[str, Input]
) -> None:
    """Compare with torch at the shapes exported and, if axes are dynamic, at others."""
    session = Session(model)
    for grow in (False, True) if any(value.dynamic for value in inputs.values()) else (False,):
        tensors = {name: inputs[name].tensor(grow=grow) for name in _in_order(module, inputs)}
        shapes = ", ".join(f"{name}={'x'.join(map(str, t.shape))}" for name, t in tensors.items())
        advice = "; export with fixed sizes, as in 1!x3x224x224" if grow else ""
        expected = _run_torch(module, tensors, f"{spec} at {shapes}", advice)
        try:
            got = session.run({v.name: tensors[v.name].numpy() for v in session.inputs})
        except OperationError as error:
            raise OperationError(f"{spec} at {shapes}: {error}{advice}") from error
        for (name, array), wanted in zip(got.items(), expected, strict=True):
            if array.shape != wanted.shape or not _close(array, wanted):
                raise OperationError(
                    f"{spec} at {shapes}: output {name} differs from torch's{advice}"
                )


def _run_torch(
    module: nn.Module, tensors: dict[str, Tensor], what: str, advice: str
) -> list[np.ndarray[Any, Any]]:
    args, kwargs = _call(module, tensors)
    try:
        with torch.no_grad():
            result = module(*args, **kwargs)
    except Exception as error:  # the user's forward may raise anything
        raise OperationError(f"{what}: torch fails: {error}{advice}") from error
    return [leaf.numpy() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _close(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(got, wanted))
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    return bool(np.allclose(got, wanted, rtol=0, atol=TOLERANCE * scale))
