"""Losses on logits that use ground truth; samples without a label do not count."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import dims
from onnxslim_kd.passes.losses_features import Positive, class_axis, divergence
from onnxslim_kd.passes.losses_logits import cross_entropy, log_softmax, scaled
from onnxslim_kd.passes.scope import Array, Scope, static

FAR = -1e30
"""A logit that no softmax sees, and that arithmetic survives."""


@dataclass(frozen=True)
class Truth:
    """Ground truth along ``axis``.

    Attributes:
        hot: Per class, 1 or the probability; all zeros without a label.
        known: Per position, 1 where there is a label, else 0.
        count: The number of labels, at least 1.
    """

    hot: ir.Value
    known: ir.Value
    count: ir.Value
    axis: int

    def mean(self, scope: Scope, each: ir.Value) -> ir.Value:
        """Mean of ``each`` over the positions that have a label; 0 if none has."""
        return scope.op("Div", scope.sum(scope.op("Mul", each, self.known)), self.count)


def truth(scope: Scope, like: ir.Value, axis: int, ignore_index: int = -1) -> Truth:
    """Read the input ``label``: a class number that is none of 0 .. C-1 means "no label"."""
    label = scope.op("Unsqueeze", scope.label(like, axis), [axis])
    classes = _class_numbers(scope, like, axis)
    hot = scope.op("Equal", label, classes)
    if 0 <= ignore_index < static(like, axis, "a label"):
        hot = scope.op("And", hot, scope.op("Not", scope.op("Equal", label, ignore_index)))
    return _truth(scope, scope.float32(hot), axis)


def _class_numbers(scope: Scope, like: ir.Value, axis: int) -> Array:
    shape = [1] * len(dims(like))
    shape[axis] = -1
    return np.arange(static(like, axis, f"loss {scope.name}"), dtype=np.int64).reshape(shape)


def _truth(scope: Scope, hot: ir.Value, axis: int) -> Truth:
    known = scope.float32(scope.op("Greater", scope.sum(hot, [axis]), 0.0))
    return Truth(hot, known, scope.op("Max", scope.sum(known), 1.0), axis)


def soft_truth(scope: Scope, like: ir.Value, axis: int) -> Truth:
    """Read the input ``label_soft``: probabilities of the classes; all zeros mean "no label"."""
    return _truth(scope, scope.soft_label(like), axis)


def ce(  # noqa: PLR0913 - its options are its arguments
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value | None,
    *,
    epsilon: Annotated[float, Field(ge=0, lt=1)] | None = None,
    soft: bool = False,
    ignore_index: int = -1,
    axis: int | None = None,
) -> ir.Value:
    """Mean of - sum_c y log softmax(s), over the positions that have a label.

    y is the class of the input ``label`` (with ``soft``: the row of ``label_soft``), smoothed to
    (1 - epsilon) y + epsilon / C. Labels outside of 0 .. C-1, and ``ignore_index``, do not count.
    With a teacher value, ``ce:s=t``, y = softmax(t) and no ground truth is used.

    Shapes: [N, C] with label [N], [N, L, C] with [N, L], maps [N, C, H, W] with [N, H, W].
    Paddle trains unlabelled samples as class 0 and refuses soft labels with a label axis of 1.
    """
    axis = class_axis(student, axis)
    logs = log_softmax(scope, student, 1.0, axis)
    if teacher is not None:
        if epsilon or soft:
            raise UserError("loss ce takes epsilon and soft with ground truth, not with a teacher")
        target = scope.op("Softmax", teacher, axis=axis)
        return scope.mean(cross_entropy(scope, target, logs, axis))
    given = soft_truth(scope, student, axis) if soft else truth(scope, student, axis, ignore_index)
    target = given.hot
    if epsilon:
        classes = static(student, axis, "label smoothing")
        target = scope.op("Add", scope.op("Mul", target, 1 - epsilon), epsilon / classes)
    return given.mean(scope, cross_entropy(scope, target, logs, axis))


def dkd(  # noqa: PLR0913 - its options are its arguments
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    temperature: Positive = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    target: Literal["label", "teacher", "teacher_argmax"] = "label",
    use_target_as_gt: bool = False,
) -> ir.Value:
    """Decoupled KL: alpha TCKD + beta NCKD, both T^2 times the mean over the batch.

    TCKD = KL between [p_y, 1 - p_y] of teacher and student; NCKD = KL of their softmax over the
    classes other than y. y is the input ``label``, or with ``target=teacher`` (Paddle's
    ``use_target_as_gt``) the teacher's largest class. Samples without a label do not count.

    Shapes: [N, C], or maps [N, C, H, W] with the mean over positions too.
    Paper: Zhao et al. 2022, Decoupled Knowledge Distillation (its beta is 8 for CIFAR, 0.5 to 2 for
    ImageNet). Upstream takes 1000 off the logit of y, which is too little for logits of 10^4; here
    it is removed. PaddleSlim's static dkd passes probabilities for logs; that is not reproduced.
    """
    axis = class_axis(student, None)
    if target == "label" and not use_target_as_gt:
        given = truth(scope, student, axis)
    else:
        best = scope.op("ArgMax", teacher, axis=axis, keepdims=1)
        hot = scope.op("Equal", best, _class_numbers(scope, student, axis))
        given = _truth(scope, scope.float32(hot), axis)
    ours, theirs = (_decoupled(scope, x, temperature, given) for x in (student, teacher))
    terms = [
        scaled(scope, given.mean(scope, _divergences(scope, a, b, axis)), factor)
        for a, b, factor in zip(ours, theirs, (alpha, beta), strict=True)
    ]
    return scaled(scope, scope.total(terms), temperature**2)


def _decoupled(scope: Scope, x: ir.Value, temperature: float, given: Truth) -> list[ir.Value]:
    """Return log [p_y, 1 - p_y], and the log of softmax without y."""
    axis = given.axis
    logs = log_softmax(scope, x, temperature, axis)
    is_y = scope.op("Greater", given.hot, 0.5)
    rest = scope.op("Where", is_y, FAR, logs)
    of_y = scope.sum(scope.op("Mul", logs, given.hot), [axis], keep=True)
    of_rest = scope.reduce("ReduceLogSumExp", rest, [axis], keep=True)
    return [scope.op("Concat", of_y, of_rest, axis=axis), scope.op("LogSoftmax", rest, axis=axis)]


def _divergences(scope: Scope, student: ir.Value, teacher: ir.Value, axis: int) -> ir.Value:
    return scope.sum(divergence(scope, student, teacher), [axis])


def skd(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    temperature: Positive = 1.0,
    multiplier: Positive | None = None,
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0,
) -> ir.Value:
    """Standardised logits: a T^2 CE(softmax(m ln(t) / T), m ln(s) / T) + (1-a) CE(y, m ln(s)).

    ln(z) = (z - mean) / sqrt(var + 1e-7) over the classes, m = ``multiplier``, by default the
    unbiased deviation of the teacher's logits, per sample. The defaults are PaddleSlim's ``skd``,
    which needs no label; PaddleClas' SKDLoss is ``multiplier=2,alpha=0.9``.

    Shapes: [N, C].
    Paper: Yuan et al. 2023, Student-friendly Knowledge Distillation.
    """
    axis = class_axis(student, None)
    factor = multiplier if multiplier is not None else _deviation(scope, teacher, axis)
    ours, theirs = (
        scope.op("Mul", _standardised(scope, x, axis), factor) for x in (student, teacher)
    )
    target = scope.op("Softmax", scope.divide(theirs, temperature), axis=axis)
    logs = log_softmax(scope, ours, temperature, axis)
    soft = scope.mean(cross_entropy(scope, target, logs, axis))
    soft = scaled(scope, soft, alpha * temperature**2)
    if alpha == 1:
        return soft
    given = truth(scope, student, axis)
    plain = cross_entropy(scope, given.hot, log_softmax(scope, ours, 1.0, axis), axis)
    return scope.op("Add", soft, scaled(scope, given.mean(scope, plain), 1 - alpha))


def _variance(scope: Scope, x: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    centred = scope.op("Sub", x, scope.mean(x, [axis], keep=True))
    return centred, scope.mean(scope.square(centred), [axis], keep=True)


def _standardised(scope: Scope, x: ir.Value, axis: int) -> ir.Value:
    centred, variance = _variance(scope, x, axis)
    return scope.op("Div", centred, scope.op("Sqrt", scope.op("Add", variance, 1e-7)))


def _deviation(scope: Scope, x: ir.Value, axis: int) -> ir.Value:
    classes = static(x, axis, "loss skd")
    variance = scope.op("Mul", _variance(scope, x, axis)[1], classes / max(classes - 1, 1))
    return scope.op("Sqrt", scope.op("Max", variance, 1e-24))  # finite gradient at equal logits


def wsl(
    scope: Scope, student: ir.Value, teacher: ir.Value, *, temperature: Positive = 2.0
) -> ir.Value:
    """T^2 mean of w CE(softmax(t / T), s / T), w = 1 - exp(-max(0, CE(y, s) / (CE(y, t) + 1e-7))).

    y is the input ``label``; samples without one do not count. w is a constant to the gradient.

    Shapes: [N, C], or maps [N, C, H, W].
    Paper: Zhou et al. 2021, Rethinking Soft Labels: A Bias-Variance Tradeoff Perspective.
    """
    axis = class_axis(student, None)
    given = truth(scope, student, axis)
    hard = [
        cross_entropy(scope, given.hot, log_softmax(scope, x, 1.0, axis), axis)
        for x in (student, teacher)
    ]
    ratio = scope.op("Div", hard[0], scope.op("Add", hard[1], 1e-7))
    decay = scope.op("Exp", scope.op("Neg", scope.op("Relu", ratio)))
    weight = scope.stop_gradient(scope.op("Sub", 1.0, decay))
    target = scope.op("Softmax", scope.divide(teacher, temperature), axis=axis)
    soft = cross_entropy(scope, target, log_softmax(scope, student, temperature, axis), axis)
    return scaled(scope, given.mean(scope, scope.op("Mul", weight, soft)), temperature**2)
