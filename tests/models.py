"""Small models as ONNX text: at least one for every operator that has a rule.

``build`` turns a case into a model. A name that begins with ``w`` in the list after the outputs is
a weight and gets seeded numbers; everything else there is only a type.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd.model import load


@dataclass(frozen=True)
class Case:
    """A model, and what pruning all of it must find."""

    body: str
    weights: str
    inputs: str = "float[N,3,8,8] x"
    outputs: str = "float[N,4,P,Q] y"
    opset: int = 21
    units: dict[str, int] = field(default_factory=dict)
    """Removable units by parameter; 0 for one that must stay."""
    approximate: bool = False


def build(case: Case, seed: int = 0) -> ir.Model:
    """Parse a case and fill its weights."""
    return load(proto(case, seed))


def proto(case: Case, seed: int = 0) -> onnx.ModelProto:
    """Parse a case and fill its weights, as a ModelProto."""
    text = (
        f'<ir_version: 10, opset_import: ["": {case.opset}]>\n'
        f"g ({case.inputs}) => ({case.outputs}) <{case.weights}> {{{case.body}}}"
    )
    parsed = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    kept = []
    for info in parsed.graph.value_info:
        if not info.name.startswith("w"):
            kept.append(info)
            continue
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        array = _numbers(rng, dims, dtype, info.name)
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
    del parsed.graph.value_info[:]
    parsed.graph.value_info.extend(kept)
    return parsed


def _numbers(rng: np.random.Generator, dims: list[int], dtype: np.dtype, name: str) -> np.ndarray:
    if dtype.kind in "iu":
        return rng.integers(0, 3 if name.startswith("wz") else 100, dims).astype(dtype)
    if name.startswith("wpos"):  # variances, scales, divisors
        return rng.uniform(0.5, 1.5, dims).astype(dtype)
    return (rng.standard_normal(dims) / np.sqrt(max(1, np.prod(dims[1:])))).astype(dtype)


CONVS = "float[8,3,3,3] w1, float[4,8,1,1] w2"
HEAD = "h = Conv<pads=[1,1,1,1]>(x, w1)"
TAIL = "y = Conv(t, w2)"


def between(body: str, weights: str = "", **more: object) -> Case:
    """Something between two convolutions: 8 channels come in as ``h`` and go out as ``t``."""
    more.setdefault("units", {"w1": 8, "w2": 0})
    return Case(f"{HEAD} {body} {TAIL}", f"{CONVS}{', ' if weights else ''}{weights}", **more)  # type: ignore[arg-type]


_FLOAT_UNARY = """
Abs Asinh Atan Ceil Celu Clip Cos Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity
LeakyRelu Mish Neg Relu Round Selu Shrink Sigmoid Sign Sin Softplus Softsign Tanh ThresholdedRelu
""".split()  # noqa: SIM905
_NARROW_UNARY = {  # operators that need their input brought into range first
    "Acos": "s = Tanh(h) t = Acos(s)",
    "Asin": "s = Tanh(h) t = Asin(s)",
    "Atanh": "s = Sigmoid(h) r = Mul(s, half) t = Atanh(r)",
    "Acosh": "s = Abs(h) r = Add(s, two) t = Acosh(r)",
    "Cosh": "s = Tanh(h) t = Cosh(s)",
    "Sinh": "s = Tanh(h) t = Sinh(s)",
    "Tan": "s = Tanh(h) t = Tan(s)",
    "Log": "s = Abs(h) r = Add(s, two) t = Log(r)",
    "Sqrt": "s = Abs(h) t = Sqrt(s)",
    "Reciprocal": "s = Abs(h) r = Add(s, two) t = Reciprocal(r)",
}
_CONSTANTS = "half = Constant<value_float=0.5>() two = Constant<value_float=2.0>() "
_BOOL = {
    op: f"b = {op}(h, w3) t = Cast<to=1>(b)"
    for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
}
_LOGIC = {
    op: f"a = Greater(h, w3) b = Less(h, w4) c = {op}(a, b) t = Cast<to=1>(c)"
    for op in ("And", "Or", "Xor")
}
_BITS = {
    op: f"a = Cast<to=6>(h) b = Cast<to=6>(w3) c = {op}(a, b) t = Cast<to=1>(c)"
    for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")
}
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "PRelu")
_REDUCTIONS = {
    "ReduceSum": False,
    "ReduceL1": False,
    "ReduceL2": False,
    "ReduceSumSquare": False,
    "ReduceMean": True,
    "ReduceMax": True,
    "ReduceMin": True,
    "ReduceProd": True,
    "ReduceLogSum": True,
    "ReduceLogSumExp": True,
}

MODELS: dict[str, Case] = {
    **{f"unary-{op}": between(f"t = {op}(h)") for op in _FLOAT_UNARY},
    **{f"unary-{op}": between(_CONSTANTS + body) for op, body in _NARROW_UNARY.items()},
    **{f"const-{op}": between(f"t = {op}(h, wpos3)", "float[8,1,1] wpos3") for op in _ARITHMETIC},
    **{f"const-{op}": between(body, "float[8,1,1] w3") for op, body in _BOOL.items()},
    **{
        f"const-{op}": between(body, "float[8,1,1] w3, float[8,1,1] w4")
        for op, body in _LOGIC.items()
    },
    **{f"const-{op}": between(body, "float[8,1,1] w3") for op, body in _BITS.items()},
    **{
        f"{op}-over-channels": Case(
            f"{HEAD} a = Constant<value_ints=[1]>() r = Abs(h) s = {op}(r, a)"
            " y = Conv<pads=[1,1,1,1]>(s, w2)",
            "float[8,3,3,3] w1, float[4,1,3,3] w2",
            units={"w1": 8},
            approximate=approximate,
        )
        for op, approximate in _REDUCTIONS.items()
    },
    "swish": between("t = Swish(h)", opset=24),
    "pow": between("a = Abs(h) t = Pow(a, wpos3)", "float[8,1,1] wpos3"),
    "mod": between("t = Mod<fmod=1>(h, wpos3)", "float[8,1,1] wpos3"),
    "cast-like": between("t = CastLike(h, h)"),
    "is-nan": between("a = IsNaN(h) b = IsInf(h) c = Or(a, b) d = Not(c) t = Cast<to=1>(d)"),
    "bitwise-not": between("a = Cast<to=6>(h) b = BitwiseNot(a) t = Cast<to=1>(b)"),
    "bit-shift": between(
        's = Sigmoid(h) a = Cast<to=2>(s) b = BitShift<direction="LEFT">(a, a) t = Cast<to=1>(b)'
    ),
    "where": between("b = Greater(h, w3) t = Where(b, h, w4)", "float[8,1,1] w3, float[1] w4"),
    "full-constant": between("t = Add(h, w3)", "float[8,8,8] w3"),
    "residual": Case(
        f"{HEAD} a = Conv<pads=[1,1,1,1]>(h, w3) t = Add(a, h) {TAIL}",
        CONVS + ", float[8,8,3,3] w3",
        units={"w1": 8, "w3": 8, "w2": 0},
    ),
    "squeeze-excite": between(
        "g = GlobalAveragePool(h) a = Conv(g, w3) b = Relu(a) c = Conv(b, w4) d = Sigmoid(c)"
        " t = Mul(h, d)",
        "float[2,8,1,1] w3, float[8,2,1,1] w4",
        units={"w1": 8, "w3": 2, "w4": 8},
    ),
    "batch-norm": between(
        "t = BatchNormalization(h, w3, w4, w5, wpos6)",
        "float[8] w3, float[8] w4, float[8] w5, float[8] wpos6",
    ),
    "instance-norm": between("t = InstanceNormalization(h, w3, w4)", "float[8] w3, float[8] w4"),
    "group-norm": between(
        "t = GroupNormalization<num_groups=2>(h, w3, w4)",
        "float[8] w3, float[8] w4",
        units={"w1": 4},
        approximate=True,
    ),
    "group-norm-of-channels": between(
        "t = GroupNormalization<num_groups=8>(h, w3, w4)", "float[8] w3, float[8] w4"
    ),
    "group-norm-decomposed": between(
        "s = Constant<value_ints=[0,2,-1]>() r = Reshape(h, s) n = InstanceNormalization(r, w3, w4)"
        " z = Shape(h) q = Reshape(n, z) t = Mul(q, w5)",
        "float[2] w3, float[2] w4, float[8,1,1] w5",
        units={"w1": 2},  # whole groups: each has its own statistics, so that this is exact
    ),
    "linear-attention-padded": Case(  # EfficientViT: a one behind each value sums up the weights
        "q = MatMul(x, w1) k = MatMul(x, w2) v = MatMul(x, w3) s = Constant<value_ints=[0,0,4,3]>()"
        " a = Reshape(q, s) b = Reshape(k, s) c = Reshape(v, s)"
        " d = Transpose<perm=[0,2,1,3]>(a) e = Transpose<perm=[0,2,3,1]>(b)"
        " f = Transpose<perm=[0,2,1,3]>(c) n = Constant<value_ints=[0,0,0,0,0,0,0,1]>()"
        " one = Constant<value_float=1.0>() p = Pad(f, n, one) m = MatMul(e, p) o = MatMul(d, m)"
        " z = Constant<value_ints=[0]>() u = Constant<value_ints=[-1]>()"
        " end = Constant<value_ints=[9]>() top = Slice(o, z, u, u) low = Slice(o, u, end, u)"
        " r = Mul(top, low) g = Transpose<perm=[0,2,1,3]>(r) i = Constant<value_ints=[0,0,-1]>()"
        " h = Reshape(g, i) y = MatMul(h, w4)",
        "float[6,12] w1, float[6,12] w2, float[6,12] w3, float[12,5] w4",
        inputs="float[N,7,6] x",
        outputs="float[N,7,5] y",
        units={"w1": 4, "w2": 4, "w3": 4},
    ),
    "tf-same-padding": between(  # timm's tf_* and "same" models compute their padding
        "s = Shape(h) i = Constant<value_int=2>() n = Gather(s, i) f = Cast<to=1>(n)"
        " two = Constant<value_float=2.0>() a = Div(f, two) b = Ceil(a)"
        " one = Constant<value_float=1.0>() c = Sub(b, one) d = Mul(c, two)"
        " e = Add(d, one) g = Add(e, two) k = Sub(g, f)"
        " zero = Constant<value_float=0.0>() l = Clip(k, zero) half = Div(l, two)"
        " q = Cast<to=7>(half) ax = Constant<value_ints=[0]>() v = Unsqueeze(q, ax)"
        " z = Constant<value_ints=[0,0]>() o = Concat<axis=0>(z, v, v, z, v, v) t = Pad(h, o)",
    ),
    "eca": between(  # a gate of each channel and its neighbours
        "p = GlobalAveragePool(h) s = Constant<value_ints=[0,1,-1]>() q = Reshape(p, s)"
        " c = Conv<pads=[1,1]>(q, w3) g = Sigmoid(c) u = Constant<value_ints=[0,-1,1,1]>()"
        " r = Reshape(g, u) t = Mul(h, r)",
        "float[1,1,3] w3",
        approximate=True,
    ),
    "token-mixer": Case(  # tokens are the channels of a convolution, channels its space
        "h = MatMul(x, w1) a = Conv(h, w3, w4) b = Add(a, h) y = MatMul(b, w2)",
        "float[6,8] w1, float[5,5,1] w3, float[5] w4, float[8,4] w2",
        inputs="float[N,5,6] x",
        outputs="float[N,5,4] y",
        units={"w1": 8, "w3": 0},
    ),
    "lrn": between("t = LRN<size=3>(h)", approximate=True),
    "layer-norm": between(
        "a = Transpose<perm=[0,2,3,1]>(h) b = LayerNormalization<axis=-1>(a, w3, w4)"
        " t = Transpose<perm=[0,3,1,2]>(b)",
        "float[8] w3, float[8] w4",
        approximate=True,
    ),
    "layer-norm-decomposed": between(
        "a = Transpose<perm=[0,2,3,1]>(h) k = Constant<value_ints=[-1]>() m = ReduceMean(a, k)"
        " d = Sub(a, m) two = Constant<value_float=2.0>() q = Pow(d, two) v = ReduceMean(q, k)"
        " s = Sqrt(v) n = Div(d, s) f = Mul(n, w3) b = Add(f, w4)"
        " t = Transpose<perm=[0,3,1,2]>(b)",
        "float[8] w3, float[8] w4",
        approximate=True,
    ),
    "layer-norm-pooled": Case(  # Keras, written by tf2onnx
        "h = MatMul(x, w1) m = GlobalAveragePool(h) d = Sub(h, m) q = Mul(d, d)"
        " v = GlobalAveragePool(q) s = Sqrt(v) n = Div(d, s) p = GlobalLpPool(n) o = Div(n, p)"
        " top = GlobalMaxPool(o) u = Sub(o, top) y = MatMul(u, w2)",
        "float[6,8] w1, float[8,4] w2",
        inputs="float[N,5,6] x",
        outputs="float[N,5,4] y",
        units={"w1": 8},
        approximate=True,
    ),
    "rms-norm": between(
        "a = Transpose<perm=[0,2,3,1]>(h) b = RMSNormalization<axis=-1>(a, w3)"
        " t = Transpose<perm=[0,3,1,2]>(b)",
        "float[8] w3",
        opset=23,
        approximate=True,
    ),
    "softmax": between("t = Softmax<axis=1>(h)", approximate=True),
    "log-softmax": between("t = LogSoftmax<axis=1>(h)", approximate=True),
    "hardmax": between("t = Hardmax<axis=1>(h)", approximate=True),
    "lp-norm": between("t = LpNormalization<axis=1>(h)"),
    "arg-max": between(
        "a = ArgMax<axis=1>(h) b = ArgMin<axis=1>(h) c = Add(a, b) d = Cast<to=1>(c) t = Add(h, d)",
        units={"w1": 0},
    ),
    "cumsum": between("k = Constant<value_int=1>() t = CumSum(h, k)", units={"w1": 0}),
    "topk": between("k = Constant<value_ints=[8]>() a, i = TopK<axis=-1>(h, k) t = Abs(a)"),
    "trilu": between("t = Trilu(h)"),
    "pools": Case(
        f"{HEAD} a = MaxPool<kernel_shape=[2,2]>(h) b = AveragePool<kernel_shape=[2,2]>(a)"
        " t = LpPool<kernel_shape=[2,2]>(b) c = Conv(t, w2) d = GlobalMaxPool(t)"
        " e = GlobalLpPool(t) f = Add(d, e) g2 = Conv(f, w2) y = Add(c, g2)",
        CONVS,
        units={"w1": 8, "w2": 0},
    ),
    "roi-pool": between(
        "a = MaxRoiPool<pooled_shape=[2,2]>(h, roi) t = Relu(a)",
        inputs="float[N,3,8,8] x, float[R,5] roi",
        outputs="float[R,4,2,2] y",
    ),
    "grid-sample": between(
        "t = GridSample(h, grid)", inputs="float[N,3,8,8] x, float[N,4,4,2] grid"
    ),
    "roi-align": Case(
        "a = Conv(x, w1) i = Constant<value_ints=[0,0]>()"
        " h = RoiAlign<output_height=2,output_width=2>(a, roi, i) y = Conv(h, w2)",
        CONVS,
        inputs="float[N,3,8,8] x, float[2,4] roi",
        outputs="float[2,4,2,2] y",
        units={"w1": 8, "w2": 0},
    ),
    "depthwise": between(
        "a = Conv<group=8,pads=[1,1,1,1]>(h, w3, w4) t = Relu(a)",
        "float[8,1,3,3] w3, float[8] w4",
        units={"w1": 8, "w3": 8},
    ),
    "depthwise-multiplier": Case(
        f"{HEAD} t = Conv<group=8,pads=[1,1,1,1]>(h, w3) y = Conv(t, w2)",
        "float[8,3,3,3] w1, float[16,1,3,3] w3, float[4,16,1,1] w2",
        units={"w1": 8, "w3": 8},
    ),
    "grouped": between(
        "t = Conv<group=2,pads=[1,1,1,1]>(h, w3)", "float[8,4,3,3] w3", units={"w1": 4, "w3": 4}
    ),
    "grouped-one-output": between(
        "a = Conv<group=2>(h, w3) t = Conv<group=2>(a, w4)",
        "float[2,4,1,1] w3, float[8,1,1,1] w4",
        units={"w1": 2, "w3": 2, "w4": 2},
    ),
    "conv1d": Case(
        "h = Conv(x, w1, w3) t = Relu(h) y = Conv(t, w2)",
        "float[8,3,3] w1, float[8] w3, float[4,8,1] w2",
        inputs="float[N,3,L] x",
        outputs="float[N,4,M] y",
        units={"w1": 8},
    ),
    "conv3d": Case(
        "h = Conv(x, w1) t = Relu(h) y = Conv(t, w2)",
        "float[8,3,3,3,3] w1, float[4,8,1,1,1] w2",
        inputs="float[N,3,4,4,4] x",
        outputs="float[N,4,2,2,2] y",
        units={"w1": 8},
    ),
    "conv-transpose": between(
        "t = ConvTranspose(h, w3, w4)",
        "float[8,8,2,2] w3, float[8] w4",
        units={"w1": 8, "w3": 8},
    ),
    "conv-transpose-depthwise": between(
        "t = ConvTranspose<group=8>(h, w3)", "float[8,1,2,2] w3", units={"w1": 8, "w3": 8}
    ),
    "conv-transpose-grouped": between(
        "t = ConvTranspose<group=2>(h, w3)", "float[8,4,2,2] w3", units={"w1": 4, "w3": 4}
    ),
    "gemm": Case(
        "a = Gemm<transB=1>(x, w1, w2) b = Relu(a) y = Gemm(b, w3, w4)",
        "float[8,6] w1, float[8] w2, float[8,4] w3, float[4] w4",
        inputs="float[N,6] x",
        outputs="float[N,4] y",
        units={"w1": 8, "w3": 0},
    ),
    "flatten-gemm": Case(
        "h = Conv(x, w1) p = Relu(h) f = Flatten(p) y = Gemm<transB=1>(f, w2)",
        "float[8,3,3,3] w1, float[4,288] w2",
        outputs="float[N,4] y",
        units={"w1": 8},
    ),
    "matmul-bias": Case(
        "a = MatMul(x, w1) b = Add(a, w2) c = Gelu(b) y = MatMul(c, w3)",
        "float[6,8] w1, float[8] w2, float[8,4] w3",
        inputs="float[N,5,6] x",
        outputs="float[N,5,4] y",
        units={"w1": 8, "w3": 0},
    ),
    "matmul-vector": Case(
        "a = MatMul(x, w1) y = MatMul(a, w2)",
        "float[6,8] w1, float[8] w2",
        inputs="float[N,6] x",
        outputs="float[N] y",
        units={"w1": 8},
    ),
    "weight-transposed": Case(
        "p = Transpose<perm=[1,0]>(w1) q = Identity(p) a = MatMul(x, q) y = MatMul(a, w3)",
        "float[8,6] w1, float[8,4] w3",
        inputs="float[N,6] x",
        outputs="float[N,4] y",
        units={"w1": 8},
    ),
    "weight-as-constant": Case(
        "k = Constant<value=float[2,3] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}>() a = MatMul(x, k)"
        " y = MatMul(a, w1)",
        "float[3,4] w1",
        inputs="float[N,2] x",
        outputs="float[N,4] y",
        units={"k": 3},
    ),
    "weight-used-twice": Case(
        "a = Conv(x, w1) b = Conv(z, w1) c = Concat<axis=2>(a, b) y = Conv(c, w2)",
        CONVS,
        inputs="float[N,3,8,8] x, float[N,3,8,8] z",
        units={"w1": 8},
    ),
    "vector-shared-by-layers": Case(
        "a = Conv(x, w1, w3) b = Relu(a) c = Conv(b, w4, w3) d = Relu(c) y = Conv(d, w2)",
        "float[8,3,3,3] w1, float[8,8,1,1] w4, float[8] w3, float[4,8,1,1] w2",
        units={"w1": 8, "w4": 8},
    ),
    "einsum": Case(
        'a = MatMul(x, w1) y = Einsum<equation="btc,cd->btd">(a, w2)',
        "float[6,8] w1, float[8,4] w2",
        inputs="float[N,5,6] x",
        outputs="float[N,5,4] y",
        units={"w1": 8, "w2": 0},
    ),
    "positions-of-pooling": between(
        "m, i = MaxPool<kernel_shape=[2,2]>(h) f = Cast<to=1>(i) g2 = Sigmoid(f) t = Mul(m, g2)",
        units={"w1": 0},
    ),
    "positions-of-non-zeros": Case(
        "h = MatMul(x, w1) n = NonZero(h) f = Cast<to=1>(n) s = ReduceSum<keepdims=0>(f)"
        " t = Mul(h, s) y = MatMul(t, w2)",
        "float[6,8] w1, float[8,4] w2",
        inputs="float[5,6] x",
        outputs="float[5,4] y",
        units={"w1": 0},
    ),
    "count-as-output": Case(
        "h = Conv(x, w1) s = Shape(h) i = Constant<value_int=1>() n = Gather(s, i)"
        " y = Conv(h, w2) z = Conv(x, w3) u = Conv(z, w4)",
        "float[8,3,1,1] w1, float[4,8,1,1] w2, float[6,3,1,1] w3, float[2,6,1,1] w4",
        outputs="float[N,4,8,8] y, int64 n, float[N,2,8,8] u",
        units={"w1": 0, "w3": 6},
    ),
    "gemm-weight-first": Case(
        "a = Gemm<transA=1,transB=1>(w1, x, w2) b = Relu(a) y = Gemm<transA=1>(w3, b)",
        "float[6,8] w1, float[8,1] w2, float[8,4] w3",
        inputs="float[N,6] x",
        outputs="float[4,N] y",
        units={"w1": 8, "w3": 0},
    ),
    "einsum-ellipsis": Case(  # what Keras' EinsumDense is
        'a = Einsum<equation="...c,ch->...h">(x, w1) b = Einsum<equation="abc,cd">(a, w2)'
        ' y = Einsum<equation="b...c,ck->b...k">(b, w3)',
        "float[6,8] w1, float[8,10] w2, float[10,4] w3",
        inputs="float[N,5,6] x",
        outputs="float[N,5,4] y",
        units={"w1": 8, "w2": 10, "w3": 0},
    ),
    "lstm": Case(
        "h = MatMul(x, w0) a, b, c = LSTM<hidden_size=6>(h, w1, w2, w3)"
        " k = Constant<value_ints=[1]>() s = Squeeze(a, k) y = MatMul(s, w4)",
        "float[3,5] w0, float[1,24,5] w1, float[1,24,6] w2, float[1,48] w3, float[6,4] w4",
        inputs="float[7,N,3] x",
        outputs="float[7,N,4] y",
        units={"w0": 5, "w2": 6},
    ),
    "gru-bidirectional": Case(
        'a, b = GRU<hidden_size=6,direction="bidirectional",linear_before_reset=1>(x, w1, w2, w3)'
        " p = Transpose<perm=[0,2,1,3]>(a) k = Constant<value_ints=[0,0,12]>() s = Reshape(p, k)"
        " y = MatMul(s, w4)",
        "float[2,18,3] w1, float[2,18,6] w2, float[2,36] w3, float[12,4] w4",
        inputs="float[7,N,3] x",
        outputs="float[7,N,4] y",
        units={"w2": 6},
    ),
    "rnn": Case(
        "a, b = RNN<hidden_size=6>(x, w1, w2) k = Constant<value_ints=[0]>() s = Squeeze(b, k)"
        " y = MatMul(s, w4)",
        "float[1,6,3] w1, float[1,6,6] w2, float[6,4] w4",
        inputs="float[7,N,3] x",
        outputs="float[N,4] y",
        units={"w2": 6},
    ),
    "quantised": Case(
        "d1 = DequantizeLinear<axis=0>(w1, wpos3, wz4) h = Conv<pads=[1,1,1,1]>(x, d1)"
        " q = QuantizeLinear(h, wpos5, wz6) t = DequantizeLinear(q, wpos5, wz6) y = Conv(t, w2)",
        "int8[8,3,3,3] w1, float[8] wpos3, int8[8] wz4, float wpos5, uint8 wz6, float[4,8,1,1] w2",
        units={"w1": 8},
    ),
    "dynamic-quantised": Case(
        f"{HEAD} q, s, z = DynamicQuantizeLinear(h) t = DequantizeLinear(q, s, z) {TAIL}",
        CONVS,
        units={"w1": 8},
        approximate=True,
    ),
    "conv-integer": Case(
        f"{HEAD} q, s, z = DynamicQuantizeLinear(h) a = ConvInteger(q, w3) b = Cast<to=1>(a)"
        " c = Mul(b, s) y = Conv(c, w2)",
        CONVS + ", uint8[8,8,1,1] w3",
        units={"w1": 8, "w3": 8},
        approximate=True,
    ),
    "matmul-integer": Case(
        "h = MatMul(x, w1) q, s, z = DynamicQuantizeLinear(h) a = MatMulInteger(q, w3)"
        " b = Cast<to=1>(a) c = Mul(b, s) y = MatMul(c, w2)",
        "float[6,8] w1, uint8[8,8] w3, float[8,4] w2",
        inputs="float[N,6] x",
        outputs="float[N,4] y",
        units={"w1": 8, "w3": 8},
        approximate=True,
    ),
    "qlinear-conv": Case(
        f"{HEAD} q = QuantizeLinear(h, wpos5, wz6)"
        " a = QLinearConv(q, wpos5, wz6, w3, wpos7, wz8, wpos5, wz6)"
        " t = DequantizeLinear(a, wpos5, wz6) y = Conv(t, w2)",
        CONVS + ", float wpos5, uint8 wz6, int8[8,8,1,1] w3, float[8] wpos7, int8[8] wz8",
        units={"w1": 8, "w3": 8},
    ),
    "qlinear-matmul": Case(
        "h = MatMul(x, w1) q = QuantizeLinear(h, wpos5, wz6)"
        " a = QLinearMatMul(q, wpos5, wz6, w3, wpos5, wz6, wpos5, wz6)"
        " t = DequantizeLinear(a, wpos5, wz6) y = MatMul(t, w2)",
        "float[6,8] w1, float wpos5, uint8 wz6, uint8[8,8] w3, float[8,4] w2",
        inputs="float[N,6] x",
        outputs="float[N,4] y",
        units={"w1": 8, "w3": 8},
    ),
    "concat": Case(
        "a = Conv(x, w1) b = Conv(x, w3) c = Concat<axis=1>(a, b, a) y = Conv(c, w2)",
        "float[8,3,3,3] w1, float[6,3,3,3] w3, float[4,22,1,1] w2",
        units={"w1": 8, "w3": 6},
    ),
    "concat-with-input": Case(
        "a = Conv<pads=[1,1,1,1]>(x, w1) c = Concat<axis=1>(x, a) y = Conv(c, w2)",
        "float[8,3,3,3] w1, float[4,11,1,1] w2",
        units={"w1": 8},
    ),
    "split": Case(
        "a = Conv(x, w1) b, c = Split<axis=1,num_outputs=2>(a) d = Conv(b, w3) e = Add(d, c)"
        " y = Conv(e, w2)",
        "float[8,3,3,3] w1, float[4,4,1,1] w3, float[4,4,1,1] w2",
        units={"w1": 8, "w3": 4},
    ),
    "slice": between(
        "s = Constant<value_ints=[0]>() m = Constant<value_ints=[5]>()"
        " e = Constant<value_ints=[99]>() k = Constant<value_ints=[1]>()"
        " a = Slice(h, s, m, k) b = Slice(h, m, e, k)"
        " t = Concat<axis=1>(b, a)",
    ),
    "slice-steps": between(
        "s = Constant<value_ints=[0]>() o = Constant<value_ints=[1]>()"
        " e = Constant<value_ints=[99]>() k = Constant<value_ints=[1]>()"
        " two = Constant<value_ints=[2]>() a = Slice(h, s, e, k, two)"
        " b = Slice(h, o, e, k, two) t = Concat<axis=1>(a, b)",
    ),
    "gather-channels": between(
        "i = Constant<value_ints=[7,0,2,-3,4,5,1,6]>() t = Gather<axis=1>(h, i)"
    ),
    "gather-one": between(
        "i = Constant<value_int=3>() a = Gather<axis=1>(h, i) k = Constant<value_ints=[1]>()"
        " b = Unsqueeze(a, k) t = Add(h, b)",
        units={"w1": 7},
    ),
    "embedding": Case(
        "e = Gather(w1, x) a = Relu(e) y = MatMul(a, w2)",
        "float[11,8] w1, float[8,4] w2",
        inputs="int64[N,5] x",
        outputs="float[N,5,4] y",
        units={"w1": 8},
    ),
    "embedding-tied": Case(
        "e = Gather(w1, x) a = MatMul(e, w2) b = Add(a, e) p = Transpose<perm=[1,0]>(w1)"
        " y = MatMul(b, p)",
        "float[11,8] w1, float[8,8] w2",
        inputs="int64[N,5] x",
        outputs="float[N,5,11] y",
        units={"w1": 8, "w2": 8},
    ),
    "transpose-nhwc": between(
        "a = Transpose<perm=[0,2,3,1]>(h) b = Add(a, w3) t = Transpose<perm=[0,3,1,2]>(b)",
        "float[8] w3",
    ),
    "squeeze-unsqueeze": between(
        "k = Constant<value_ints=[2]>() a = Unsqueeze(h, k) b = Relu(a) t = Squeeze(b, k)"
    ),
    "reshape-bakes-channels": Case(
        "h = Conv(x, w1) p = GlobalAveragePool(h) s = Constant<value_ints=[-1,8]>()"
        " f = Reshape(p, s) y = Gemm<transB=1>(f, w2)",
        "float[8,3,3,3] w1, float[4,8] w2",
        outputs="float[N,4] y",
        units={"w1": 8},
    ),
    "reshape-from-shape": Case(
        "h = Conv(x, w1) z = Shape(h) i = Constant<value_ints=[0]>() n = Gather(z, i)"
        " c = Constant<value_ints=[8,-1]>() s = Concat<axis=0>(n, c) f = Reshape(h, s)"
        " p = Transpose<perm=[0,2,1]>(f) y = MatMul(p, w2)",
        "float[8,3,3,3] w1, float[8,4] w2",
        outputs="float[N,36,4] y",
        units={"w1": 8},
    ),
    "scale-from-shape": Case(
        "h = MatMul(x, w1) z = Shape<start=2>(h) f = Cast<to=1>(z) r = Sqrt(f) d = Div(h, r)"
        " y = MatMul(d, w2)",
        "float[6,8] w1, float[8,4] w2",
        inputs="float[N,5,6] x",
        outputs="float[N,5,4] y",
        units={"w1": 8},
    ),
    "channel-shuffle": Case(
        f"{HEAD} s = Constant<value_ints=[0,2,4,8,8]>() a = Reshape(h, s)"
        " b = Transpose<perm=[0,2,1,3,4]>(a) r = Constant<value_ints=[0,8,8,8]>() t = Reshape(b, r)"
        " p, q = Split<axis=1,num_outputs=2>(t) u = Conv(p, w3) v = Conv(q, w2) y = Add(u, v)",
        "float[8,3,3,3] w1, float[4,4,1,1] w3, float[4,4,1,1] w2",
        units={"w1": 8},
    ),
    "expand": Case(
        "h = Conv(x, w1) p = GlobalAveragePool(h) s = Constant<value_ints=[1,8,6,6]>()"
        " e = Expand(p, s) a = Add(h, e) y = Conv(a, w2)",
        CONVS,
        units={"w1": 8},
    ),
    "constant-of-shape": Case(
        "h = Conv(x, w1) z = Shape(h) k = ConstantOfShape<value=float[1] {2.0}>(z) a = Mul(h, k)"
        " y = Conv(a, w2)",
        CONVS,
        units={"w1": 8},
    ),
    "tile": Case(
        "h = Conv(x, w1) r = Constant<value_ints=[1,2,1,1]>() t = Tile(h, r) y = Conv(t, w2)",
        "float[8,3,3,3] w1, float[4,16,1,1] w2",
        units={"w1": 8},
    ),
    "pad-channels": Case(
        "h = Conv<pads=[1,1,1,1]>(x, w1) p = Constant<value_ints=[0,2,0,0,0,2,0,0]>()"
        " a = Pad(h, p) b = Conv<pads=[1,1,1,1]>(h, w3) c = Add(a, b) y = Conv(c, w2)",
        "float[8,3,3,3] w1, float[12,8,3,3] w3, float[4,12,1,1] w2",
        units={"w1": 8, "w3": 12},
    ),
    "pad-pixels": between(
        'p = Constant<value_ints=[0,0,1,1,0,0,1,1]>() t = Pad<mode="reflect">(h, p)'
    ),
    "resize": between(
        "s = Constant<value_floats=[1.0,1.0,2.0,2.0]>() t = Resize(h, , s)",
    ),
    "resize-sizes": Case(
        "h = Conv(x, w1) s = Constant<value_ints=[2,8,12,12]>() t = Resize(h, , , s)"
        " y = Conv(t, w2)",
        CONVS,
        inputs="float[2,3,8,8] x",
        outputs="float[2,4,12,12] y",
        units={"w1": 8},
    ),
    "depth-to-space": Case(
        "h = Conv(x, w1) t = DepthToSpace<blocksize=2>(h) y = Conv(t, w2)",
        "float[8,3,3,3] w1, float[4,2,1,1] w2",
        units={"w1": 2},
    ),
    "depth-to-space-crd": Case(
        'h = Conv(x, w1) t = DepthToSpace<blocksize=2,mode="CRD">(h) y = Conv(t, w2)',
        "float[8,3,3,3] w1, float[4,2,1,1] w2",
        units={"w1": 2},
    ),
    "space-to-depth": Case(
        "h = Conv<pads=[1,1,1,1]>(x, w1) t = SpaceToDepth<blocksize=2>(h) y = Conv(t, w2)",
        "float[8,3,3,3] w1, float[4,32,1,1] w2",
        units={"w1": 8},
    ),
    "attention": Case(
        "q = MatMul(x, w1) k = MatMul(x, w2) v = MatMul(x, w3)"
        " s = Constant<value_ints=[0,0,4,2]>()"
        " q4 = Reshape(q, s) k4 = Reshape(k, s) v4 = Reshape(v, s)"
        " qh = Transpose<perm=[0,2,1,3]>(q4) kh = Transpose<perm=[0,2,3,1]>(k4)"
        " vh = Transpose<perm=[0,2,1,3]>(v4) l = MatMul(qh, kh) p = Softmax<axis=-1>(l)"
        " o = MatMul(p, vh) o4 = Transpose<perm=[0,2,1,3]>(o)"
        " r = Constant<value_ints=[0,0,8]>() o3 = Reshape(o4, r) y = MatMul(o3, w4)",
        "float[6,8] w1, float[6,8] w2, float[6,8] w3, float[8,6] w4",
        inputs="float[N,5,6] x",
        outputs="float[N,5,6] y",
        units={"w1": 4, "w2": 4, "w3": 4, "w4": 0},
    ),
    "pool-beside-channels": Case(  # Funnel: tokens are pooled, channels are the last axis
        "a = MatMul(x, w1) k = Constant<value_ints=[1]>() b = Unsqueeze(a, k)"
        " c = AveragePool<kernel_shape=[2,1],strides=[2,1]>(b) d = Squeeze(c, k) y = MatMul(d, w2)",
        "float[6,8] w1, float[8,4] w2",
        inputs="float[N,6,6] x",
        outputs="float[N,3,4] y",
        units={"w1": 8, "w2": 0},
    ),
    "attention-behind-groups": Case(  # SqueezeBERT: the groups tie all heads, so dims go
        "q = Conv<group=4>(x, w1) k = Conv<group=4>(x, w2) v = Conv<group=4>(x, w3)"
        " s = Constant<value_ints=[0,2,8,-1]>()"
        " qh = Reshape(q, s) kh = Reshape(k, s) vh = Reshape(v, s)"
        " qt = Transpose<perm=[0,1,3,2]>(qh) l = MatMul(qt, kh) p = Softmax<axis=-1>(l)"
        " pt = Transpose<perm=[0,1,3,2]>(p) o = MatMul(vh, pt)"
        " r = Constant<value_ints=[0,16,-1]>() o3 = Reshape(o, r) y = Conv(o3, w4)",
        "float[16,2,1] w1, float[16,2,1] w2, float[16,2,1] w3, float[8,16,1] w4",
        inputs="float[N,8,5] x",
        outputs="float[N,8,5] y",
        units={"w1": 4, "w2": 4, "w3": 4, "w4": 0},
    ),
    "attention-op": Case(
        "q = MatMul(x, w1) k = MatMul(x, w2) v = MatMul(x, w3)"
        " o = Attention<q_num_heads=4,kv_num_heads=2>(q, k, v) y = MatMul(o, w4)",
        "float[6,8] w1, float[6,4] w2, float[6,4] w3, float[8,6] w4",
        inputs="float[N,5,6] x",
        outputs="float[N,5,6] y",
        opset=23,
        units={"w1": 2, "w2": 2, "w3": 2, "w4": 0},
    ),
    "attention-op-4d": Case(
        "q = MatMul(x, w1) k = MatMul(x, w2) v = MatMul(x, w3)"
        " s = Constant<value_ints=[0,0,-1,2]>()"
        " qr = Reshape(q, s) kr = Reshape(k, s) vr = Reshape(v, s)"
        " q4 = Transpose<perm=[0,2,1,3]>(qr) k4 = Transpose<perm=[0,2,1,3]>(kr)"
        " v4 = Transpose<perm=[0,2,1,3]>(vr) o = Attention<is_causal=1>(q4, k4, v4, w5)"
        " p = Transpose<perm=[0,2,1,3]>(o) t = Constant<value_ints=[0,0,-1]>() r = Reshape(p, t)"
        " y = MatMul(r, w4)",
        "float[6,8] w1, float[6,4] w2, float[6,4] w3, float[8,6] w4, float[4,5,5] w5",
        inputs="float[N,5,6] x",
        outputs="float[N,5,6] y",
        opset=23,
        units={"w1": 2, "w2": 2, "w3": 2, "w4": 0},
    ),
    "attention-op-one-key-head": Case(
        "q = MatMul(x, w1) k = MatMul(x, w2) v = MatMul(x, w3)"
        " o = Attention<q_num_heads=4,kv_num_heads=1>(q, k, v) y = MatMul(o, w4)",
        "float[6,8] w1, float[6,2] w2, float[6,2] w3, float[8,6] w4",
        inputs="float[N,5,6] x",
        outputs="float[N,5,6] y",
        opset=23,
        units={"w1": 4, "w2": 0, "w3": 0, "w4": 0},
    ),
    "attention-op-one-head": Case(
        "q = MatMul(x, w1) k = MatMul(x, w2) v = MatMul(x, w3)"
        " o = Attention<q_num_heads=1,kv_num_heads=1>(q, k, v) y = MatMul(o, w4)",
        "float[6,8] w1, float[6,8] w2, float[6,4] w3, float[4,6] w4",
        inputs="float[N,5,6] x",
        outputs="float[N,5,6] y",
        opset=23,
        units={"w1": 8, "w2": 8, "w3": 4, "w4": 0},
    ),
    "attention-op-cached": Case(
        "q = MatMul(x, w1) k = MatMul(x, w2) v = MatMul(x, w3)"
        " o, pk, pv = Attention<q_num_heads=4,kv_num_heads=2>(q, k, v, , ck, cv)"
        " y = MatMul(o, w4)",
        "float[6,8] w1, float[6,4] w2, float[6,4] w3, float[8,6] w4",
        inputs="float[N,5,6] x, float[N,2,3,2] ck, float[N,2,3,2] cv",
        outputs="float[N,5,6] y, float[N,2,8,2] pk, float[N,2,8,2] pv",
        opset=23,
        units={"w1": 0, "w2": 0, "w3": 0, "w4": 0},
    ),
    "rotary-embedding": Case(
        "a = MatMul(x, w1) b = MatMul(x, w2) v = MatMul(x, w3)"
        " q = RotaryEmbedding<num_heads=4>(a, w5, w6)"
        " k = RotaryEmbedding<num_heads=2,interleaved=1>(b, w5, w6)"
        " o = Attention<q_num_heads=4,kv_num_heads=2>(q, k, v) y = MatMul(o, w4)",
        "float[6,16] w1, float[6,8] w2, float[6,8] w3, float[16,6] w4, float[2,5,2] w5,"
        " float[2,5,2] w6",
        inputs="float[2,5,6] x",
        outputs="float[2,5,6] y",
        opset=23,
        units={"w1": 2, "w2": 2, "w3": 2, "w4": 0},
    ),
    "gather-nd": Case(
        "e = GatherND(w1, x) a = Relu(e) y = MatMul(a, w2)",
        "float[11,8] w1, float[8,4] w2",
        inputs="int64[N,5,1] x",
        outputs="float[N,5,4] y",
        units={"w1": 8, "w2": 0},
    ),
    "scatter-nd": Case(
        "a = MatMul(x, w1) b = MatMul(z, w2) s = ScatterND(a, i, b) y = MatMul(s, w3)",
        "float[6,8] w1, float[6,8] w2, float[8,4] w3",
        inputs="float[5,6] x, float[2,6] z, int64[2,1] i",
        outputs="float[5,4] y",
        units={"w1": 8, "w2": 8, "w3": 0},
    ),
    "gather-elements": between(
        "low = Constant<value_float=0.0>() high = Constant<value_float=7.0>()"
        " l = Clip(h, low, high) i = Cast<to=7>(l) t = GatherElements<axis=3>(h, i)",
        units={"w1": 8},
    ),
    "size-and-range": between(
        "n = Size(h) z = Shape<start=2,end=3>(h) k = Constant<value_ints=[0]>() m = Squeeze(z, k)"
        " o = Constant<value_int=0>() i = Constant<value_int=1>() r = Range(o, m, i)"
        " f = Cast<to=1>(r) e = EyeLike(w3) g2 = MatMul(f, e) q = Constant<value_float=0.0>()"
        " u = Cast<to=1>(n) v = Mul(u, q) a = Add(h, g2) t = Add(a, v)",
        "float[8,8] w3",
        units={"w1": 8},
    ),
    "non-zero": between(
        "n = NonZero(w3) f = Cast<to=1>(n) s = ReduceMax<keepdims=0>(f) t = Mul(h, s)",
        "float[3] w3",
    ),
    "unknown-operator": between(
        "a = Det(h) k = Constant<value_ints=[-1]>() b = Unsqueeze(a, k) c = Unsqueeze(b, k)"
        " t = Add(h, c)",
        units={"w1": 0},
    ),
}
