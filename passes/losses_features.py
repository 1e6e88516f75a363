"""Losses between feature maps or any two tensors of one shape."""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import onnx_ir as ir
from pydantic import Field

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import dims
from onnxslim_kd.passes.losses_align import channels_like
from onnxslim_kd.passes.scope import Scope, shown, static

Act: TypeAlias = Literal["softmax", "sigmoid"] | None
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def class_axis(value: ir.Value, axis: int | None) -> int:
    """Return the axis of the classes: 1 in maps [N, C, H, W], the last one in [N, C], [N, L, C].

    Raises:
        UserError: ``axis`` is given and not one of the value's, or it has none.
    """
    rank = len(dims(value))
    if rank == 0:
        raise UserError(f"{shown(value)} is a single number, which has no classes")
    if axis is None:
        return 1 if rank >= 4 else rank - 1
    if not -rank <= axis < rank:
        raise UserError(f"axis {axis} is not one of {shown(value)}, which is {value.shape}")
    return axis % rank


def activated(scope: Scope, x: ir.Value, act: Act) -> ir.Value:
    """Apply softmax over the classes, sigmoid, or nothing."""
    if act == "softmax":
        return scope.op("Softmax", x, axis=class_axis(x, None))
    return scope.op("Sigmoid", x) if act == "sigmoid" else x


def _difference(scope: Scope, student: ir.Value, teacher: ir.Value, act: Act) -> ir.Value:
    return scope.op("Sub", activated(scope, student, act), activated(scope, teacher, act))


def l1(scope: Scope, student: ir.Value, teacher: ir.Value, *, act: Act = None) -> ir.Value:
    """Mean |s - t| over all elements.

    Shapes: any, equal. ``act`` (softmax, sigmoid) is applied to both sides first.
    """
    return scope.mean(scope.op("Abs", _difference(scope, student, teacher, act)))


def l2(scope: Scope, student: ir.Value, teacher: ir.Value, *, act: Act = None) -> ir.Value:
    """Mean (s - t)^2 over all elements.

    Shapes: any, equal. ``act`` (softmax, sigmoid) is applied to both sides first.
    """
    return scope.mean(scope.square(_difference(scope, student, teacher, act)))


def smooth_l1(
    scope: Scope, student: ir.Value, teacher: ir.Value, *, act: Act = None, delta: Positive = 1.0
) -> ir.Value:
    """Huber: mean of 0.5 d^2 where |d| <= delta, else delta (|d| - 0.5 delta), with d = s - t.

    Shapes: any, equal. This is Paddle's ``smooth_l1``; PyTorch's ``beta`` form is 1/delta of it.
    """
    return huber(scope, _difference(scope, student, teacher, act), delta)


def huber(scope: Scope, difference: ir.Value, delta: float = 1.0) -> ir.Value:
    """Mean of Huber's function of ``difference``."""
    # c (|d| - c / 2) with c = min(|d|, delta) is both branches at once
    size = scope.op("Abs", difference)
    capped = scope.op("Min", size, delta)
    return scope.mean(scope.op("Mul", capped, scope.op("Sub", size, scope.op("Mul", capped, 0.5))))


def cosine(
    scope: Scope, student: ir.Value, teacher: ir.Value, *, axis: int | None = None
) -> ir.Value:
    """Mean of 1 - cos(s, t) along ``axis``.

    Shapes: [N, D] and [N, L, D] along the last axis, [N, C, H, W] along the channels, unless
    ``axis`` says otherwise. A zero vector has cosine 0, and no gradient.
    """
    along = class_axis(student, axis)
    return scope.mean(scope.op("Sub", 1.0, similarity(scope, student, teacher, along)))


def similarity(scope: Scope, a: ir.Value, b: ir.Value, axis: int) -> ir.Value:
    """cos(a, b) along ``axis``; 0 where |a| |b| <= 1e-8."""
    dot = scope.sum(scope.op("Mul", a, b), [axis])
    sizes = [scope.sum(scope.square(x), [axis]) for x in (a, b)]
    product = scope.op("Mul", *sizes)
    found = scope.op("Greater", product, 1e-16)
    safe = scope.op("Where", found, product, 1.0)  # no 0/0 in the branch that is not taken
    return scope.op("Where", found, scope.op("Div", dot, scope.op("Sqrt", safe)), 0.0)


def fsp(scope: Scope, students: Sequence[ir.Value], teachers: Sequence[ir.Value]) -> ir.Value:
    """Mean (F(s1, s2) - F(t1, t2))^2 with F(x, y)[n, a, b] = mean_hw x[n, a, h, w] y[n, b, h, w].

    Shapes: two maps [N, C, H, W] on each side, s1 and t1 with equally many channels, and s2 and t2.
    The larger map of a pair is max-pooled to the smaller one, as in the paper; Paddle wants equal
    sizes. With 2 k maps on each side the losses of consecutive pairs are summed.
    Paper: Yim et al. 2017, A Gift from Knowledge Distillation.

    Raises:
        UserError: Not two maps on each side, or channels that differ.
    """
    if len(students) % 2 or len(students) != len(teachers):
        raise UserError(
            f"loss fsp takes two maps of each side, fsp:s1+s2=t1+t2, got {len(students)} of the"
            f" student and {len(teachers)} of the teacher"
        )
    terms = []
    for i in range(0, len(students), 2):
        ours = _flow(scope, students[i], students[i + 1])
        theirs = _flow(scope, teachers[i], teachers[i + 1])
        if dims(ours)[1:] != dims(theirs)[1:]:
            raise UserError(
                f"loss fsp: {shown(students[i])} x {shown(students[i + 1])} has channels"
                f" {list(dims(ours)[1:])}, {shown(teachers[i])} x {shown(teachers[i + 1])}"
                f" {list(dims(theirs)[1:])}; choose maps with equally many"
            )
        terms.append(scope.mean(scope.square(scope.op("Sub", ours, theirs))))
    return scope.total(terms)


def _flow(scope: Scope, x: ir.Value, y: ir.Value) -> ir.Value:
    x, y = _max_pooled(scope, x, y), _max_pooled(scope, y, x)
    rows = [
        scope.op("Reshape", v, [0, static(v, 1, "fsp"), -1])  # 0 keeps the batch
        for v in (x, y)
    ]
    area = scope.float32(scope.op("ReduceProd", scope.shape(x, 2), keepdims=0))
    rows[0] = scope.op("Div", rows[0], area)  # before the sum, which half precision cannot hold
    return scope.op("MatMul", rows[0], scope.op("Transpose", rows[1], perm=[0, 2, 1]))


def _max_pooled(scope: Scope, x: ir.Value, like: ir.Value) -> ir.Value:
    """Pool ``x`` to the map of ``like`` where that is smaller by a whole factor."""
    have, want = dims(x)[2:], dims(like)[2:]
    if None in have or None in want or have == want:
        return x
    factors = [h / w for h, w in zip(have, want, strict=True) if h and w]
    if all(f <= 1 for f in factors):
        return x
    if any(f < 1 or f % 1 for f in factors):
        raise UserError(
            f"loss fsp: the map of {shown(x)}, {list(have)}, is no multiple of that of"
            f" {shown(like)}, {list(want)}; choose maps of one size"
        )
    step = [int(f) for f in factors]
    return scope.op("MaxPool", x, kernel_shape=step, strides=step)


def at(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    p: Annotated[float, Field(ge=1, le=8)] = 2.0,
) -> ir.Value:
    """Attention transfer: mean (q(s) - q(t))^2, q(f) = the l2-normalised map mean_c |f|^p.

    Shapes: [N, C, H, W] with equal maps, any channels; mean over N and H*W as in the authors' code
    (their beta / 2 is the weight, usually 500).
    Paper: Zagoruyko and Komodakis 2017, Paying More Attention to Attention.
    """
    ours, theirs = (_attention(scope, x, p) for x in (student, teacher))
    return scope.mean(scope.square(scope.op("Sub", ours, theirs)))


def _attention(scope: Scope, x: ir.Value, p: float) -> ir.Value:
    power = scope.square(x) if p == 2 else scope.op("Pow", scope.op("Abs", x), p)
    return normalised(scope, scope.op("Flatten", scope.mean(power, [1]), axis=1))


def normalised(scope: Scope, rows: ir.Value, axis: int = -1) -> ir.Value:
    """Return rows / max(|row|, 1e-12), whose gradient is finite at a row of zeros."""
    size = scope.sum(scope.square(rows), [axis], keep=True)
    return scope.op("Div", rows, scope.op("Sqrt", scope.op("Max", size, 1e-24)))


def cwd(
    scope: Scope, student: ir.Value, teacher: ir.Value, *, temperature: Positive = 4.0
) -> ir.Value:
    """T^2 / (N C) sum_nc KL(p_t || p_s), p = softmax of a channel over its positions, at T.

    Shapes: [N, C, H, W] with equal maps; a trained 1x1 convolution brings the student to the
    teacher's channels where they differ, as in the paper.
    Paper: Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction.
    """
    student = channels_like(scope, student, teacher)
    logs = [
        scope.op("LogSoftmax", scope.divide(_positions(scope, x), temperature), axis=-1)
        for x in (student, teacher)
    ]
    each = scope.sum(divergence(scope, logs[0], logs[1]), [-1])
    return scope.op("Mul", scope.mean(each), temperature**2)


def _positions(scope: Scope, x: ir.Value) -> ir.Value:
    return scope.op("Reshape", x, [0, 0, -1])


def divergence(scope: Scope, log_student: ir.Value, log_teacher: ir.Value) -> ir.Value:
    """p_t (log p_t - log p_s) per element, from log-probabilities."""
    gap = scope.op("Sub", log_teacher, log_student)
    return scope.op("Mul", scope.op("Exp", log_teacher), gap)
