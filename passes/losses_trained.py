"""Feature losses that train parameters of their own beside the student."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, PositiveInt

from onnxslim_kd.model import dims
from onnxslim_kd.passes.losses_align import adaptive_pool, channels_like, convolution, linear
from onnxslim_kd.passes.losses_features import normalised, similarity
from onnxslim_kd.passes.losses_logits import scaled
from onnxslim_kd.passes.scope import Array, Scope, static


def mgd(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    alpha_mgd: float = 1.756,
    lambda_mgd: Annotated[float, Field(ge=0, le=1)] = 0.15,
) -> ir.Value:
    """Masked generation: alpha mean (g - t)^2, g = conv3x3(relu(conv3x3(mask align(s)))).

    align is a trained 1x1 convolution where channels differ. The mask is a graph input
    [N, Ct, 1, 1] that the trainer draws: whole channels, 0 with probability lambda. The paper masks
    positions instead and sums over them; Paddle's channels and mean are kept.

    Shapes: [N, C, H, W] with equal maps.
    Paper: Yang et al. 2022, Masked Generative Distillation.
    """
    channels = static(teacher, 1, "loss mgd")
    assert teacher.shape is not None
    ours = channels_like(scope, student, teacher)
    mask = scope.mask("mask", [teacher.shape[0], channels, 1, 1], 1 - lambda_mgd)
    sizes = (channels, channels)
    hidden = convolution(scope, scope.op("Mul", ours, mask), "generation.0", sizes, kernel=3)
    made = convolution(scope, scope.op("Relu", hidden), "generation.2", sizes, kernel=3)
    error = scope.mean(scope.square(scope.op("Sub", made, teacher)))
    return scaled(scope, error, alpha_mgd)


def pefd(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    num_projectors: PositiveInt = 3,
    mode: Literal["flatten", "gap"] = "flatten",
) -> ir.Value:
    """Mean of 1 - cos(f, t), f = the mean of ``num_projectors`` trained relu(W_i s + b_i).

    ``mode`` says how maps become vectors: flattened, or averaged over their positions.

    Shapes: [N, ...] on both sides, of any size.
    Paper: Chen et al. 2022, Improved Feature Distillation via Projector Ensemble.
    """
    ours, theirs = (_vectors(scope, x, mode) for x in (student, teacher))
    sizes = static(ours, 1, "loss pefd"), static(theirs, 1, "loss pefd")
    parts = [
        scope.op("Relu", linear(scope, ours, f"projectors.{i}.conv", sizes))
        for i in range(num_projectors)
    ]
    ensemble = scope.divide(scope.total(parts), num_projectors)
    return scope.mean(scope.op("Sub", 1.0, similarity(scope, ensemble, theirs, 1)))


def _vectors(scope: Scope, x: ir.Value, mode: str) -> ir.Value:
    if mode == "gap" and len(dims(x)) > 2:
        x = scope.op("GlobalAveragePool", x)
    return scope.op("Flatten", x, axis=1)


def overhaul(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    margin: Annotated[float, Field(lt=0)] | None = None,
) -> ir.Value:
    """Mean of d(max(t, m), r(s)), d(t, s) = 0 where s <= t <= 0, else (t - s)^2.

    r is a trained 1x1 convolution with BatchNormalization. m is a negative margin per channel, the
    mean of the teacher's negative responses in the batch (or ``margin`` for all channels); the
    authors compute it from the teacher's BatchNormalization, which exporters fold away. The
    authors sum over elements and divide by 1000 N, and weigh the last layers most; here each pair
    is a mean, several pairs are summed, and weights are the user's.

    Shapes: [N, C, H, W] with equal maps, both taken before the ReLU.
    Paper: Heo et al. 2019, A Comprehensive Overhaul of Feature Distillation.
    """
    sizes = static(student, 1, "loss overhaul"), static(teacher, 1, "loss overhaul")
    ours = convolution(scope, student, "connector.conv", sizes, kernel=1)
    ours = scope.batch_norm(ours, "connector.bn")
    low = margin if margin is not None else _mean_negative(scope, teacher)
    theirs = scope.op("Max", teacher, low)
    counts = scope.op("Or", scope.op("Greater", ours, theirs), scope.op("Greater", theirs, 0.0))
    error = scope.square(scope.op("Sub", theirs, ours))
    return scope.mean(scope.op("Mul", error, scope.float32(counts)))


def _mean_negative(scope: Scope, x: ir.Value) -> ir.Value:
    """Mean of the negative numbers of each channel over the batch; 0 if there are none."""
    axes = [0, *range(2, len(dims(x)))]
    total = scope.sum(scope.op("Min", x, 0.0), axes, keep=True)
    count = scope.sum(scope.float32(scope.op("Less", x, 0.0)), axes, keep=True)
    return scope.op("Div", total, scope.op("Max", count, 1.0))


def afd(
    scope: Scope,
    students: Sequence[ir.Value],
    teachers: Sequence[ir.Value],
    *,
    qk_dim: PositiveInt = 128,
) -> ir.Value:
    """Attention decides which student maps learn from which teacher maps.

    Every teacher map gives a query and an l2-normalised map of mean_c f^2, every student map a key
    per teacher map and its own map, pooled to the teacher's size. The loss is the sum over the
    teacher's maps of the batch mean of sum_s attention * mean_hw (v_s - v_t)^2, attention = softmax
    over the student's maps of (key query + P_t P_s) / sqrt(qk_dim).

    Shapes: any number of maps [N, C, H, W] on each side, of any sizes. Trains Linear and
    BatchNormalization layers for keys and queries, and the positions P_t and P_s. Paddle mixes up
    the sizes of teacher maps when one comes back after another; that is not reproduced. Its
    documentation uses weight 50.
    Paper: Ji et al. 2021, Show, Attend and Distill.
    """
    weights = _attention(scope, students, teachers, qk_dim)
    energies = [_energy(scope, student) for student in students]
    pooled: dict[tuple[int, int], ir.Value] = {}
    terms = []
    for index, teacher in enumerate(teachers):
        size = static(teacher, 2, "loss afd"), static(teacher, 3, "loss afd")
        if size not in pooled:
            maps = [_value_map(scope, energy, size) for energy in energies]
            pooled[size] = scope.op("Concat", *maps, axis=1)
        gap = scope.op("Sub", pooled[size], _value_map(scope, _energy(scope, teacher), size))
        distance = scope.mean(scope.square(gap), [2])
        weight = scope.pick(weights, index, axis=1)
        terms.append(scope.mean(scope.sum(scope.op("Mul", weight, distance), [1])))
    return scope.total(terms)


def _energy(scope: Scope, x: ir.Value) -> ir.Value:
    return scope.mean(scope.square(x), [1], keep=True)


def _value_map(scope: Scope, energy: ir.Value, size: tuple[int, int]) -> ir.Value:
    """Pool mean_c f^2 to ``size``, flatten and l2-normalise it: [N, 1, H W]."""
    rows = scope.op("Flatten", adaptive_pool(scope, energy, list(size)), axis=1)
    return scope.op("Unsqueeze", normalised(scope, rows), [1])


def _attention(
    scope: Scope, students: Sequence[ir.Value], teachers: Sequence[ir.Value], width: int
) -> ir.Value:
    """Return [N, T, S]: how much each student map learns from each teacher map."""
    queries = _stack(
        scope,
        [_projected(scope, x, f"teacher.query_layer.{i}", width) for i, x in enumerate(teachers)],
    )
    keys = _stack(
        scope,
        [
            scope.op("Relu", _projected(scope, x, f"student.key_layer.{i}", width))
            for i, x in enumerate(students)
        ],
    )
    count = len(teachers)
    flat = scope.op("Reshape", keys, [-1, width])
    spread = linear(scope, flat, "student.bilinear.linear", (width, width * count))
    spread = scope.batch_norm(spread, "student.bilinear.bn")
    spread = scope.op("Reshape", spread, [-1, len(students), count, width])
    spread = scope.op("Transpose", spread, perm=[0, 2, 1, 3])
    match = scope.sum(scope.op("Mul", spread, scope.op("Unsqueeze", queries, [2])), [3])
    ours = scope.parameter("loss.attention.p_s", _xavier(scope, (len(students), width)))
    theirs = scope.parameter("loss.attention.p_t", _xavier(scope, (count, width)))
    place = scope.op("MatMul", theirs, scope.op("Transpose", ours, perm=[1, 0]))
    logits = scope.divide(scope.op("Add", match, place), float(np.sqrt(width)))
    return scope.op("Softmax", logits, axis=2)


def _projected(scope: Scope, x: ir.Value, name: str, width: int) -> ir.Value:
    vector = scope.op("Flatten", scope.op("GlobalAveragePool", x), axis=1)
    sizes = static(x, 1, "loss afd"), width
    return scope.batch_norm(linear(scope, vector, f"{name}.linear", sizes), f"{name}.bn")


def _stack(scope: Scope, rows: list[ir.Value]) -> ir.Value:
    return scope.op("Concat", *(scope.op("Unsqueeze", row, [1]) for row in rows), axis=1)


def _xavier(scope: Scope, shape: tuple[int, int]) -> Array:
    return np.asarray(scope.random.normal(0, np.sqrt(2 / sum(shape)), shape))
