"""Losses between the raw heads of detectors."""

import onnx_ir as ir
from pydantic import PositiveInt

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import dims
from onnxslim_kd.passes.scope import Scope, shown

BOX = 5
"""Numbers per anchor before the classes: x, y, w, h, objectness."""


def yolov3(
    scope: Scope,
    student: ir.Value,
    teacher: ir.Value,
    *,
    anchors: PositiveInt = 3,
    classes: PositiveInt = 80,
) -> ir.Value:
    """YOLOv3's fine-grained loss: box + class + objectness of one head; give all heads, s1+s2+s3.

    With o = sigmoid(t_obj) and bce(x, z) = softplus(x) - x z per anchor and position:
    mean of o (bce(sx, sig tx) + bce(sy, sig ty) + |sw - tw| + |sh - th|), plus mean of
    o bce(s_cls, sig t_cls) over the classes too, plus mean of bce(s_obj, [t_obj > 0]).

    Shapes: raw maps [N, A (5 + C), H, W], per anchor x, y, w, h, objectness, classes. The term's
    weight is 1000 unless given, as in PaddleDetection.
    Paper: Mehta and Ozturk 2018, Object Detection at 200 Frames Per Second.

    Raises:
        UserError: The channels are not anchors * (5 + classes).
    """
    for value in (student, teacher):
        if dims(value)[1] != anchors * (BOX + classes):
            raise UserError(
                f"loss yolov3: {shown(value)} is {value.shape}, not [N, A (5 + C), H, W] for"
                f" {anchors} anchors and {classes} classes; pass anchors and classes"
            )
    heads = [scope.op("Reshape", x, [0, anchors, BOX + classes, -1]) for x in (student, teacher)]
    centre, size, there, kind = (
        [scope.op("Slice", head, [start], [end], [2]) for head in heads]
        for start, end in ((0, 2), (2, 4), (4, 5), (5, BOX + classes))
    )
    sure = scope.op("Sigmoid", there[1])
    box = scope.op("Add", _bce(scope, *centre), scope.op("Abs", scope.op("Sub", size[0], size[1])))
    box = scope.mean(scope.op("Mul", sure, scope.sum(box, [2], keep=True)))
    which = scope.mean(scope.op("Mul", sure, _bce(scope, *kind)))
    target = scope.float32(scope.op("Greater", there[1], 0.0))
    found = scope.mean(_bce_of(scope, there[0], target))
    return scope.total([box, which, found])


def _bce(scope: Scope, logit: ir.Value, other: ir.Value) -> ir.Value:
    return _bce_of(scope, logit, scope.op("Sigmoid", other))


def _bce_of(scope: Scope, logit: ir.Value, target: ir.Value) -> ir.Value:
    return scope.op("Sub", scope.op("Softplus", logit), scope.op("Mul", logit, target))
