"""Tiny models to train: a convolutional digits classifier, and a pair merged by hand."""

import numpy as np
import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd import roles
from onnxslim_kd.roles import Roles

BODY = """
 {p}c1 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(image, {p}conv1_weights)
 {p}b1 = BatchNormalization({p}c1, {p}bn1_scale, {p}bn1_bias, {p}bn1_mean, {p}bn1_var)
 {p}r1 = Relu({p}b1)
 {p}c2 = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>({p}r1, {p}conv2_weights)
 {p}b2 = Add({p}c2, {p}conv2_bias)
 {p}r2 = Relu({p}b2)
 {p}pool = GlobalAveragePool({p}r2)
 {p}flat = Flatten({p}pool)
 {p}logits = Gemm<transB=1>({p}flat, {p}fc_weights, {p}fc_bias)
"""
LOSS = """
 soft_t = Softmax(teacher_logits)
 log_s = LogSoftmax(logits)
 log_t = LogSoftmax(teacher_logits)
 log_ratio = Sub(log_t, log_s)
 pointwise = Mul(soft_t, log_ratio)
 kl_sum = ReduceSum<keepdims=0>(pointwise, one_axis)
 kl = ReduceMean<keepdims=0>(kl_sum)
 projected = Gemm<transB=1>(flat, loss_align_weights)
 difference = Sub(projected, teacher_flat)
 square = Mul(difference, difference)
 masked = Mul(square, loss_mask)
 hint = ReduceMean<keepdims=0>(masked)
 loss = Add(kl, hint)
"""


def weights(width: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes = {
        "conv1_weights": (width, 1, 3, 3),
        **{f"bn1_{name}": (width,) for name in ("scale", "bias", "mean", "var")},
        "conv2_weights": (2 * width, width, 3, 3),
        "conv2_bias": (2 * width, 1, 1),
        "fc_weights": (10, 2 * width),
        "fc_bias": (10,),
    }
    return {prefix + name: shape for name, shape in shapes.items()}


def build(
    body: str, inputs: str, outputs: str, shapes: dict[str, tuple[int, ...]], seed: int = 0
) -> ir.Model:
    """Parse a graph whose weights are inputs, then make them seeded initializers."""
    declared = [f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items()]
    head = '<ir_version: 8, opset_import: ["" : 17]>\n'
    text = f"{head}tiny ({', '.join([inputs, *declared])}) => ({outputs}) {{{body}}}"
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(seed)
    for value in list(model.graph.inputs):
        if value.name in shapes:
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(values(value.name, shapes[value.name], rng))
            model.graph.register_initializer(value)
    return model_io.load(model)


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name.endswith(("bn1_scale", "bn1_var")):
        return np.ones(shape, np.float32)
    if len(shape) == 1 or name.endswith("bias"):
        return np.zeros(shape, np.float32)
    return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def classifier(width: int = 4, seed: int = 0, tail: str = "") -> ir.Model:
    """Conv-BN-Relu, Conv-Relu, pool, Gemm: digits [N,1,8,8] -> logits [N,10]."""
    output = "probabilities" if tail else "logits"
    return build(
        BODY.format(p="") + tail,
        "float[N,1,8,8] image",
        f"float[N,10] {output}",
        weights(width),
        seed,
    )


def pair(width: int = 4, wide: int = 8, seed: int = 0) -> ir.Model:
    """A student and a teacher with a KL term and a masked hint through a trainable align."""
    shapes = weights(width) | weights(wide, "teacher_")
    shapes["loss_align_weights"] = (2 * wide, 2 * width)
    model = build(
        BODY.format(p="") + BODY.format(p="teacher_") + LOSS,
        f"float[N,1,8,8] image, float[N,{2 * wide}] loss_mask, int64[1] one_axis",
        "float[N,10] logits, float kl, float hint, float loss",
        shapes,
        seed,
    )
    axis = next(value for value in model.graph.inputs if value.name == "one_axis")
    model.graph.inputs.remove(axis)
    axis.const_value = ir.Tensor(np.array([1]), name="one_axis")
    model.graph.register_initializer(axis)
    for node in model.graph:
        if node.outputs[0].name.startswith("teacher_"):
            node.name = node.outputs[0].name
    model_io.infer_shapes(model)
    kinds = (("kl", 1.0), ("hint", 0.5))
    roles.write(
        model,
        Roles(
            student_inputs=("image",),
            student_outputs=("logits",),
            teachers=(roles.Teacher(name="t", prefix="teacher_", outputs=("teacher_logits",)),),
            loss="loss",
            terms=tuple(roles.Term(name=n, kind=n, output=n, weight=w) for n, w in kinds),
            masks=(roles.Mask(input="loss_mask", keep=0.8),),
            loss_parameters=("loss_align_weights",),
        ),
    )
    return model


def numbers(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
