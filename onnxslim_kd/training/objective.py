"""The loss of a step: the graph's terms that are active in the epoch, and the trainer's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from onnxslim_kd import model as model_io
from onnxslim_kd import plugins
from onnxslim_kd.errors import NotFoundError, UserError, near_misses
from onnxslim_kd.roles import Roles
from onnxslim_kd.training.config import Labels, TrainConfig
from onnxslim_kd.training.data import Batch, check_range
from onnxslim_kd.training.images import UNLABELLED
from onnxslim_kd.training.metrics import class_axis
from onnxslim_kd.training.transforms import Preprocess

Values = Mapping[str, Tensor]
OWN = "labels"
"""The name of the trainer's own term."""
PARTNER = "label of the partner"
"""The entry with the label of what a sample was mixed with."""


@dataclass(frozen=True)
class Term:
    """A term of the loss, with the weight and epochs of this run."""

    name: str
    weight: float
    start: int
    end: int | None
    output: str | None = None
    """The graph output with the scalar; None for the trainer's own term."""

    def active(self, epoch: int) -> bool:
        """Tell whether the term counts in ``epoch``."""
        return self.weight != 0 and self.start <= epoch and (self.end is None or epoch < self.end)


@dataclass(frozen=True)
class Mix:
    """How a batch was mixed: sample i is ``part`` of i, the rest of a partner with its label."""

    part: float


class Objective:
    """Sums the terms.

    Args:
        model: The graph; only read.
        roles: Of a merged model; None for a plain one.
        config: The weights and epochs that change what the graph says, and the own term.
    """

    def __init__(self, model: ir.Model, roles: Roles | None, config: TrainConfig) -> None:
        self.settings = config.labels
        self.student = (
            roles.student_outputs
            if roles
            else tuple(model_io.name_of(value) for value in model.graph.outputs)
        )
        self.scores = scores_of(model, self.student[0], config.labels.loss)
        self.own = _own_term(roles, config.labels)
        self.terms = [*_graph_terms(roles, config), self.own]
        self.classes = self._count_classes(model, roles)
        self._mixes = bool(self.settings.mixup or self.settings.cutmix)
        self._rows = 1 if "nhwc" in Preprocess(config.preprocess).names else 2
        self._check(roles, config)

    def _check(self, roles: Roles | None, config: TrainConfig) -> None:
        loss = self.settings.loss
        if loss not in LOSSES and ":" not in loss:
            raise UserError(
                f"labels.loss {loss!r} is not one of {', '.join(LOSSES)}, module:function"
            )
        if self.own.weight and loss == "ce" and self.classes == 1:
            raise UserError(
                f"cross-entropy learns nothing from one score per sample ({self.scores!r}); set"
                f" labels.loss to bce (labels 0 and 1) or mse"
            )
        for epoch in range(config.epochs):
            if not self.active(epoch):
                raise UserError(
                    f"no loss term is active in epoch {epoch + 1}; see terms and labels"
                )
        shaping = self._mixes or self.settings.smoothing
        if shaping and (self.own.weight == 0 or self.settings.loss != "ce"):
            raise UserError(
                "labels.smoothing, mixup and cutmix shape the trainer's own cross-entropy; set"
                " labels.weight, for instance 1"
            )
        if self._mixes and roles is not None and roles.labels:
            raise UserError(
                "labels.mixup and cutmix cannot change labels inside the graph; merge without a"
                " loss on labels and set labels.weight"
            )

    def _count_classes(self, model: ir.Model, roles: Roles | None) -> int | None:
        """Return how many classes labels may count, None where the model does not say."""
        counts = []
        if self.own.weight and self.settings.loss == "ce":
            counts.append(classes_of(model, self.scores))
        for label in roles.labels if roles else ():
            if label.kind in ("class", "mask"):
                counts.append(classes_of(model, label.scores or self.scores, label.axis))
        return min((count for count in counts if count is not None), default=None)

    def active(self, epoch: int) -> list[Term]:
        """Return the terms that count in ``epoch``."""
        return [term for term in self.terms if term.active(epoch)]

    def outputs(self, epoch: int) -> tuple[str, ...]:
        """Return the values that the loss of ``epoch`` needs."""
        names: list[str] = []
        for term in self.active(epoch):
            if term.output is not None:
                names.append(term.output)
            else:
                names += [self.scores] if self.settings.loss in SQUASHING else self.student
        return tuple(dict.fromkeys(names))

    def all_outputs(self) -> tuple[str, ...]:
        """Return every value that may be asked for, now or later."""
        graph = [term.output for term in self.terms if term.output is not None]
        return tuple(dict.fromkeys([*self.student, self.scores, *graph]))

    def __call__(
        self, values: Values, entries: Values, epoch: int, mix: Mix | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and every term without its weight."""
        found: dict[str, Tensor] = {}
        total: Any = 0.0
        for term in self.active(epoch):
            if term.output is None:
                value = self._own(values, entries, mix)
            else:
                value = values[term.output].float().reshape(())
            found[term.name] = value.detach()
            total = total + term.weight * value
        return total, found

    def _own(self, values: Values, entries: Values, mix: Mix | None) -> Tensor:
        if self.settings.loss not in LOSSES:
            outputs = {name: values[name] for name in self.student}
            return _by_user(self.settings.loss, outputs, entries)
        key = next((key for key in ("mask", "label") if key in entries), None)
        if key is None:
            raise UserError(
                f"the loss on labels needs 'label' or 'mask' in the data, which has"
                f" {', '.join(sorted(entries))}; use a merged model or another data spec"
            )
        if self.settings.loss == "mse":
            return _mean_square(values[self.student[0]].float(), entries[key].float())
        if self.settings.loss == "bce":
            return _binary(values[self.scores].float(), entries[key])
        loss = self._cross_entropy(values[self.scores].float(), entries[key])
        if mix is None:
            return loss
        other = self._cross_entropy(values[self.scores].float(), entries[PARTNER])
        return mix.part * loss + (1 - mix.part) * other

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        axis = None if labels.is_floating_point() else class_axis(scores.shape, labels.shape)
        if axis is None:
            raise UserError(
                f"cross-entropy wants one class per sample (or pixel, or token) of scores"
                f" {list(scores.shape)}, the data gives {_described(labels)}; for probabilities"
                f" merge with the loss soft_label and call them soft"
            )
        if self.classes is None:
            check_range(labels, scores.shape[axis])
        scores = scores.movedim(axis, 1)
        scores = scores.reshape(*scores.shape[:2], *labels.shape[1:])
        losses = F.cross_entropy(
            scores,
            labels.long(),
            ignore_index=UNLABELLED,
            label_smoothing=self.settings.smoothing,
            reduction="sum",
        )
        # A batch of unlabelled samples alone has loss 0, not 0/0.
        return losses / (labels != UNLABELLED).sum().clamp(min=1)

    def mixed(self, batch: Batch, seeds: list[int]) -> tuple[Batch, Mix | None]:
        """Return the batch with samples blended (mixup) or patched (cutmix), if asked for."""
        if not self._mixes:
            return batch, None
        if not {"image", "label"} <= batch.entries.keys():
            raise UserError(
                f"labels.mixup and cutmix need 'image' and 'label' in the data, which has"
                f" {', '.join(sorted(batch.entries))}"
            )
        rng = np.random.default_rng(seeds)
        alpha = self.settings.mixup or self.settings.cutmix
        part = float(rng.beta(alpha, alpha))
        partner = torch.from_numpy(rng.permutation(len(batch)))
        image = batch.entries["image"]
        if self.settings.mixup:
            image = part * image + (1 - part) * image[partner]
        else:
            image, part = _patched(image, partner, part, rng, self._rows)
        entries = {**batch.entries, "image": image, PARTNER: batch.entries["label"][partner]}
        return Batch(entries, batch.indices, batch.bad), Mix(part)


def _by_user(spec: str, outputs: Values, entries: Values) -> Tensor:
    loss = plugins.call(f"labels.loss {spec}", plugins.find(spec), outputs, entries)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = _described(loss) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"labels.loss {spec} must return a scalar tensor, got {given}")
    return loss.reshape(())


def _mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    if found.shape != wanted.shape:
        raise UserError(
            f"labels.loss mse wants labels of the output's shape {list(found.shape)}, the data"
            f" gives {list(wanted.shape)}"
        )
    return F.mse_loss(found, wanted)


def _binary(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of probabilities one by one; -1 is unlabelled."""
    if labels.numel() != scores.numel() or len(labels) != len(scores):
        raise UserError(
            f"labels.loss bce wants a number from 0 to 1 for each of the scores"
            f" {list(scores.shape)}, the data gives {_described(labels)}"
        )
    wanted = labels.reshape(scores.shape).to(scores.dtype)
    known = wanted != UNLABELLED
    if bool(((wanted < 0) | (wanted > 1))[known].any()):
        worst = wanted[known].abs().max().item()
        raise UserError(f"labels.loss bce wants labels from 0 to 1, the data has {worst:g}")
    losses = F.binary_cross_entropy_with_logits(scores, wanted.clamp(min=0), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _patched(
    image: Tensor, partner: Tensor, part: float, rng: np.random.Generator, axis: int
) -> tuple[Tensor, float]:
    """CutMix (Yun et al. 2019): a window of area 1 - part comes from the partner.

    Args:
        image: The batch.
        partner: Whose window each sample gets.
        part: Of the area that stays, about.
        rng: Says where the window is.
        axis: Of the rows of pixels; the columns follow.

    Returns:
        The batch, and the part that stays.
    """
    height, width = image.shape[axis : axis + 2]
    high, wide = (round(side * (1 - part) ** 0.5) for side in (height, width))
    top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
    image = image.clone()
    window = (*[slice(None)] * axis, slice(top, top + high), slice(left, left + wide))
    image[window] = image[partner][window]
    return image, 1 - high * wide / (height * width)


def scores_of(model: ir.Model, output: str, loss: str = "ce") -> str:
    """Return the value before what ``loss`` has in itself, as cross-entropy a final Softmax."""
    value = next(v for v in _values(model) if v.name == output)
    node = value.producer()
    if node is not None and node.op_type in SQUASHING.get(loss, ()):
        return model_io.name_of(node.inputs[0])
    return output


def classes_of(model: ir.Model, output: str, axis: int | None = None) -> int | None:
    """Return how many classes ``output`` scores, None where it is not known.

    Without ``axis`` they are axis 1; of three axes only the labels tell which one is meant.
    """
    value = next((v for v in _values(model) if v.name == output), None)
    sides = model_io.dims(value) if value is not None and model_io.has_rank(value) else ()
    if axis is None:
        return sides[1] if len(sides) not in (0, 1, 3) else None
    return sides[axis] if axis < len(sides) else None


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]


def _graph_terms(roles: Roles | None, config: TrainConfig) -> list[Term]:
    merged = {term.name: term for term in (roles.terms if roles else ())}
    for name in config.terms:
        if name not in merged:
            known = ", ".join(merged) or "none"
            raise NotFoundError(
                f"terms.{name}: the model's loss terms are: {known}{near_misses(name, merged)}"
            )
    terms = []
    for name, term in merged.items():
        change = config.terms.get(name)
        given = change.model_dump(exclude_unset=True) if change else {}
        now = term.model_copy(update=given)
        terms.append(Term(name, now.weight, now.start_epoch, now.end_epoch, term.output))
    return terms


def _own_term(roles: Roles | None, labels: Labels) -> Term:
    weight = labels.weight
    if weight is None:
        weight = 1.0 if roles is None else 0.0
    return Term(OWN, weight, labels.start_epoch or 0, labels.end_epoch)


LOSSES = ("ce", "bce", "mse")
"""The own losses with a name; others are module:function."""
SQUASHING = {"ce": ("Softmax", "LogSoftmax"), "bce": ("Sigmoid",)}
"""Losses on scores, and the operators that they stand before."""
