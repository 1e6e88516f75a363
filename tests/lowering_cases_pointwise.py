"""Cases for elementwise operators, quantisation and losses."""

import numpy as np
from lowering_case import Case, X, f, flags, i, ints, n, pos


def unary(op, x=None, **options):
    return Case(f"y = {op}(x)", {"x": f(2, 3, 4) if x is None else x}, **options)


def binary(op, x=None, z=None, **options):
    arrays = {"x": f(2, 3, 4) if x is None else x, "z": f(3, 1) if z is None else z}
    return Case(f"y = {op}(x, z)", arrays, **options)


ELEMENTWISE = [
    *(unary(op) for op in ("Abs", "Atan", "Cos", "Cosh", "Elu", "Erf", "Exp", "Gelu", "HardSwish")),
    *(unary(op) for op in ("Asinh", "Celu", "HardSigmoid", "LeakyRelu", "Mish", "Neg", "Relu")),
    *(unary(op) for op in ("Selu", "Shrink", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign")),
    *(unary(op) for op in ("Tan", "Tanh", "ThresholdedRelu", "Identity", "Reciprocal")),
    *(unary(op, grad=False) for op in ("Ceil", "Floor", "Round", "Sign", "IsNaN", "IsInf")),
    *(unary(op, f(5, low=-0.9, high=0.9)) for op in ("Acos", "Asin", "Atanh")),
    *(unary(op, pos(5)) for op in ("Log", "Sqrt")),
    unary("Acosh", f(5, low=1.2, high=3)),
    unary("Round", np.array([0.5, 1.5, -0.5, 2.5], np.float32), grad=False),
    unary("Det", f(2, 3, 3)),
    unary("Not", flags(3, 4), grad=False),
    unary("BitwiseNot", ints(5), grad=False),
    unary("IsInf", np.array([1, np.inf, -np.inf, np.nan], np.float32), grad=False),
    unary("IsNaN", np.array([1, np.inf, -np.inf, np.nan], np.float32), grad=False),
    Case("y = IsInf<detect_negative=0>(x)", {"x": np.array([1, np.inf, -np.inf], np.float32)}),
    Case("y = IsInf<detect_positive=0>(x)", {"x": np.array([1, np.inf, -np.inf], np.float32)}),
    Case('y = Gelu<approximate="tanh">(x)', X),
    Case("y = Elu<alpha=0.5>(x)", X),
    Case("y = Celu<alpha=0.5>(x)", X),
    Case("y = HardSigmoid<alpha=0.3, beta=0.4>(x)", X),
    Case("y = Selu<alpha=1.5, gamma=1.1>(x)", X),
    Case("y = LeakyRelu<alpha=0.2>(x)", X),
    Case("y = Swish<alpha=1.5>(x)", X, opset=24),
    Case("y = Shrink<bias=0.2, lambd=0.7>(x)", X),
    Case("y = PRelu(x, w)", {"x": f(2, 3, 4), "w": f(3, 1)}),
    *(binary(op) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")),
    Case("y = Max(x, z, u)", {"x": f(4), "z": f(4), "u": f(1)}),
    Case("y = Sum(x, z, u)", {"x": f(4), "z": f(3, 1), "u": f(1)}),
    Case("y = Mean(x, z, u)", {"x": f(4), "z": f(3, 1), "u": f(1)}),
    Case("y = Sum(x)", X),
    Case("y = Mod<fmod=1>(x, z)", {"x": f(2, 3), "z": pos(3)}),
    binary("Mod", ints(8), ints(8, low=1), grad=False),
    binary("Mod", ints(8), ints(8, low=-9, high=-1), grad=False),
    binary("Div", ints(8), ints(8, low=1), grad=False),
    binary("Div", ints(8), ints(8, low=-9, high=-1), grad=False),
    binary("Pow", pos(2, 3), f(3)),
    Case("y = Pow(x, c)", {"x": f(2, 3), "c": n(2.0, np.float32)}),
    Case("y = Pow(x, c)", {"x": ints(5), "c": n(2.0, np.float32)}, grad=False),
    *(binary(op, grad=False) for op in ("Equal", "Greater", "GreaterOrEqual", "Less")),
    binary("LessOrEqual", ints(8), ints(8), grad=False),
    *(binary(op, flags(4, 3), flags(3), grad=False) for op in ("And", "Or", "Xor")),
    *(binary(f"Bitwise{op}", ints(6), ints(6), grad=False) for op in ("And", "Or", "Xor")),
    Case(
        'y = BitShift<direction="LEFT">(x, z)',
        {"x": ints(5, low=1, dtype=np.uint32), "z": ints(5, low=0, high=4, dtype=np.uint32)},
    ),
    Case(
        'y = BitShift<direction="RIGHT">(x, z)',
        {"x": ints(5, low=1, dtype=np.uint8), "z": ints(5, low=0, high=4, dtype=np.uint8)},
    ),
    Case("y = Clip(x, c0, c1)", {**X, "c0": n(-1.0, np.float32), "c1": n(1.0, np.float32)}),
    Case("y = Clip(x, c0, c1)", {**X, "c0": n(0.0, np.float32), "c1": n(6.0, np.float32)}),
    Case("y = Clip(x, c0)", {**X, "c0": n(-1.0, np.float32)}),
    Case('y = Clip(x, "", c1)', {**X, "c1": n(1.0, np.float32)}),
    Case("y = Clip(x)", X),
    Case("y = Clip(x, low)", {**X, "low": n(-1.0, np.float32)}),
    Case("y = Clip(x, c0, c1)", {"x": ints(9), "c0": n(0), "c1": n(6)}, grad=False),
    Case("y = Where(b, x, z)", {"b": flags(3, 4), "x": f(2, 3, 4), "z": f(4)}),
    Case("y = Cast<to=11>(x)", X, tolerance=1e-6),
    Case("y = Cast<to=7>(x)", X, grad=False),
    Case("y = Cast<to=9>(x)", X, grad=False),
    Case("y = Cast<to=10>(x)", X, grad=False),
    Case("y = CastLike(x, z)", {"x": f(3), "z": ints(1)}, grad=False),
]

_SCALE = np.array([0.1, 0.03, 0.2], np.float32)
QUANT = [
    Case(
        "y = QuantizeLinear(x, c0, c1)",
        {**X, "c0": n(0.02, np.float32), "c1": n(120, np.uint8)},
        grad=False,
    ),
    Case("y = QuantizeLinear(x, c0)", {**X, "c0": n(0.02, np.float32)}, grad=False),
    Case(
        "y = QuantizeLinear<axis=1>(x, c0, c1)",
        {**X, "c0": _SCALE, "c1": np.zeros(3, np.int8)},
        grad=False,
    ),
    Case(
        "y = QuantizeLinear<output_dtype=5>(x, c0)",
        {**X, "c0": n(0.02, np.float32)},
        opset=21,
        grad=False,
    ),
    Case(
        "y = DequantizeLinear<axis=1>(x, c0, c1)",
        {"x": ints(2, 3, 4, dtype=np.int8), "c0": _SCALE, "c1": np.arange(3, dtype=np.int8)},
    ),
    Case("y = DequantizeLinear(x, c)", {"x": ints(4, dtype=np.int32), "c": n(0.02, np.float32)}),
    Case(
        "y = DequantizeLinear<axis=1, block_size=2>(x, c0, c1)",
        {"x": ints(2, 4, dtype=np.int8), "c0": pos(2, 2), "c1": ints(2, 2, dtype=np.int8)},
        opset=21,
    ),
    Case(
        "q = QuantizeLinear(x, c0, c1) t = Transpose<perm=[1,0,2]>(q)"
        " y = DequantizeLinear(t, c0, c1)",
        {**X, "c0": n(0.02, np.float32), "c1": n(120, np.uint8)},
        grad=False,
    ),
    *(
        Case(
            f"y = QLinearConv<pads=[1,1,1,1]>(x, c0, c1, c2, c3, c4, c5, c6{bias})",
            {
                "x": ints(1, 2, 4, 4, low=0, high=99, dtype=np.uint8),
                "c0": n(0.1, np.float32),
                "c1": n(30, np.uint8),
                "c2": ints(3, 2, 3, 3, dtype=np.int8),
                "c3": _SCALE,
                "c4": np.zeros(3, np.int8),
                "c5": n(0.373, np.float32),
                "c6": n(90, np.uint8),
                **({"c7": ints(3, low=-99, high=99, dtype=np.int32)} if bias else {}),
            },
            opset=17,
        )
        for bias in ("", ", c7")
    ),
    Case(
        "y = QLinearMatMul(x, c0, c1, c2, c3, c4, c5, c6)",
        {
            "x": ints(2, 4, low=0, high=99, dtype=np.uint8),
            "c0": n(0.1, np.float32),
            "c1": n(30, np.uint8),
            "c2": ints(4, 3, dtype=np.int8),
            "c3": n(0.2, np.float32),
            "c4": n(3, np.int8),
            "c5": n(0.373, np.float32),
            "c6": n(90, np.uint8),
        },
        opset=17,
    ),
    Case("y, s, z = DynamicQuantizeLinear(x)", X, outputs=("y", "s", "z"), grad=False),
]

_LABELS = {"x": f(4, 5), "k": i(0, 4, 2, 2)}
LOSS = [
    *(
        Case(f'y = SoftmaxCrossEntropyLoss<reduction="{r}">(x, k)', _LABELS)
        for r in ("mean", "sum", "none")
    ),
    Case(
        "y, p = SoftmaxCrossEntropyLoss<ignore_index=2>(x, k, c)",
        {**_LABELS, "c": pos(5)},
        outputs=("y", "p"),
    ),
    Case(
        "l = LogSoftmax<axis=1>(x) y = NegativeLogLikelihoodLoss(l, k)",
        {"x": f(2, 5, 3), "k": ints(2, 3, low=0, high=5)},
    ),
]

DRAWN = [  # without chance: the spread is less than rounding
    Case("y = RandomNormalLike<mean=2.0, scale=1e-9>(x)", X, grad=False),
    Case("y = RandomUniformLike<low=0.5, high=0.500001>(x)", X, grad=False),
    Case("r = RandomNormal<shape=[2, 3, 4], scale=1e-9>() y = Add(x, r)", X, grad=False),
    Case("r = RandomUniform<shape=[4], low=0.5, high=0.500001>() y = Mul(x, r)", X, grad=False),
]
