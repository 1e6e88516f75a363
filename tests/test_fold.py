import numpy as np
import onnx_ir as ir
import pytest

from onnxslim_kd import model
from onnxslim_kd.passes.fold import fold, fold_scales
from tests.same import outputs_differ

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
BN = "scale, bias, mean, var"
FOUR = "float[4] scale, float[4] bias, float[4] mean, float[4] var"
FOLDED = {
    "conv": f"""g (float[N,3,8,8] x, float[4,3,3,3] w, float[4] b, {FOUR})
        => (float[N,4,6,6] y)
        {{ c = Conv(x, w, b)  y = BatchNormalization <epsilon = 0.1> (c, {BN}) }}""",
    "conv without bias": f"""g (float[N,3,8,8] x, float[4,3,3,3] w, {FOUR})
        => (float[N,4,4,4] y)
        {{ c = Conv <strides = [2,2], pads = [1,1,1,1]> (x, w)
           y = BatchNormalization(c, {BN}) }}""",
    "grouped conv": f"""g (float[N,4,8,8] x, float[4,2,3,3] w, {FOUR})
        => (float[N,4,6,6] y)
        {{ c = Conv <group = 2> (x, w)  d = BatchNormalization(c, {BN})  y = Relu(d) }}""",
    "transposed": f"""g (float[N,6,5,5] x, float[6,4,2,2] w, float[4] b, {FOUR})
        => (float[N,4,6,6] y)
        {{ c = ConvTranspose(x, w, b)  y = BatchNormalization(c, {BN}) }}""",
    "grouped transposed": f"""g (float[N,6,5,5] x, float[6,2,2,2] w, {FOUR})
        => (float[N,4,6,6] y)
        {{ c = ConvTranspose <group = 2> (x, w)  y = BatchNormalization(c, {BN}) }}""",
    "gemm": f"""g (float[N,3] x, float[3,4] w, float[4] b, {FOUR})
        => (float[N,4] y)
        {{ c = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)  y = BatchNormalization(c, {BN}) }}""",
    "gemm by rows": f"""g (float[N,3] x, float[4,3] w, {FOUR})
        => (float[N,4] y)
        {{ c = Gemm <transB = 1> (x, w)  y = BatchNormalization(c, {BN}) }}""",
    "matmul": f"""g (float[N,3] x, float[3,4] w, {FOUR})
        => (float[N,4] y)
        {{ c = MatMul(x, w)  y = BatchNormalization(c, {BN}) }}""",
    "matmul add": f"""g (float[N,3] x, float[3,4] w, float[1,4] b, {FOUR})
        => (float[N,4] y)
        {{ c = MatMul(x, w)  d = Add(b, c)  y = BatchNormalization(d, {BN}) }}""",
    "before conv": f"""g (float[N,4,8,8] x, float[6,2,3,3] w, float[6] b, {FOUR})
        => (float[N,6,6,6] y)
        {{ c = BatchNormalization(x, {BN})  y = Conv <group = 2> (c, w, b) }}""",
    "shared weight": f"""g (float[N,3,8,8] x, float[4,3,1,1] w, {FOUR})
        => (float[N,4,8,8] y)
        {{ c = Conv(x, w)  d = BatchNormalization(c, {BN})  e = Conv(x, w)  y = Sub(d, e) }}""",
    "inside a branch": f"""g (float[N,3,8,8] x, bool on, float[4,3,1,1] w, {FOUR})
        => (float[N,4,8,8] y)
        {{ y = If(on) <
            then_branch = a () => (float[N,4,8,8] t)
                {{ c = Conv(x, w)  t = BatchNormalization(c, {BN}) }},
            else_branch = b () => (float[N,4,8,8] e) {{ e = Conv(x, w) }}
        > }}""",
}
KEPT = {
    "padding": f"""g (float[N,4,8,8] x, float[4,4,3,3] w, {FOUR})
        => (float[N,4,8,8] y)
        {{ c = BatchNormalization(x, {BN})  y = Conv <pads = [1,1,1,1]> (c, w) }}""",
    "seen elsewhere": f"""g (float[N,3,8,8] x, float[4,3,1,1] w, {FOUR})
        => (float[N,4,8,8] y)
        {{ c = Conv(x, w)  d = BatchNormalization(c, {BN})  y = Add(c, d) }}""",
    "graph output": f"""g (float[N,3,8,8] x, float[4,3,1,1] w, {FOUR})
        => (float[N,4,8,8] y, float[N,4,8,8] c)
        {{ c = Conv(x, w)  y = BatchNormalization(c, {BN}) }}""",
    "three axes": f"""g (float[N,4,3] x, float[3,5] w, {FOUR})
        => (float[N,4,5] y)
        {{ c = MatMul(x, w)  y = BatchNormalization(c, {BN}) }}""",
    "training": f"""g (float[2,3,8,8] x, float[4,3,1,1] w, {FOUR})
        => (float[2,4,8,8] y)
        {{ c = Conv(x, w)  y, m, v = BatchNormalization <training_mode = 1> (c, {BN}) }}""",
    "a row bias behind a matmul": f"""g (float[4,3] x, float[3,4] w, float[4,1] b, {FOUR})
        => (float[4,4] y)
        {{ c = MatMul(x, w)  d = Add(c, b)  y = BatchNormalization(d, {BN}) }}""",
    "a row bias": f"""g (float[2,3] x, float[3,4] w, float[2,1] b, {FOUR})
        => (float[2,4] y)
        {{ c = Gemm(x, w, b)  y = BatchNormalization(c, {BN}) }}""",
}


def filled(text: str) -> ir.Model:
    """Parse ``text`` and turn the inputs that are not x or bool into random initializers."""
    parsed = ir.from_onnx_text(f"{HEADER} {text}")
    rng = np.random.default_rng(0)
    for value in list(parsed.graph.inputs):
        if value.name != "x" and value.dtype == ir.DataType.FLOAT:
            array = rng.standard_normal(value.shape.numpy()).astype(np.float32)
            parsed.graph.inputs.remove(value)
            value.const_value = ir.Tensor(np.abs(array) + 0.5 if value.name == "var" else array)
            parsed.graph.register_initializer(value)
    return model.load(parsed)


def count(loaded: ir.Model, op: str) -> int:
    return sum(node.op_type == op for node in loaded.graph.all_nodes())


@pytest.mark.parametrize("name", FOLDED)
def test_folding_changes_no_output(name: str) -> None:
    before = filled(FOLDED[name])
    after = before.clone()
    assert fold(after) == 1
    assert count(after, "BatchNormalization") == 0
    assert [v.name for v in after.graph.outputs] == ["y"]
    assert outputs_differ(before, after, tolerance=1e-6) is None
    assert fold(after) == 0


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_folded_stays(name: str) -> None:
    loaded = filled(KEPT[name])
    assert fold(loaded) == 0
    assert count(loaded, "BatchNormalization") == 1


def test_no_node_is_added_behind_a_matmul_that_has_a_bias() -> None:
    loaded = filled(FOLDED["matmul add"])
    fold(loaded)
    assert [node.op_type for node in loaded.graph] == ["MatMul", "Add"]


SCALED = {
    "conv": "c = Conv(x, w, b)  d = Mul(c, column)  y = Add(row, d)",
    "conv without bias": "c = Conv(x, w)  y = Mul(c, column)",
    "transposed": "c = ConvTranspose(x, w)  y = Add(c, column)",
    "batch norm": "c = BatchNormalization(x, b, b, b, var)  d = Mul(c, column)  y = Add(d, row)",
    "one number for all": "c = Conv(x, w)  y = Mul(c, one)",
}
NOT_SCALED = {
    "a number for each pixel": "c = Conv(x, w)  y = Mul(c, line)",
    "seen elsewhere": "c = Conv(x, w)  d = Mul(c, column)  y = Add(c, d)",
    "computed": "c = Conv(x, w)  y = Mul(c, x)",
    "training": "c, m, v = BatchNormalization <training_mode = 1> (x, b, b, b, var)"
    " y = Mul(c, one)",
}
SCALE = """g (float[2,4,4,4] x, float[4,4,1,1] w, float[4] b, float[4] var, float[4,1,1] column,
    float[1,4,1,1] row, float[4] line, float[1] one) => (float[2,4,4,4] y) {{ {body} }}"""


@pytest.mark.parametrize("name", SCALED)
def test_factors_and_sums_of_channels_are_folded(name: str) -> None:
    before = filled(SCALE.format(body=SCALED[name]))
    after = before.clone()
    assert fold_scales(after) == len(before.graph) - 1
    assert len(after.graph) == 1
    assert outputs_differ(before, after, tolerance=1e-6) is None


@pytest.mark.parametrize("name", NOT_SCALED)
def test_other_factors_stay(name: str) -> None:
    loaded = filled(SCALE.format(body=NOT_SCALED[name]))
    assert fold_scales(loaded) == 0
