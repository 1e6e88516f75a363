import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from lowering_run import feeds_of, run_ort

from onnxslim_kd.training.lowering import lower

RNG = np.random.default_rng(0)
GELU = "d = {scaled} e = Erf(d) a = Add(e, one) "
X = {"x": (2, 3, 4)}
QKV = {"q": (2, 4, 5, 8), "k": (2, 4, 8, 6), "v": (2, 4, 6, 8)}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "one": 1.0,
    "half": 0.5,
    "root2": np.sqrt(2),
    "rroot2": np.sqrt(0.5),
    "three": 3.0,
    "zero": 0.0,
    "six": 6.0,
    "sixth": 1 / 6,
    "eighth": 8**-0.5,
    "fourth": 8**-0.25,
    "w": normal(4, 6),
    "turned": normal(6, 4),
    "b": normal(6),
    "mask": np.triu(np.full((5, 6), -np.inf), 2),
    "none": np.zeros((5, 6)),
}
FUSED = {
    "gelu: half last": (GELU + "h = Mul(x, a) y = Mul(h, half)", "Div(x, root2)", X),
    "gelu: half first": (GELU + "h = Mul(half, x) y = Mul(h, a)", "Mul(x, rroot2)", X),
    "gelu: half of gate": (GELU + "h = Mul(a, half) y = Mul(x, h)", "Mul(rroot2, x)", X),
    "silu": ("s = Sigmoid(x) y = Mul(s, x)", "", X),
    "hardswish: divided": (
        "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
        "",
        X,
    ),
    "hardswish: scaled": (
        "a = Add(three, x) c = Clip(a, zero, six) m = Mul(c, sixth) y = Mul(x, m)",
        "",
        X,
    ),
    "linear": ("m = MatMul(x, w) y = Add(b, m)", "", X),
    "linear: as torch holds it": (
        "t = Transpose<perm=[1, 0]>(turned) m = MatMul(x, t) y = Add(m, b)",
        "",
        X,
    ),
    "attention": ("s = MatMul(q, k) p = Softmax(s) y = MatMul(p, v)", "", QKV),
    "attention: scaled": (
        "s = MatMul(q, k) t = Mul(s, eighth) p = Softmax(t) y = MatMul(p, v)",
        "",
        QKV,
    ),
    "attention: masked": (
        "s = MatMul(q, k) t = Mul(s, eighth) m = Add(t, mask) p = Softmax<axis=3>(m)"
        " y = MatMul(p, v)",
        "",
        QKV,
    ),
    "attention: as torch exports it": (
        """a = Mul(q, fourth) c = Mul(k, fourth) s = MatMul(a, c) m = Add(s, none) p = Softmax(m)
        n = IsNaN(p) o = Where(n, zero, p) y = MatMul(o, v)""",
        "",
        QKV,
    ),
}
LEFT = {
    "another constant": (GELU + "h = Mul(x, a) y = Mul(h, one)", "Div(x, root2)", X),
    "another scale": (GELU + "h = Mul(x, a) y = Mul(h, half)", "Div(x, three)", X),
    "another gate": ("s = Sigmoid(x) t = Tanh(x) y = Mul(s, t)", "", X),
    "a square beside": ("u = Mul(x, x) y = Mul(u, x)", "", X),
    "another clip": (
        "a = Add(x, three) c = Clip(a, zero, three) m = Mul(x, c) y = Div(m, six)",
        "",
        X,
    ),
    "another axis": ("s = MatMul(q, k) p = Softmax<axis=2>(s) y = MatMul(p, v)", "", QKV),
    "bias of one": ("m = MatMul(x, w) y = Add(one, m)", "", X),
}


def build(body, scaled, shapes):
    inputs = ", ".join(f"float{list(shape)} {name}" for name, shape in shapes.items())
    text = f'<ir_version: 9, opset_import: ["":18]> g ({inputs}) => (y) {{ {body} }}'
    proto = onnx.parser.parse_model(text.replace("{scaled}", scaled))
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        array = np.asarray(CONSTANTS[name], np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def kernels(lowered):
    return [node for node in lowered._graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("case", FUSED)
def test_fused_equals_onnxruntime_and_the_parts(case):
    model = build(*FUSED[case])
    parts = [value.name for node in model.graph for value in node.outputs]
    whole, taken = lower(model), lower(model, outputs=parts)
    assert len(kernels(whole)) == 1
    assert len(kernels(taken)) == len(model.graph)
    feeds = {name: normal(*shape) for name, shape in FUSED[case][2].items()}
    (expected,) = run_ort(model, feeds, ["y"])
    gradients = []
    for lowered in (whole, taken):
        given = {name: tensor.requires_grad_() for name, tensor in feeds_of(feeds).items()}
        y = lowered(given, ["y"])["y"]
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
        y.square().sum().backward()
        gradients.append([tensor.grad for tensor in (*given.values(), *lowered.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("case", LEFT)
def test_what_only_looks_alike_is_left_alone(case):
    model = build(*LEFT[case])
    lowered = lower(model)
    assert len(kernels(lowered)) == len(model.graph)
    feeds = {name: normal(*shape) for name, shape in LEFT[case][2].items()}
    (expected,) = run_ort(model, feeds, ["y"])
    with torch.no_grad():
        y = lowered(feeds_of(feeds))["y"]
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_square_is_not_lost_beside_a_silu():
    model = build(
        "u = Mul(x, x) s = Sigmoid(z) t = Mul(z, s) y = Mul(u, t)", "", {**X, "z": (2, 3, 4)}
    )
    feeds = {"x": normal(2, 3, 4), "z": normal(2, 3, 4)}
    (expected,) = run_ort(model, feeds, ["y"])
    np.testing.assert_allclose(lower(model)(feeds_of(feeds))["y"], expected, rtol=1e-5, atol=1e-6)
