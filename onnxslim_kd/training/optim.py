"""Optimiser, parameter groups and the moving average of the weights."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onnxslim_kd.errors import NotFoundError, near_misses
from onnxslim_kd.training.config import Optimizer, TrainConfig

Parameters = Mapping[str, nn.Parameter]


def matching(patterns: Iterable[str], names: Iterable[str], setting: str) -> set[str]:
    """Return the names that a pattern matches from their beginning.

    Raises:
        NotFoundError: A pattern matches nothing, or is no regular expression.
    """
    known, found = list(names), set()
    for pattern in patterns:
        try:
            hits = {name for name in known if re.match(pattern, name)}
        except re.error as error:
            raise NotFoundError(f"{setting}: {pattern!r} is no pattern: {error}") from error
        if not hits:
            hint = near_misses(pattern, known) or f"; there are {shortened(known)}"
            raise NotFoundError(f"{setting}: no parameter matches {pattern!r}{hint}")
        found |= hits
    return found


def shortened(names: list[str], most: int = 4) -> str:
    """List the first names."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def build(parameters: Parameters, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimiser; each group keeps its ``lr_factor`` and the names of its parameters."""
    settings = config.optimizer
    excluded = matching(settings.no_decay, parameters, "optimizer.no_decay")
    members = [
        matching([group.match], parameters, f"groups[{index}].match")
        for index, group in enumerate(config.groups)
    ]
    found: dict[tuple[float, float], list[str]] = {}
    for name, parameter in parameters.items():
        group = next((g for g, m in zip(config.groups, members, strict=True) if name in m), None)
        decay = settings.weight_decay
        if name in excluded or (_is_vector(parameter) and not settings.decay_vectors):
            decay = 0.0
        if group is not None and group.weight_decay is not None:
            decay = group.weight_decay
        factor = group.lr_factor if group is not None else 1.0
        found.setdefault((factor, decay), []).append(name)
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in names],
            "names": names,
            "lr_factor": factor,
            "weight_decay": decay,
        }
        for (factor, decay), names in found.items()
    ]
    return OPTIMIZERS[settings.name](groups, settings)


def _is_vector(parameter: Tensor) -> bool:
    """Tell norms and biases, those shaped to broadcast ([C, 1, 1]) among them."""
    return parameter.ndim <= 1 or (parameter.ndim > 2 and parameter.squeeze().ndim <= 1)


def _sgd(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.Optimizer:
    momentum, nesterov = settings.momentum, settings.nesterov
    return torch.optim.SGD(groups, settings.lr, momentum=momentum, nesterov=nesterov, fused=True)


def _adam(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.Optimizer:
    betas, eps = settings.betas, settings.eps
    return torch.optim.Adam(groups, settings.lr, betas=betas, eps=eps, fused=True)


def _adamw(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.Optimizer:
    betas, eps = settings.betas, settings.eps
    return torch.optim.AdamW(groups, settings.lr, betas=betas, eps=eps, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, each group's by its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


@contextmanager
def gradients_as_stored(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let channels-last gradients have the strides of contiguous ones for the time of the block.

    The fused steps on the CPU go along the memory of weight, gradient and state, which agree; yet
    before that they copy every gradient that is not contiguous, for nothing. The first step makes
    the state in the image of the gradient, and so sees it as it is.
    """
    held = [
        (parameter.grad, parameter.grad.stride())
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state and _is_copied(parameter.grad)
    ]
    try:
        for gradient, _ in held:
            contiguous = torch.empty(gradient.shape, device="meta")
            gradient.as_strided_(gradient.shape, contiguous.stride())
        yield
    finally:
        for gradient, strides in held:
            gradient.as_strided_(gradient.shape, strides)


def _is_copied(gradient: Tensor | None) -> bool:
    if gradient is None or gradient.device.type != "cpu" or gradient.is_contiguous():
        return False
    return gradient.is_contiguous(memory_format=torch.channels_last)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as ``parameter/key`` -> tensor."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None  # SGD without momentum
    }


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what `state_of` gave; entries of other parameters are left out."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for path, tensor in state.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in by_name:
                optimizer.state[parameter] = {
                    key: _beside(parameter, tensor) for key, tensor in by_name[name].items()
                }


def _beside(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Copy ``tensor`` to the parameter's device, in its memory format: fused steps need both."""
    if tensor.shape != parameter.shape:  # the count of steps
        return tensor.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


class Ema:
    """A moving average of tensors: shadow = decay * shadow + (1 - decay) * tensor.

    The decay starts low, min(decay, (1 + n) / (10 + n)), or the first weights would linger.
    """

    def __init__(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.shadow = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take in the tensors of ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, shadow in self.shadow.items():
            if shadow.is_floating_point():
                shadow.lerp_(tensors[name], 1 - decay)
            else:
                shadow.copy_(tensors[name])


OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
