import onnx_ir as ir
import pytest

from onnxslim_kd import model
from onnxslim_kd.passes.constants import fold_constants
from tests.same import outputs_differ

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
WEIGHT = "{" + ", ".join(str(i / 7) for i in range(400)) + "}"
FOLDED = {
    "small": (
        """g (float[N,2] x) => (float[N,2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}>
        { c = Add(a, b) d = Sqrt(c) y = Mul(x, d) }""",
        ["Mul"],
    ),
    "a weight that nothing else reads": (
        f"""g (float[N,20] x) => (float[N,20] y) <float[20,20] w = {WEIGHT}>
        {{ t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }}""",
        ["MatMul"],
    ),
    "in a branch": (
        """g (float[N,2] x, bool c) => (float[N,2] y) <float[2] a = {1, 2}> {
        b = Neg(a)
        y = If(c) <then_branch = t () => (float[N,2] p) { q = Exp(b) p = Mul(x, q) },
                   else_branch = e () => (float[N,2] r) { r = Neg(x) }> }""",
        ["If", "Mul", "Neg"],
    ),
    "whole numbers": (
        f"""g (float[N,20] x) => (float[N,20] y) <float[20,20] w = {WEIGHT}>
        {{ d = Neg(x) a = Sign(w) b = Floor(a) y = MatMul(d, b) }}""",
        ["Neg", "Cast", "MatMul"],
    ),
    "whole numbers that would make a large one": (
        f"""g (float[N,20,20,20] x) => (float[N,20,20,20] y) <float[20,20] w = {WEIGHT},
          int64[1] first = {{0}}, int64[1] second = {{1}}>
        {{ s = Sign(w) a = Unsqueeze(s, first) b = Unsqueeze(s, second) d = Sub(a, b)
          y = Mul(x, d) }}""",
        ["Cast", "Cast", "Sub", "Mul"],
    ),
}
KEPT = {
    "a weight that another layer reads": f"""g (float[N,20] x) => (float[N,20] y)
        <float[20,20] w = {WEIGHT}>
        {{ t = Transpose <perm = [1, 0]> (w) a = MatMul(x, w) y = MatMul(a, t) }}""",
    "an input that has a default": """g (float[N,2] x, float[2] a) => (float[N,2] y)
        { b = Neg(a) y = Mul(x, b) }""",
    "random numbers": """g (float[N,2] x) => (float[N,2] y) <float[2] a = {1, 2}>
        { b = RandomNormalLike(a) y = Mul(x, b) }""",
    "quantised weights": """g (float[N,2] x) => (float[N,2] y) <int8[2] a = {1, 2}, float s = {0.5}>
        { b = DequantizeLinear(a, s) y = Mul(x, b) }""",
    "an output": """g (float[N,2] x) => (float[N,2] y, float[2] b) <float[2] a = {1, 2}>
        { b = Neg(a) y = Neg(x) }""",
    "what would be gigabytes": """g (float[N,1,1] x) => (float[N,40000,40000] y)
        <int64[2] s = {40000, 40000}>
        { a = ConstantOfShape <value = float[1] {2.0}> (s) y = Mul(x, a) }""",
}


def load(body: str) -> ir.Model:
    return model.load(ir.from_onnx_text(HEADER + body))


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    body, want = FOLDED[name]
    before = load(body)
    after = before.clone()
    assert fold_constants(after)
    assert not fold_constants(after)
    assert [node.op_type for node in after.graph.all_nodes()] == want
    assert outputs_differ(before, after) is None
    assert model.weight_bytes(after) <= max(model.weight_bytes(before), model.SMALL)


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    before = load(KEPT[name])
    after = before.clone()
    assert not fold_constants(after)
    assert len(after.graph) == len(before.graph)
