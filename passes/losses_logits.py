"""Losses between the logits of student and teacher, in log-space."""

from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import dims
from onnxslim_kd.passes.losses_features import Act, Positive, activated, class_axis, divergence
from onnxslim_kd.passes.scope import Scope, shown, static


def log_softmax(scope: Scope, x: ir.Value, temperature: float, axis: int) -> ir.Value:
    """Log of softmax(x / T) along ``axis``."""
    return scope.op("LogSoftmax", scope.divide(x, temperature), axis=axis)


def cross_entropy(scope: Scope, target: ir.Value, logs: ir.Value, axis: int) -> ir.Value:
    """- sum p log q along ``axis``, from probabilities and log-probabilities."""
    return scope.op("Neg", scope.sum(scope.op("Mul", target, logs), [axis]))


def soft_label(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    student_temperature: Positive = 1.0,
    teacher_temperature: Positive = 1.0,
    axis: int = -1,
) -> ir.Value:
    """Mean of - sum_c softmax(t / Tt) log softmax(s / Ts), without a T^2.

    Shapes: any, equal. As in PaddleSlim the classes are the last axis, of a map [N, C, H, W] too;
    for segmentation pass ``axis=1``.
    Paper: Hinton et al. 2015, Distilling the Knowledge in a Neural Network.
    """
    axis = class_axis(student, axis)
    target = scope.op("Softmax", scope.divide(teacher, teacher_temperature), axis=axis)
    logs = log_softmax(scope, student, student_temperature, axis)
    return scope.mean(cross_entropy(scope, target, logs, axis))


def kl(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    temperature: Positive = 4.0,
    reduction: Literal["batchmean", "mean"] = "batchmean",
    axis: int | None = None,
) -> ir.Value:
    """T^2 mean_n KL(softmax(t / T) || softmax(s / T)).

    Shapes: [N, C], [N, L, C] or maps [N, C, H, W]; ``batchmean`` is the mean over all positions of
    the sum over classes, ``mean`` (PaddleSlim) the mean over classes too.
    Paper: Hinton et al. 2015. PaddleSlim's KLLoss has no T^2: pass its weight divided by T^2.
    """
    axis = class_axis(student, axis)
    logs = [log_softmax(scope, x, temperature, axis) for x in (student, teacher)]
    each = divergence(scope, logs[0], logs[1])
    each = scope.sum(each, [axis]) if reduction == "batchmean" else each
    return scaled(scope, scope.mean(each), temperature**2)


def scaled(scope: Scope, x: ir.Value, factor: float) -> ir.Value:
    """Factor * x, or x for 1."""
    return x if factor == 1 else scope.op("Mul", x, float(factor))


def js(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    temperature: Positive = 1.0,
    axis: int | None = None,
) -> ir.Value:
    """T^2 mean of (KL(p || m) + KL(q || m)) / 2, p, q = softmax at T, m = (p + q) / 2.

    Shapes: [N, C], [N, L, C] or maps [N, C, H, W]. The true Jensen-Shannon divergence in nats,
    between 0 and log 2; what PaddleClas calls JS is `dml`.
    Paper: Lin 1991, Divergence Measures Based on the Shannon Entropy.
    """
    axis = class_axis(student, axis)
    logs = [log_softmax(scope, x, temperature, axis) for x in (student, teacher)]
    # log m = log p + softplus(log q - log p) - log 2, finite where p or q underflow
    ratio = scope.op("Softplus", scope.op("Sub", logs[1], logs[0]))
    middle = scope.op("Sub", scope.op("Add", logs[0], ratio), float(np.log(2)))
    both = scope.op("Add", *(divergence(scope, middle, log) for log in logs))
    return scaled(scope, scope.mean(scope.sum(both, [axis])), temperature**2 / 2)


def dml(  # noqa: PLR0913 - its options are its arguments
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    act: Act = "softmax",
    sum_across_class_dim: bool = False,
    weight_ratio: bool = False,
    detach: bool = False,
    eps: Positive = 1e-12,
) -> ir.Value:
    """Mean over N of sum_c (t log((t + eps) / (s + eps)) + s log((s + eps) / (t + eps))) / 2.

    The loss of SSLD, DML and UDML in PaddleClas: half the symmetric KL of the activated values
    (``act``: softmax, sigmoid, or none for probabilities); both sides get a gradient. As upstream,
    ``sum_across_class_dim`` gives C times as much. ``weight_ratio`` weighs each element of
    multi-label data by the input ``label_ratios`` [N, 2, C] (labels 0, 1 or -1 for unknown; the
    share of positives r): exp(1 - r) for positives, exp(r) for negatives, 0 for unknown.
    ``detach`` holds the target of each direction constant, as PaddleSlim's DMLLoss does.

    Shapes: [N, C], or maps [N, C, H, W] with the mean over positions too.
    Paper: Zhang et al. 2018, Deep Mutual Learning; Cui et al. 2021, SSLD.
    """
    s, t = activated(scope, student, act), activated(scope, teacher, act)
    ways = []
    for target, other in ((t, s), (s, t)):
        held = scope.stop_gradient(target) if detach else target
        logs = [scope.op("Log", scope.op("Add", x, eps)) for x in (held, other)]
        ways.append(scope.op("Mul", held, scope.op("Sub", *logs)))
    each = scope.op("Add", *ways)
    if weight_ratio:
        each = scope.op("Mul", each, _ratio_weights(scope, student))
    axis = class_axis(student, None)
    classes = static(student, axis, "loss dml")
    factor = 0.5 * classes * (classes if sum_across_class_dim else 1)
    return scaled(scope, scope.mean(each), factor)


def _ratio_weights(scope: Scope, like: ir.Value) -> ir.Value:
    if len(dims(like)) != 2:
        raise UserError(
            f"loss dml: weight_ratio needs logits [N, C], {shown(like)} is {like.shape}"
        )
    assert like.shape is not None
    given = scope.ratios(like.shape[0], like.shape[1])
    label, ratio = (scope.pick(given, i, axis=1) for i in (0, 1))
    rest = scope.op("Sub", 1.0, ratio)
    weight = scope.op("Exp", scope.op("Where", scope.op("Greater", label, 0.5), rest, ratio))
    return scope.op("Mul", weight, scope.float32(scope.op("Greater", label, -0.5)))


def dist(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> ir.Value:
    """Correlations: beta (1 - mean_n r(p_s, p_t)) + gamma (1 - mean_c r(columns)), p = softmax.

    r is Pearson's correlation over the classes of a sample, then over the samples of a class, with
    1e-8 added to the product of norms. A batch of one has no second correlation: it counts as 0.

    Shapes: [N, C].
    Paper: Huang et al. 2022, Knowledge Distillation from a Stronger Teacher.
    """
    pair = [scope.op("Softmax", x, axis=1) for x in (student, teacher)]
    terms = [
        scaled(scope, scope.op("Sub", 1.0, scope.mean(_pearson(scope, pair, axis))), factor)
        for axis, factor in ((1, beta), (0, gamma))
    ]
    return scope.total(terms)


def _pearson(scope: Scope, pair: list[ir.Value], axis: int) -> ir.Value:
    a, b = (scope.op("Sub", x, scope.mean(x, [axis], keep=True)) for x in pair)
    dot = scope.sum(scope.op("Mul", a, b), [axis])
    norms = [
        # the smallest number is for the gradient of Sqrt at a constant row
        scope.op("Sqrt", scope.op("Add", scope.sum(scope.square(x), [axis]), 1e-24))
        for x in (a, b)
    ]
    return scope.op("Div", dot, scope.op("Add", scope.op("Mul", *norms), 1e-8))
