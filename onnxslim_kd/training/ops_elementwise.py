"""Elementwise operators: arithmetic, comparison, logic, casts and activations."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode, torch_dtype


def plain(kernel: Callable[..., Any]) -> Callable[[OpNode], Kernel]:
    """Lower to ``kernel`` itself: no attributes, inputs in the same order."""
    return lambda node: kernel


# ------------------------------------------------------------------------ arithmetic


def div(node: OpNode) -> Kernel:
    """Divide; integers are cut towards zero."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        if a.is_floating_point():
            return a / b
        return torch.div(a, b, rounding_mode="trunc")

    return run


def power(node: OpNode) -> Kernel:
    """Raise to a power; the result has the base's type."""
    constant = node.constants[1]
    if constant is not None and constant.dim() == 0:
        exponent = constant.item()
        node.bound.add(1)
        return lambda a, _: torch.pow(a, exponent).to(a.dtype)
    return lambda a, b: torch.pow(a, b).to(a.dtype)


def mod(node: OpNode) -> Kernel:
    """Remainder with the divisor's sign, or the dividend's (fmod=1)."""
    return torch.fmod if node.get("fmod", 0) else torch.remainder


def variadic(pair: Callable[[Tensor, Tensor], Tensor]) -> Callable[[OpNode], Kernel]:
    """Fold any number of inputs with a function of two."""

    def lower(node: OpNode) -> Kernel:
        def run(first: Tensor, *rest: Tensor) -> Tensor:
            for other in rest:
                first = pair(first, other)
            return first

        return run

    return lower


def mean(node: OpNode) -> Kernel:
    """Average any number of inputs."""
    return lambda *inputs: sum(inputs[1:], inputs[0]) / len(inputs)


def clip(node: OpNode) -> Kernel:
    """Limit to [min, max], each a number or absent."""
    if all(not node.has(i) or node.constants[i] is not None for i in (1, 2)):
        low, high = (None if (held := node.fixed(i)) is None else held[0] for i in (1, 2))
        if low is None and high is None:
            return lambda x, *_: x
        if low == 0 and high == 6:
            return lambda x, *_: F.relu6(x) if x.is_floating_point() else torch.clamp(x, 0, 6)
        return lambda x, *_: torch.clamp(x, low, high)

    def run(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        x = x if low is None else torch.maximum(x, low)
        return x if high is None else torch.minimum(x, high)

    return run


# --------------------------------------------------------------------- bits and types


def bit_shift(node: OpNode) -> Kernel:
    """Shift left or right; torch shifts no unsigned type wider than a byte."""
    shift = torch.bitwise_left_shift
    if node.get("direction", "LEFT") == "RIGHT":
        shift = torch.bitwise_right_shift

    def run(a: Tensor, b: Tensor) -> Tensor:
        return shift(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)

    return run


def cast(node: OpNode) -> Kernel:
    """Change the type."""
    dtype = torch_dtype(node.get("to", 1))
    return lambda x: x.to(dtype)


def cast_like(node: OpNode) -> Kernel:
    """Change the type to that of the second input."""
    return lambda x, like: x.to(like.dtype)


def is_inf(node: OpNode) -> Kernel:
    """Tell infinities, of one sign or both."""
    negative, positive = node.get("detect_negative", 1), node.get("detect_positive", 1)
    if negative and positive:
        return torch.isinf
    if positive:
        return torch.isposinf
    return torch.isneginf if negative else lambda x: torch.zeros_like(x, dtype=torch.bool)


# ------------------------------------------------------------------------ activations


def with_alpha(
    kernel: Callable[[Tensor, float], Tensor], default: float
) -> Callable[[OpNode], Kernel]:
    """Lower an activation with one number ``alpha``."""

    def lower(node: OpNode) -> Kernel:
        alpha = node.get("alpha", default)
        return lambda x: kernel(x, alpha)

    return lower


def hard_sigmoid(node: OpNode) -> Kernel:
    """Clamp alpha * x + beta to [0, 1]."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    return lambda x: torch.clamp(x * alpha + beta, 0, 1)


def selu(node: OpNode) -> Kernel:
    """Scale an ELU."""
    alpha, gamma = node.get("alpha", 1.67326319217681), node.get("gamma", 1.05070102214813)
    return lambda x: gamma * F.elu(x, alpha)


def gelu(node: OpNode) -> Kernel:
    """GELU, exact or by tanh."""
    approximate = node.get("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def shrink(node: OpNode) -> Kernel:
    """Move towards zero by bias, and zero within [-lambd, lambd]."""
    bias, lambd = node.get("bias", 0.0), node.get("lambd", 0.5)

    def run(x: Tensor) -> Tensor:
        moved = torch.where(x < -lambd, x + bias, x - bias)
        return torch.where(x.abs() > lambd, moved, torch.zeros_like(x)).to(x.dtype)

    return run


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Multiply what is negative by a slope that broadcasts."""
    return torch.where(x < 0, x * slope, x)


ARITHMETIC = {
    "Add": plain(torch.add),
    "Sub": plain(torch.sub),
    "Mul": plain(torch.mul),
    "Div": div,
    "Pow": power,
    "Mod": mod,
    "Sum": variadic(torch.add),
    "Mean": mean,
    "Max": variadic(torch.maximum),
    "Min": variadic(torch.minimum),
    "Clip": clip,
    "Where": plain(torch.where),
}
UNARY = {
    "Abs": plain(torch.abs),
    "Acos": plain(torch.acos),
    "Acosh": plain(torch.acosh),
    "Asin": plain(torch.asin),
    "Asinh": plain(torch.asinh),
    "Atan": plain(torch.atan),
    "Atanh": plain(torch.atanh),
    "Ceil": plain(torch.ceil),
    "Cos": plain(torch.cos),
    "Cosh": plain(torch.cosh),
    "Det": plain(torch.det),
    "Erf": plain(torch.erf),
    "Exp": plain(torch.exp),
    "Floor": plain(torch.floor),
    "Log": plain(torch.log),
    "Neg": plain(torch.neg),
    "Reciprocal": plain(torch.reciprocal),
    "Round": plain(torch.round),
    "Sign": plain(torch.sign),
    "Sin": plain(torch.sin),
    "Sinh": plain(torch.sinh),
    "Sqrt": plain(torch.sqrt),
    "Tan": plain(torch.tan),
    "Tanh": plain(torch.tanh),
}
LOGIC = {
    "And": plain(torch.logical_and),
    "BitShift": bit_shift,
    "BitwiseAnd": plain(torch.bitwise_and),
    "BitwiseNot": plain(torch.bitwise_not),
    "BitwiseOr": plain(torch.bitwise_or),
    "BitwiseXor": plain(torch.bitwise_xor),
    "Cast": cast,
    "CastLike": cast_like,
    "Equal": plain(torch.eq),
    "Greater": plain(torch.gt),
    "GreaterOrEqual": plain(torch.ge),
    "IsInf": is_inf,
    "IsNaN": plain(torch.isnan),
    "Less": plain(torch.lt),
    "LessOrEqual": plain(torch.le),
    "Not": plain(torch.logical_not),
    "Or": plain(torch.logical_or),
    "Xor": plain(torch.logical_xor),
}
ACTIVATIONS = {
    "Celu": with_alpha(F.celu, 1.0),
    "Elu": with_alpha(F.elu, 1.0),
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": plain(F.hardswish),
    "LeakyRelu": with_alpha(F.leaky_relu, 0.01),
    "Mish": plain(F.mish),
    "PRelu": plain(prelu),
    "Relu": plain(torch.relu),
    "Selu": selu,
    "Shrink": shrink,
    "Sigmoid": plain(torch.sigmoid),
    "Softplus": plain(F.softplus),
    "Softsign": plain(F.softsign),
    "Swish": with_alpha(lambda x, alpha: x * torch.sigmoid(alpha * x), 1.0),
    "ThresholdedRelu": with_alpha(lambda x, alpha: torch.where(x > alpha, x, 0.0).to(x.dtype), 1.0),
}
ELEMENTWISE = {**ARITHMETIC, **UNARY, **LOGIC, **ACTIVATIONS}
