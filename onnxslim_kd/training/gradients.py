"""First-order importance: how much a loss would change without a weight."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxslim_kd import roles as roles_io
from onnxslim_kd.runtime import Array
from onnxslim_kd.samples import Samples
from onnxslim_kd.training.config import TrainConfig
from onnxslim_kd.training.lowering import lower
from onnxslim_kd.training.objective import Objective


def taylor(model: ir.Model, samples: Samples) -> dict[str, Array]:
    """Return the sum over batches of ``|w * dL/dw|`` for every trainable initializer.

    The loss is the one of training: the graph's own terms, or the cross-entropy with the labels.
    Without labels it is half of the mean square of the outputs.

    Raises:
        ModelError: An operator has no lowering; all are listed.
    """
    roles = roles_io.read(model)
    supervised = roles is not None or samples.labelled
    objective = Objective(model, roles, TrainConfig())
    wanted = (
        objective.outputs(0) if supervised else tuple(v.name or "" for v in model.graph.outputs)
    )
    lowered = lower(model, outputs=wanted)
    weights = lowered.parameters_by_name
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    labels = samples.labels or ({},) * len(samples.feeds)
    for feeds, truth in zip(samples.feeds, labels, strict=True):
        values = lowered(_tensors(feeds), wanted)
        loss = objective(values, _tensors(truth), 0)[0] if supervised else _half_square(values)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), found, strict=True):
            if gradient is not None:
                total[name] += (weight * gradient).abs().detach()
    return {name: tensor.double().numpy() for name, tensor in total.items()}


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


def _half_square(values: Mapping[str, Tensor]) -> Tensor:
    parts = [v.float().square().mean() / 2 for v in values.values() if v.is_floating_point()]
    return torch.stack(parts).sum()
