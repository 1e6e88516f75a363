import numpy as np
import onnx_ir as ir
import pytest

from onnxslim_kd import compare, model
from onnxslim_kd.compare import Reference, difference, sample_shapes
from onnxslim_kd.errors import ProofError, UserError
from onnxslim_kd.passes.strip import infer_prune
from onnxslim_kd.shapes import choose_inputs
from tests.same import outputs_differ

RELU = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, H, W] x, float[N, 8] z) => (float[N, 3, H, W] y) { y = Relu(x) }"""
BRANCH = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x, int64 rate) => (float[N, 4] y)
<int64 known = {16000}> {
  same = Equal(rate, known)
  y = If(same) <
    then_branch = a () => (float[N, 4] t) { t = Neg(x) },
    else_branch = b () => (float[N, 4] e) { e = Identity(x) }
  >
}"""
PICKY = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, T] x) => (float[N, 32] y)
<int64[2] shape = {-1, 32}, int64[1] twice = {0}> {
  n = Shape <start = 0, end = 1> (x)
  rest = Constant <value_ints = [32]> ()
  whole = Concat <axis = 0> (n, rest)
  y = Reshape(x, whole)
}"""


def load(text: str) -> ir.Model:
    return model.load(ir.from_onnx_text(text))


def test_equal_symbols_get_equal_numbers_and_variants_differ() -> None:
    shapes = sample_shapes(load(RELU))
    assert shapes == [{"x": (2, 3, 64, 64), "z": (2, 8)}, {"x": (3, 3, 32, 32), "z": (3, 8)}]


def test_given_shapes_win_and_are_checked() -> None:
    assert sample_shapes(load(RELU), 1, {"x": (5, 3, 8, 8)})[0]["x"] == (5, 3, 8, 8)
    with pytest.raises(UserError, match=r"--input x: \[5, 4, 8, 8\] does not fit"):
        sample_shapes(load(RELU), 1, {"x": (5, 4, 8, 8)})


def test_a_given_shape_decides_for_inputs_before_and_behind_it() -> None:
    body = "{ y = Concat<axis = 1>(a, b, c) }"
    two = load(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 3] a, float[N, 4] b, float[N, 5] c) => (float[N, 12] y) {body}""")
    found = {"a": (7, 3), "b": (7, 4), "c": (7, 5)}
    assert choose_inputs(two, {"b": (7, 4)}, 0) == found
    assert Reference.of(two, given={"b": (7, 4)}).shapes == [found]
    with pytest.raises(UserError, match=r"--input b: \[0, 4\] does not fit the model's \[N, 4\]"):
        choose_inputs(two, {"b": (0, 4)}, 0)


def test_an_input_of_unknown_rank_takes_any_shape() -> None:
    free = load("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[] x) => (float[] y) { y = Relu(x) }""")
    assert Reference.of(free, given={"x": (2, 3)}).shapes == [{"x": (2, 3)}]


def test_shapes_that_the_model_refuses_are_passed_over() -> None:
    assert [s["x"] for s in Reference.of(load(PICKY)).shapes] == [(3, 32)]


def test_both_branches_of_a_switch_are_run() -> None:
    reference = Reference.of(load(BRANCH))
    assert [int(feed["rate"]) == 16000 for feed in reference.feeds] == [False, True]
    broken = load(BRANCH.replace("Neg(x)", "Abs(x)"))
    assert reference.differs(broken) is not None


def test_a_model_that_runs_with_no_input_is_reported() -> None:
    text = PICKY.replace("value_ints = [32]", "value_ints = [7]").replace("32]", "7]")
    with pytest.raises(ProofError, match=r"give one with --input NAME=1x3x224x224"):
        Reference.of(load(text))


def test_the_same_model_does_not_differ_and_another_does() -> None:
    assert outputs_differ(load(RELU), load(RELU)) is None
    other = load(RELU.replace("Relu(x)", "LeakyRelu(x)"))
    assert "outputs differ by" in str(outputs_differ(load(RELU), other))


@pytest.mark.parametrize(
    ("want", "got", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), r"output y is float64\[3, 2\], not float64\[2, 3\]"),
        (np.zeros(2), np.zeros(2, np.float32), "is float32"),
        (np.array([1, 2]), np.array([1, 3]), "1 values differ"),
        (np.array([1.0, np.nan]), np.array([np.nan, 1.0]), "NaN or infinity stands elsewhere"),
        (np.array([np.inf]), np.array([-np.inf]), "NaN or infinity stands elsewhere"),
    ],
)
def test_what_has_no_magnitude_is_refused(want, got, message) -> None:
    with pytest.raises(ProofError, match=message):
        difference("y", want, got)


def test_sequences_are_compared_part_by_part() -> None:
    want = [np.ones(2), np.full(3, 100.0)]
    assert difference("y", want, [np.ones(2), np.full(3, 101.0)]) == pytest.approx(0.01)
    assert difference("y", [{"a": 1.0, "b": 0.5}], [{"a": 1.0, "b": 0.4}]) == pytest.approx(0.1)
    for got in ([np.ones(2)], np.ones(2), [np.ones(2), np.ones(2)]):
        with pytest.raises(ProofError, match="output y"):
            difference("y", want, got)
    with pytest.raises(ProofError, match=r"output y\[0\] has other keys"):
        difference("y", [{"a": 1.0}], [{"b": 1.0}])


def test_a_model_that_gives_a_sequence() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4,6] x) => (seq(float[]) s, float[4,6] y)
    { y = Identity(x) a = Relu(x) s = SplitToSequence <axis = 0> (a) }"""
    stripped = infer_prune(ir.from_onnx_text(text))
    assert stripped.proof is not None
    wrong = load(text.replace("Relu(x)", "LeakyRelu(x)"))
    assert "outputs differ by" in str(Reference.of(load(text)).differs(wrong))


def test_difference_is_relative_to_the_largest_magnitude() -> None:
    want = np.array([100.0, 0.0, np.nan])
    assert difference("y", want, want + 1) == pytest.approx(0.01)
    assert compare.TOLERANCE < 0.01


def test_a_large_weight_that_nothing_reads_does_not_stop_the_runtime() -> None:
    relu = load(RELU)
    model.new_initializer(relu.graph, "spare", np.zeros(1000, np.float32))
    assert Reference.of(relu).worst(relu) == 0
