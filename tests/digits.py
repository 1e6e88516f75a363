"""Small CNNs, trained here on scikit-learn's digits with the package's own lowering."""

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional as F

from onnxslim_kd import model as model_io
from onnxslim_kd.runtime import Session
from onnxslim_kd.training.evaluate import Predictor, Reading, evaluate
from onnxslim_kd.training.lowering import lower
from onnxslim_kd.training.samples import read
from onnxslim_kd.zoo.export import export
from tests.training_models import build

LAYERS = ((1, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1))
"""(in, out, stride) of each convolution; a BatchNormalization and a Relu follow."""
DATA = "digits?split=train"
TEST = "digits?split=test"


def untrained(seed: int) -> ir.Model:
    lines, shapes, x = [], {}, "image"
    for i, (before, after, stride) in enumerate(LAYERS):
        lines.append(
            f"c{i} = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[{stride},{stride}]>"
            f"({x}, conv{i}_weights)"
            f" b{i} = BatchNormalization(c{i}, s{i}, o{i}, m{i}, v{i}) r{i} = Relu(b{i})"
        )
        shapes[f"conv{i}_weights"] = (after, before, 3, 3)
        shapes |= {f"{name}{i}": (after,) for name in "somv"}
        x = f"r{i}"
    lines.append(f"p = GlobalAveragePool({x}) f = Flatten(p)")
    lines.append("logits = Gemm<transB=1>(f, fc_weights, fc_bias)")
    shapes |= {"fc_weights": (10, LAYERS[-1][1]), "fc_bias": (10,)}
    model = build("\n".join(lines), "float[N,1,8,8] image", "float[N,10] logits", shapes)
    rng = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        shape = shapes[name]
        if len(shape) > 1:
            spread = np.sqrt(2 / np.prod(shape[1:]))
            array = rng.normal(0, spread, shape)
        else:
            array = np.full(shape, float(name[0] in "sv"))
        value.const_value = ir.Tensor(array.astype(np.float32), name=name)
    return model_io.load(model)


def residual(seed: int) -> ir.Model:
    """A ResNet-20 with half of its channels, whose layers matter unequally."""
    arguments = {"channels": 1, "width": 8}
    return export("resnet20", inputs={"image": (1, 1, 8, 8)}, arguments=arguments, seed=seed)


@cache
def trained(
    seed: int = 0, epochs: int = 8, make: Callable[[int], ir.Model] = untrained
) -> ir.Model:
    """Train with Adam and a linear decay; a few seconds, once per process and seed."""
    model = make(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    module = lower(model).train()
    weights = list(module.parameters_by_name.values())
    optimiser = torch.optim.Adam(weights, lr=4e-3)
    data = read(model, DATA, samples=1437)
    images = torch.from_numpy(np.concatenate([f["image"] for f in data.feeds]))
    labels = torch.from_numpy(np.concatenate([b["label"] for b in data.labels]))
    rng = np.random.default_rng(seed)
    steps = epochs * (len(labels) // 64)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(len(labels)))
        for rows in order.split(64)[: len(labels) // 64]:
            (logits,) = module({"image": images[rows]}).values()
            error = F.cross_entropy(logits, labels[rows])
            optimiser.zero_grad()
            error.backward()
            optimiser.step()
            decay.step()
    module.eval().write_back(model)
    torch.set_num_threads(threads)
    return model


def loss(model: ir.Model) -> float:
    """Cross-entropy on the test split."""
    data, session = read(model, TEST, samples=360), Session(model)
    (logits,) = zip(*(session.run(feeds).values() for feeds in data.feeds), strict=True)
    labels = torch.from_numpy(np.concatenate([batch["label"] for batch in data.labels]))
    return float(F.cross_entropy(torch.from_numpy(np.concatenate(logits)), labels))


def accuracy(model: ir.Model) -> float:
    """Top-1 in percent on the test split."""
    return evaluate(Predictor(model), Reading(TEST)).metrics["top1"]
