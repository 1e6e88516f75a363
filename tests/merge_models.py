"""Small pairs for the tests of merge: a student and a teacher of other width, depth and names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxslim_kd.model import save
from onnxslim_kd.runtime import Array, Session

HEADER = '<ir_version: 8, opset_import: ["" : {opset}]>'
NET = """
{name} (float[{batch},3,{size},{size}] {x}) => (float[{batch},{classes}] {y})
<float[{width},3,3,3] w1, float[{width},{width},3,3] w2, float[{width},{classes}] fc> {{
  c1 = Conv<pads=[1,1,1,1]>({x}, w1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1], strides=[2,2]>(r1, w2)
  r2 = Relu(c2)
  g = GlobalAveragePool(r2)
  f = Flatten(g)
  {y} = MatMul(f, fc)
}}
"""


def net(
    *,
    opset: int = 17,
    batch: int | str = "N",
    width: int = 4,
    x: str = "x",
    y: str = "y",
    size: int | str = 8,
    classes: int = 5,
    seed: int = 0,
) -> ir.Model:
    """A small convolutional classifier with random weights."""
    body = NET.format(name="net", batch=batch, width=width, x=x, y=y, size=size, classes=classes)
    return text(HEADER.format(opset=opset) + body, seed=seed)


def text(source: str, *, seed: int = 0) -> ir.Model:
    """A model from ONNX text; declared initializers without numbers get random ones."""
    model = ir.from_onnx_text(source)
    rng = np.random.default_rng(seed)
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.producer() or value.is_graph_input() or value.const_value:
                continue
            assert value.shape is not None, f"{value.name} is not declared"
            array = rng.standard_normal([int(d) for d in value.shape]).astype(np.float32)
            value.const_value = ir.tensor(array * 0.5, name=value.name)
            model.graph.register_initializer(value)
    return model


def saved(folder: Path, **models: ir.Model) -> list[Path]:
    """Write models as ``<name>.onnx``; return their paths."""
    paths = []
    for name, model in models.items():
        paths.append(folder / f"{name}.onnx")
        save(model, paths[-1])
    return paths


def run(
    model: ir.Model, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """Run without optimisation, so that equal models give equal bits."""
    return Session(model, optimise=False).run(feeds, outputs)
