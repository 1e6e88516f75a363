"""From a torch module to an ONNX model that can still be pruned and trained.

Exporters fold BatchNormalization into convolutions and rename the weights; pruning by name and
training want neither. So: the TorchScript exporter, told to leave training mode and constants
alone, with the module in inference mode. It shares equal tensors; that is undone, because two
layers whose scales are all 1 today need not stay equal.
"""

import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.jit._trace import TracerWarning

from onnxslim_kd import model as model_io
from onnxslim_kd import plugins
from onnxslim_kd.errors import NotFoundError, OperationError, UserError, near_misses
from onnxslim_kd.zoo import ZOO
from onnxslim_kd.zoo.blocks import calibrate, onnx_names
from onnxslim_kd.zoo.check import check_outputs
from onnxslim_kd.zoo.inputs import Input, axis_name, in_order, positional
from onnxslim_kd.zoo.weights import load_weights

OPSETS = range(17, 21)
"""Those that the TorchScript exporter writes and `model.load` would not have to raise."""
KEY = "onnxslim_kd.export"


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
        elif spec in ZOO:
            _calibrate(spec, module, *wanted.values())
        names = in_order(module, wanted)
        with positional(module, names):
            ordered = {name: wanted[name] for name in names}
            model = _export(spec, module, ordered, opset)
            check_outputs(spec, module, model, ordered)
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
    return module.cpu().eval()


def _inputs(spec: str, inputs: Mapping[str, Input | Sequence[int]] | None) -> dict[str, Input]:
    if not inputs:
        if spec not in ZOO:
            raise UserError(f"{spec}: name its inputs, for example --input image=1x3x224x224")
        return {"image": Input(ZOO[spec].shape)}
    if spec in ZOO and len(inputs) != 1:
        raise UserError(f"{spec} has one input, not {len(inputs)}: {', '.join(inputs)}")
    return {
        name: value if isinstance(value, Input) else Input(tuple(value))
        for name, value in inputs.items()
    }


def _calibrate(spec: str, module: nn.Module, image: Input) -> None:
    """Give an architecture of the zoo statistics, at the size that it will have."""
    shape = "x".join(map(str, image.shape))
    if len(image.shape) != 4:
        raise UserError(f"{spec} takes an image such as 1x3x224x224, not {shape}")
    try:
        calibrate(module, *image.shape[1:])
    except (RuntimeError, ValueError) as error:  # torch's, where sizes do not fit
        reason = str(error).partition("\n")[0]
        raise UserError(f"{spec} does not run on images of {shape}: {reason}") from error


# ----------------------------------------------------------------------------- export


def _export(spec: str, module: nn.Module, inputs: Mapping[str, Input], opset: int) -> ir.Model:
    axes = {
        name: {axis: axis_name(name, axis) for axis in value.dynamic}
        for name, value in inputs.items()
    }
    examples = tuple(value.tensor() for value in inputs.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            with _silent_log(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "You are using the legacy TorchScript")
                warnings.filterwarnings("ignore", "The feature will be removed")
                warnings.filterwarnings("ignore", category=TracerWarning)
                torch.onnx.export(
                    module,
                    examples,
                    path,
                    input_names=list(inputs),
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


@contextmanager
def _silent_log() -> Iterator[None]:
    """Drop stderr, where torch, from C++, writes the whole graph if an operator is unknown."""
    torch._C._jit_set_onnx_log_output_stream("stderr")
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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
        if source is None or source.const_value is None or source.name not in state:
            continue
        if name not in state:
            continue
        tied = state[source.name].data_ptr() == state[name].data_ptr()
        numbers = source.const_value.numpy()
        own = source if tied else model_io.new_initializer(graph, f"{name}.own", numbers)
        node.outputs[0].replace_all_uses_with(own)
        graph.remove(node, safe=True)
        if not tied:
            own.name = name


def _rename(module: nn.Module, graph: ir.Graph) -> None:
    """Give the weights their ONNX names, and the order they have in the module."""
    held = dict(graph.initializers)
    order = {name: held.pop(name) for name in module.state_dict() if name in held} | held
    graph.initializers.clear()
    for value in order.values():
        graph.initializers.add(value)
    for torch_name, name in onnx_names(module).items():
        if torch_name in graph.initializers:
            graph.initializers[torch_name].name = name
