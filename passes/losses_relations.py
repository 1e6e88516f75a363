"""Losses between the relations among the samples of a batch (RKD)."""

import onnx_ir as ir
from pydantic import PositiveInt

from onnxslim_kd.model import dims
from onnxslim_kd.passes.losses_align import adaptive_pool
from onnxslim_kd.passes.losses_features import Positive, huber
from onnxslim_kd.passes.scope import Scope

NEAR = 1e-12
"""Squared distance, as part of the squared norms, up to which two samples are one."""


def rkd_distance(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    target_size: PositiveInt | None = None,
    eps: Positive = 1e-12,
) -> ir.Value:
    """Huber mean of d_ij(s) - d_ij(t), d = distances divided by their mean.

    d_ij = sqrt(max(|e_i - e_j|^2, eps)) of the flattened samples, divided by the mean of the whole
    [N, N] matrix. Maps are first pooled to ``target_size`` if given.

    Shapes: [N, ...] on both sides, of any size. The paper leaves the diagonal out of the mean,
    Paddle and this loss do not.
    Paper: Park et al. 2019, Relational Knowledge Distillation.
    """
    ours, theirs = (_distances(scope, x, target_size, eps) for x in (student, teacher))
    return huber(scope, scope.op("Sub", ours, theirs))


def rkd_angle(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    target_size: PositiveInt | None = None,
) -> ir.Value:
    """Huber mean of a_ijk(s) - a_ijk(t), a_ijk = cos of the angle at i between j and k.

    Over all N^3 triples; one with two equal samples has cosine 0. Maps are first pooled to
    ``target_size`` if given.

    Shapes: [N, ...] on both sides, of any size. Memory: N^3, whatever the size of a sample.
    Paper: Park et al. 2019, Relational Knowledge Distillation.
    """
    ours, theirs = (_angles(scope, x, target_size) for x in (student, teacher))
    return huber(scope, scope.op("Sub", ours, theirs))


def _relations(
    scope: Scope, x: ir.Value, target_size: int | None
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the inner products [N, N], squared norms [N, 1] and squared distances [N, N].

    In float64, for |a|^2 + |b|^2 - 2 ab loses digits, and mixed precision must not touch it; a
    distance that is but rounding is exactly 0.
    """
    if target_size is not None and len(dims(x)) > 2:
        x = adaptive_pool(scope, x, [target_size] * (len(dims(x)) - 2))
    rows = scope.op("Cast", scope.op("Flatten", x, axis=1), to=ir.DataType.DOUBLE.value)
    gram = scope.op("MatMul", rows, scope.op("Transpose", rows, perm=[1, 0]))
    norms = scope.sum(scope.square(rows), [1], keep=True)
    sums = scope.op("Add", norms, scope.op("Transpose", norms, perm=[1, 0]))
    squares = scope.op("Sub", sums, scope.op("Mul", gram, 2.0))
    apart = scope.op("Greater", squares, scope.op("Mul", sums, NEAR))
    return gram, norms, scope.op("Where", apart, squares, 0.0)


def _distances(scope: Scope, x: ir.Value, target_size: int | None, eps: float) -> ir.Value:
    squares = _relations(scope, x, target_size)[2]
    lengths = scope.op("Sqrt", scope.op("Max", squares, eps))
    return scope.float32(scope.op("Div", lengths, scope.op("Add", scope.mean(lengths), eps)))


def _angles(scope: Scope, x: ir.Value, target_size: int | None) -> ir.Value:
    """(e_j - e_i)(e_k - e_i) / (d_ij d_ik) as [i, j, k], from inner products alone."""
    gram, norms, squares = _relations(scope, x, target_size)
    apart = scope.op("Greater", squares, 0.0)
    safe = scope.op("Where", apart, squares, 1.0)
    inverse = scope.op("Where", apart, scope.op("Reciprocal", scope.op("Sqrt", safe)), 0.0)
    at_j, at_k = scope.op("Unsqueeze", gram, [2]), scope.op("Unsqueeze", gram, [1])
    between = scope.op("Unsqueeze", gram, [0])
    own = scope.op("Unsqueeze", norms, [2])
    dot = scope.op("Add", scope.op("Sub", scope.op("Sub", between, at_j), at_k), own)
    pairs = scope.op(
        "Mul", scope.op("Unsqueeze", inverse, [2]), scope.op("Unsqueeze", inverse, [1])
    )
    return scope.float32(scope.op("Mul", dot, pairs))
