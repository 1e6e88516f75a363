import onnx_ir as ir
import pytest

from onnxslim_kd import model
from onnxslim_kd.passes.cleanup import remove_dead
from onnxslim_kd.passes.fusions import fuse
from tests.same import outputs_differ

HEADER = '<ir_version: 10, opset_import: ["" : {opset}]>\n'
NORM = """m = ReduceMean <axes = [-1], keepdims = 1> (x) d = Sub(x, m) p = Pow(d, two)
    v = ReduceMean <axes = [2], keepdims = 1> (p) e = Add(v, eps) s = Sqrt(e)"""
NUMBERS = """float two = {2}, float eps = {0.001}, float one = {1}, float half = {0.5},
    float root = {1.4142135}, float[4] gamma = {1, 2, 3, 4}, float[1,4] beta = {5, 6, 7, 8}"""
GELU = "a = Div(x, root) b = Erf(a) c = Add(b, one)"
CURVE = """float three = {3}, float k = {0.044715}, float w = {0.7978845}, float one = {1},
    float half = {0.5}"""
FUSED = {
    "layer norm": (17, f"{NORM} n = Div(d, s) a = Mul(n, gamma) y = Add(beta, a)", NUMBERS,
                   ["LayerNormalization"]),
    "layer norm by a product": (17, f"{NORM} r = Reciprocal(s) n = Mul(d, r) a = Mul(gamma, n)"
                                " y = Add(a, beta)", NUMBERS, ["LayerNormalization"]),
    "layer norm alone": (17, f"{NORM} n = Div(d, s) y = Neg(n)", NUMBERS,
                         ["LayerNormalization", "Neg"]),
    "rms norm": (23, "p = Mul(x, x) v = ReduceMean <keepdims = 1> (p, last) e = Add(v, eps)"
                 " s = Sqrt(e) n = Div(x, s) y = Mul(n, gamma)",
                 f"{NUMBERS}, int64[1] last = {{-1}}", ["RMSNormalization"]),
    "gelu": (20, f"{GELU} d = Mul(x, c) y = Mul(d, half)", NUMBERS, ["Gelu"]),
    "gelu, half first": (20, f"{GELU} d = Mul(x, half) y = Mul(d, c)", NUMBERS, ["Gelu"]),
    "gelu, half of the curve": (20, f"{GELU} d = Mul(c, half) y = Mul(x, d)", NUMBERS, ["Gelu"]),
    "gelu by tanh": (20, "p = Pow(x, three) q = Mul(p, k) r = Add(x, q) s = Mul(r, w) t = Tanh(s)"
                     " u = Add(t, one) v = Mul(half, x) y = Mul(v, u)", CURVE, ["Gelu"]),
    "swish": (24, "s = Sigmoid(x) y = Mul(x, s)", NUMBERS, ["Swish"]),
    "quotient": (17, "s = Exp(x) r = Div(one, s) y = Mul(r, x)", NUMBERS, ["Exp", "Div"]),
    "where not": (17, "c = Less(x, eps) n = Not(c) y = Where(n, x, two)", NUMBERS,
                  ["Less", "Where"]),
    "clip behind relu": (17, "r = Relu(x) y = Clip(r, eps, two)", NUMBERS, ["Clip"]),
}  # fmt: skip
KEPT = {
    "opset 16 has no layer norm, 17 no gelu": (17, f"{GELU} d = Mul(x, c) y = Mul(d, half)"),
    "another curve": (20, "a = Div(x, two) b = Erf(a) c = Add(b, one) d = Mul(x, c)"
                      " y = Mul(d, half)"),
    "a value that is read elsewhere": (17, f"{NORM} n = Div(d, s) a = Mul(n, gamma) b = Add(a, s)"
                                       " y = Neg(b)"),
    "a clip that lets negative numbers through": (17, "n = Neg(eps) r = Relu(x) y = Clip(r, n)"),
    "no epsilon": (17, f"{NORM.replace('eps', 'v')} n = Div(d, s) y = Mul(n, gamma)"),
}  # fmt: skip
LAYERS = {
    "matrices": (
        "(float[N,3] x) => (float[N,2] y) <float[3,2] w = {1,2,3,4,5,6}, float[2] b = {7,8}>"
        " { a = MatMul(x, w) y = Add(b, a) }",
        ["Gemm"],
    ),
    "between reshapes": (
        "(float[N,4,3] x) => (float[P,4,2] y) <float[3,2] w = {1,2,3,4,5,6}, float[2] b = {7,8},"
        " int64[3] s = {-1,2,3}, int64[3] t = {0,1,4}> { r = Reshape(x, s) a = MatMul(r, w)"
        " c = Add(a, b) y = Reshape(c, t) }",
        ["Reshape", "Gemm", "Reshape"],
    ),
    "padding": (
        "(float[N,1,5,5] x) => (float[N,1,7,6] y) <float[1,1,1,1] w = {2},"
        " int64[8] p = {0,0,1,0,0,0,1,1}> { a = Pad(x, p) y = Conv(a, w) }",
        ["Conv"],
    ),
}
OTHER_LAYERS = {
    "of three dimensions": "(float[N,4,3] x) => (float[N,4,2] y) <float[3,2] w = {1,2,3,4,5,6},"
    " float[2] b = {7,8}> { a = MatMul(x, w) y = Add(b, a) }",
    "a sum for each row": "(float[2,3] x) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6},"
    " float[2,1] b = {7,8}> { a = MatMul(x, w) y = Add(b, a) }",
    "a padding of ones": "(float[N,1,5,5] x) => (float[N,1,7,7] y) <float[1,1,1,1] w = {2},"
    " int64[8] p = {0,0,1,1,0,0,1,1}, float one = {1}> { a = Pad(x, p, one) y = Conv(a, w) }",
    "channels added": "(float[N,1,5,5] x) => (float[N,1,5,5] y) <float[1,2,1,1] w = {2, 3},"
    " int64[8] p = {0,1,0,0,0,0,0,0}> { a = Pad(x, p) y = Conv(a, w) }",
}


def load(body: str, opset: int = 17) -> ir.Model:
    return model.load(ir.from_onnx_text(HEADER.format(opset=opset) + body))


def with_numbers(body: str, numbers: str) -> str:
    return f"g (float[N,3,4] x) => (float[N,3,4] y) <{numbers}> {{ {body} }}"


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    opset, body, numbers, want = FUSED[name]
    before = load(with_numbers(body, numbers), opset)
    after = before.clone()
    assert fuse(after)
    remove_dead(after)
    assert [node.op_type for node in after.graph] == want
    assert outputs_differ(before, after) is None


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    opset, body = KEPT[name]
    before = load(with_numbers(body, NUMBERS), opset)
    after = before.clone()
    assert not fuse(after)
    assert [n.op_type for n in after.graph] == [n.op_type for n in before.graph]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    body, want = LAYERS[name]
    before = load(f"g {body}")
    after = before.clone()
    assert fuse(after) == 1
    assert [node.op_type for node in after.graph] == want
    assert outputs_differ(before, after) is None


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_other_layers_stay(name: str) -> None:
    assert not fuse(load(f"g {OTHER_LAYERS[name]}"))
