"""Real models for strip.py: from installed packages, exported from transformers, and a folder's."""

import importlib
import math
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

PACKAGES = ("rapidocr_onnxruntime:models", "silero_vad:data", "onnx:backend/test/data/light")
TRANSFORMERS = ("vit", "bert", "gpt2", "llama", "swin", "convnext", "t5")


def shipped() -> list[Path]:
    """Models inside of installed packages."""
    found = []
    for entry in PACKAGES:
        package, inside = entry.split(":")
        found += sorted(Path(str(files(package).joinpath(inside))).glob("*.onnx"))
    return found


def whole(source: Path, folder: Path) -> Path:
    """Give ``source``, or in ``folder`` one file that also holds the weights it lacks.

    Those of onnx's "light" models are ConstantOfShape nodes: they become seeded random numbers.
    """
    target = folder / source.name
    outside = onnx.load(source, load_external_data=False).graph.initializer
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in outside):
        target = folder / f"{source.stem}_whole.onnx"
        onnx.save(onnx.load(source), target)
        return target
    model = onnx.load(source)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "ConstantOfShape" and n.input[0] in shapes]
    if not nodes or "light" not in source.name:
        return source
    rng = np.random.default_rng(0)
    for node in nodes:
        shape = tuple(int(size) for size in shapes[node.input[0]])
        fan_in = math.prod(shape[1:] or (1,))
        array = rng.standard_normal(shape, np.float32) * math.sqrt(0.5 / fan_in)
        if len(shape) == 1:
            array = rng.uniform(0.7, 1.1, shape).astype(np.float32)  # a scale, variance or bias
        model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, shape)
        )
        model.graph.node.remove(node)
    onnx.save(model, target)
    return target


def exported(folder: Path) -> list[Path]:
    """Small transformers with random weights, by both of torch's exporters."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    transformer_models = importlib.import_module("transformer_models")

    found = []
    for name in TRANSFORMERS:
        for dynamo in (False, True):
            path = folder / f"{name}_{'dynamo' if dynamo else 'torchscript'}.onnx"
            try:
                if not path.exists():
                    transformer_models.export(name, path, dynamo=dynamo)
                found.append(path)
            except Exception as error:  # the exporter's own limits; the model is named as left out
                print(f"note: {path.stem} is left out, torch cannot export it: {error}"[:200])
    return found
