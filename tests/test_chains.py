import onnx_ir as ir
import pytest

from onnxslim_kd import model
from onnxslim_kd.passes.chains import join_chains
from tests.same import outputs_differ

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
JOINED = {
    "reshapes": (
        """g (float[N,4,8] x) => (float[N,32] y) <int64[3] s = {0, 8, 4}, int64[2] t = {0, -1}>
        { a = Reshape(x, s) y = Reshape(a, t) }""",
        ["Reshape"],
    ),
    "a reshape that copies what the first one computes": (
        """g (float[N,4,8] x) => (float[P,32] y) <int64[4] s = {-1, 2, 2, 8},
          int64[3] t = {0, 2, 16}, int64[2] u = {0, 32}>
        { a = Reshape(x, s) b = Reshape(a, t) y = Reshape(b, u) }""",
        ["Reshape"],
    ),
    "a reshape behind a flatten": (
        """g (float[N,4,8] x) => (float[8,P] y) <int64[2] t = {8, -1}>
        { a = Flatten(x) y = Reshape(a, t) }""",
        ["Reshape"],
    ),
    "unsqueezes": (
        """g (float[N,4] x) => (float[1,N,1,4,1] y) <int64[1] a = {1}, int64[2] b = {0, -1}>
        { c = Unsqueeze(x, a) y = Unsqueeze(c, b) }""",
        ["Unsqueeze"],
    ),
    "there and back": (
        """g (float[N,4] x) => (float[N,4] y) <int64[2] a = {1, 2}, int64[2] b = {2, 1}>
        { c = Unsqueeze(x, a) d = Squeeze(c, b) y = Relu(d) }""",
        ["Relu"],
    ),
    "concats": (
        """g (float[N,4] x) => (float[N,Q] y) {
        n = Neg(x) a = Concat <axis = 1> (n, x) b = Concat <axis = 1> (x, a, n)
        y = Concat <axis = 1> (b, x) }""",
        ["Neg", "Concat"],
    ),
    "relus": (
        "g (float[N,4] x) => (float[N,4] y) { a = Relu(x) b = Relu(a) y = Relu(b) }",
        ["Relu"],
    ),
    "factors": (
        """g (float[N,4] x) => (float[N,4] y) <float a = {2.5}, float[4] b = {1, 2, 3, 4}>
        { c = Mul(a, x) y = Mul(b, c) }""",
        ["Mul"],
    ),
    "summands": (
        """g (float[N,4] x) => (float[N,4] y) <float a = {2.5}, float[4] b = {1, 2, 3, 4}>
        { c = Add(x, a) y = Add(c, b) }""",
        ["Add"],
    ),
    "transposes": (
        """g (float[N,4,8] x) => (float[8,N,4] y)
        { a = Transpose <perm = [2, 1, 0]> (x) y = Transpose <perm = [0, 2, 1]> (a) }""",
        ["Transpose"],
    ),
    "transposes there and back": (
        """g (float[N,4,8] x) => (float[N,4,8] y)
        { a = Transpose <perm = [1, 2, 0]> (x) b = Transpose <perm = [2, 0, 1]> (a) y = Neg(b) }""",
        ["Neg"],
    ),
    "transposes around a sum": (
        """g (float[N,4,8] x, float[N,4,8] z) => (float[N,4,8] y, float[4,8,N] w)
        { a = Transpose <perm = [1, 2, 0]> (x) b = Transpose <perm = [1, 2, 0]> (z) w = Neg(a)
          c = Add(a, b) d = Transpose <perm = [2, 0, 1]> (c) y = Neg(d) }""",
        ["Transpose", "Neg", "Add", "Neg"],
    ),
}
KEPT = {
    "a reshape that copies what the first one made": """g (float[N,4,8] x) => (float[P,Q] y)
        <int64[3] s = {-1, 8, 4}, int64[2] t = {0, -1}> { a = Reshape(x, s) y = Reshape(a, t) }""",
    "a value that is read twice": """g (float[N,4] x) => (float[N,4] y, float[N,4] z)
        { a = Relu(x) y = Relu(a) z = Neg(a) }""",
    "a value that is an output": """g (float[N,4] x) => (float[N,4] y, float[N,4] a)
        { a = Relu(x) y = Relu(a) }""",
    "squeezed elsewhere": """g (float[1,4] x) => (float[4,1] y) <int64[1] a = {2}, int64[1] b = {0}>
        { c = Unsqueeze(x, a) y = Squeeze(c, b) }""",
    "concats along two axes": """g (float[2,2] x) => (float[4,4] y)
        { a = Concat <axis = 0> (x, x) b = Concat <axis = 0> (x, x)
          y = Concat <axis = 1> (a, b) }""",
    "a sum of transposes that are needed": """g (float[N,4,8] x, float[N,4,8] z)
        => (float[N,4,8] y, float[4,8,N] v, float[4,8,N] w)
        { a = Transpose <perm = [1, 2, 0]> (x) b = Transpose <perm = [1, 2, 0]> (z) v = Neg(a)
          w = Neg(b) c = Add(a, b) d = Transpose <perm = [2, 0, 1]> (c) y = Neg(d) }""",
    "factors that overflow": """g (float[N,4] x) => (float[N,4] y)
        <float a = {1e30}, float b = {1e-30}, float c = {1e30}>
        { s = Mul(x, b) t = Neg(s) u = Mul(t, a) y = Mul(u, c) }""",
    "a constant that would grow": """g (float[N,4] x) => (float[2,N,4] y)
        <float[2,1,1] a = {1, 2}, float[4] b = {1, 2, 3, 4}> { c = Mul(x, a) y = Mul(c, b) }""",
}


def load(body: str) -> ir.Model:
    return model.load(ir.from_onnx_text(HEADER + body))


@pytest.mark.parametrize("name", JOINED)
def test_joined(name: str) -> None:
    body, want = JOINED[name]
    before = load(body)
    after = before.clone()
    assert join_chains(after)
    assert [node.op_type for node in after.graph] == want
    assert outputs_differ(before, after) is None


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    before = load(KEPT[name])
    after = before.clone()
    assert not join_chains(after)
    assert len(after.graph) == len(before.graph)
