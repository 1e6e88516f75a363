"""Pruning while training: cuts between epochs, and the pull towards channels that can go.

A cut is a `Plan`, so a resumed run replays it; whatever has the shape of a weight (momentum,
moving averages) is cut by the same plan, on a copy of the graph that holds it as its weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import groups, prune
from onnxslim_kd.passes.ratios import Amount
from onnxslim_kd.plans import Plan
from onnxslim_kd.training.config import Cut, Sparsity
from onnxslim_kd.training.opnode import to_torch

Parameters = Mapping[str, nn.Parameter]
ALREADY = {"init_from": None, "init_shapes": False, "like": None, "plan": None}
"""Settings of a run that its model has seen before the first cut."""


def parse(text: str) -> list[dict[str, Any]]:
    """Read ``PATTERN=RATIO@EPOCH,EPOCH,...``: equal cuts that remove RATIO of the channels in all.

    Raises:
        UserError: The text has another form.
    """
    pattern, _, rest = text.rpartition("=")
    total, _, listed = rest.partition("@")
    try:
        epochs, ratio = [int(epoch) for epoch in listed.split(",")], float(total)
    except ValueError:
        epochs, ratio = [], 0.0
    if not pattern or not epochs or not 0 < ratio < 1:
        raise UserError(f"prune-schedule {text!r} must be PATTERN=RATIO@EPOCHS: conv.*=0.5@0,2,4")
    each = 1 - (1 - ratio) ** (1 / len(epochs))
    return [{"epoch": epoch, "pattern": pattern, "ratio": each} for epoch in epochs]


def decide(model: ir.Model, cut: Cut) -> Plan:
    """Return the plan of one cut, by the weights as they are now."""
    choice = prune.Choice(pattern=cut.pattern, ratio=cut.ratio, amount=Amount(round_to=1))
    return prune.plan(groups.analyse(model.clone()), choice)


def sliced(model: ir.Model, state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Cut the tensors of a checkpoint (``weight/NAME``, ``ema/NAME``, ``optimizer/NAME/KEY``)."""
    layers: dict[str, dict[str, str]] = {}
    for path in state:
        kind, _, rest = path.partition("/")
        name, key = rest, ""
        if kind == "optimizer":
            name, _, key = rest.rpartition("/")
        layers.setdefault(f"{kind}/{key}", {})[name] = path
    result = dict(state)
    for paths in layers.values():
        held = {name: state[path] for name, path in paths.items() if state[path].ndim}
        for name, tensor in _cut(model, held, plan).items():
            result[paths[name]] = tensor
    return result


def _cut(model: ir.Model, tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    if not tensors:
        return {}
    probe = model.clone()
    for name, tensor in tensors.items():
        array = tensor.detach().cpu().contiguous().numpy()
        probe.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    done = prune.cut(probe, plan).graph.initializers
    values = {name: done[name].const_value for name in tensors}
    return {name: to_torch(value) for name, value in values.items() if value is not None}


class GroupSparsity:
    """Group lasso (Yuan and Lin 2006) over channels that a cut would remove together.

    Adds strength * w / |w of the group| to the gradient of every weight of a group, over all its
    members: convolution, normalisation, and the inputs of the layers that follow.
    """

    def __init__(self, model: ir.Model, parameters: Parameters, settings: Sparsity) -> None:
        self.strength = settings.strength
        analysis = groups.analyse(model.clone())
        choice = prune.Choice(pattern=settings.pattern, amount=Amount(round_to=1))
        ranked, _, _ = prune.rank(analysis, choice)
        if not ranked:
            raise UserError(f"sparsity: no channel of {settings.pattern!r} can be pruned")
        units = np.concatenate([candidate.units for candidate in ranked])
        slot = np.full(analysis.components.count, -1)
        slot[units] = np.arange(len(units))
        self.count = len(units)
        self._members: list[tuple[nn.Parameter, int, Tensor]] = []
        for birth in analysis.births:
            parameter = parameters.get(str(birth.value.name))
            slots = torch.from_numpy(slot[analysis.labels(birth)])
            if parameter is not None and bool((slots >= 0).any()):
                self._members.append((parameter, birth.axis, slots.to(parameter.device)))
        if not self._members:
            raise UserError(f"sparsity: nothing of {settings.pattern!r} trains; see freeze")

    @torch.no_grad()
    def apply(self) -> None:
        """Add the pull to the gradients."""
        inverse = self.norms().clamp(min=1e-12).reciprocal()
        for parameter, axis, slots in self._members:
            if parameter.grad is not None:
                pull = torch.where(slots >= 0, inverse[slots.clamp(min=0)], 0)
                shape = [-1 if dim == axis else 1 for dim in range(parameter.ndim)]
                parameter.grad += self.strength * parameter * pull.view(shape)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the L2 norm of every group."""
        total = torch.zeros(self.count, device=self._members[0][0].device)
        for parameter, axis, slots in self._members:
            others = [dim for dim in range(parameter.ndim) if dim != axis]
            squares = parameter.square().sum(others) if others else parameter.square()
            counted = slots >= 0
            total.index_add_(0, slots[counted], squares[counted].float())
        return total.sqrt()


def due(cuts: Sequence[Cut], epoch: int, done: int) -> list[Cut]:
    """Return the cuts of ``epoch`` that are not among the first ``done`` of all."""
    ordered = sorted(cuts, key=lambda cut: cut.epoch)
    return [cut for cut in ordered[done:] if cut.epoch <= epoch]
