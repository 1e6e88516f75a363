import onnx_ir as ir
import pytest

from onnxslim_kd import model
from onnxslim_kd.passes.cleanup import STEPS, remove_identities, share_equals
from onnxslim_kd.passes.gate import size
from onnxslim_kd.passes.simplify import fuse_hard_swish, merge_slices, unflatten_softmax
from tests.same import outputs_differ

HEADER = '<ir_version: 8, opset_import: ["" : {opset}]>\n'
IDENTITIES = {
    "in the middle": ("[N,4] x) => (float[N,4] y) { a = Neg(x) b = Identity(a) y = Relu(b) }", 1),
    "before the output": ("[N,4] x) => (float[N,4] y) { a = Neg(x) y = Identity(a) }", 1),
    "of an input": ("[N,4] x) => (float[N,4] y) { y = Identity(x) }", 0),
    "of an output": (
        "[N,4] x) => (float[N,4] y, float[N,4] z) { y = Neg(x) z = Identity(y) }",
        0,
    ),
    "dropout": ("[N,4] x) => (float[N,4] y) { a = Neg(x) b = Dropout(a) y = Relu(b) }", 1),
    "seen mask": ("[N,4] x) => (float[N,4] y, bool[N,4] m) { y, m = Dropout(x) }", 0),
    "concat of one": ("[N,4] x) => (float[N,4] y) { a = Concat <axis = 1> (x) y = Relu(a) }", 1),
    "flatten of a matrix": ("[N,4] x) => (float[N,4] y) { a = Flatten(x) y = Relu(a) }", 1),
    "cast to the same": ("[N,4] x) => (float[N,4] y) { a = Cast <to = 1> (x) y = Relu(a) }", 1),
    "cast": ("[N,4] x) => (int64[N,4] y) { a = Cast <to = 7> (x) y = Neg(a) }", 0),
    "transpose to the same": (
        "[N,4] x) => (float[N,4] y) { a = Transpose <perm = [0, 1]> (x) y = Relu(a) }",
        1,
    ),
    "sum of one": ("[N,4] x) => (float[N,4] y) { a = Sum(x) b = Max(a) y = Relu(b) }", 2),
    "times 1 plus 0": (
        "[N,4] x) => (float[N,4] y) <float one = {1}, float[1] zero = {0}>"
        "{ a = Mul(one, x) b = Add(a, zero) c = Sub(b, zero) d = Div(c, one) y = Relu(d) }",
        4,
    ),
    "0 minus": (
        "[N,4] x) => (float[N,4] y) <float one = {1}, float zero = {0}>"
        "{ a = Sub(zero, x) b = Div(one, a) y = Relu(b) }",
        0,
    ),
    "times 1 that adds a dimension": (
        "[N] x) => (float[1,N] y) <float[1,1] one = {1}> { a = Mul(x, one) y = Relu(a) }",
        0,
    ),
    "pad by nothing": (
        "[N,4] x) => (float[N,4] y) <int64[4] p = {0, 0, 0, 0}> { a = Pad(x, p) y = Relu(a) }",
        1,
    ),
    "slice of everything": (
        "[N,4] x) => (float[N,4] y) <int64[1] z = {0}, int64[1] e = {9223372036854775807}>"
        "{ a = Slice(x, z, e, z) y = Relu(a) }",
        1,
    ),
    "slice backwards": (
        "[N,4] x) => (float[N,P] y) <int64[1] z = {0}, int64[1] e = {9223372036854775807},"
        " int64[1] one = {1}, int64[1] back = {-1}> { a = Slice(x, z, e, one, back) y = Relu(a) }",
        0,
    ),
    "flatten of an image": ("[N,4,2] x) => (float[N,8] y) { a = Flatten(x) y = Relu(a) }", 0),
}
TRAINING = """g (float[N,4] x) => (float[N,4] y) {
  r = Constant <value_float = 0.5> () t = Constant <value = bool {1}> ()
  a = Dropout(x, r, t) y = Relu(a)
}"""
OUTER_VALUE = """g (float[N,4] x, bool on) => (float[N,4] y) {
  a = Neg(x)
  y = If(on) <
    then_branch = t () => (float[N,4] p) { p = Identity(a) },
    else_branch = e () => (float[N,4] q) {
      b = Abs(a)
      q = If(on) <
        then_branch = tt () => (float[N,4] r) { r = Identity(b) },
        else_branch = ee () => (float[N,4] s) { c = Identity(b) s = Relu(c) }
      >
    }
  >
}"""
SLICES = """g (float[N,6,8] x) => (float[N,P,Q] y)
<int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] big = {{9999}}> {{
  a = Slice(x, one, big, {first})
  y = Slice(a, two, big, {second})
}}"""


def load(body: str, opset: int = 17) -> ir.Model:
    return model.load(ir.from_onnx_text(HEADER.format(opset=opset) + body))


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    body, removed = IDENTITIES[name]
    before = load(f"g (float{body}")
    after = before.clone()
    remove_identities(after)
    assert size(before) - size(after) == removed
    assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.outputs]
    assert outputs_differ(before, after) is None


def test_a_users_operator_is_not_taken_for_onnxs() -> None:
    net = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>'
        " g (float[N,4] x) => (float[N,4] y) { a = my.Mul(x) y = Relu(a) }"
    )
    remove_identities(net)
    assert [node.op_type for node in net.graph] == ["Mul", "Relu"]


def test_dropout_in_training_stays() -> None:
    loaded = load(TRAINING)
    remove_identities(loaded)
    assert size(loaded) == 2


def test_identity_of_an_outer_value_in_nested_branches_stays() -> None:
    before = load(OUTER_VALUE)
    after = before.clone()
    remove_identities(after)
    assert size(before) - size(after) == 1
    assert outputs_differ(before, after) is None


def test_slices_on_different_axes_are_one() -> None:
    before = load(SLICES.format(first="one", second="two"))
    after = before.clone()
    assert merge_slices(after) == 1
    assert size(after) == 1
    assert outputs_differ(before, after) is None


def test_slices_on_one_axis_stay() -> None:
    assert merge_slices(load(SLICES.format(first="one", second="one"))) == 0


HARD_SWISH = """g (float[N,4] x) => (float[N,4] y)
<float three = {{3.0}}, float zero = {{0.0}}, float six = {{{six}}}> {{ {body} }}"""


@pytest.mark.parametrize(
    ("body", "six", "fused"),
    [
        ("s = HardSigmoid <alpha = 0.16666667> (x) y = Mul(s, x)", 6.0, 1),
        ("s = HardSigmoid(x) y = Mul(x, s)", 6.0, 0),
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)", 6.0, 1),
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(c, x) y = Div(m, six)", 6.0, 1),
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)", 5.0, 0),
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(a, c) y = Div(m, six)", 6.0, 0),
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) d = Div(m, six) y = Add(d, c)",
         6.0, 0),
    ],
)  # fmt: skip
def test_hard_swish(body: str, six: float, fused: int) -> None:
    before = load(HARD_SWISH.format(body=body, six=six))
    after = before.clone()
    assert fuse_hard_swish(after) == fused
    assert size(after) == (1 if fused else size(before))
    assert outputs_differ(before, after, tolerance=1e-6) is None


def test_a_pattern_does_not_reach_out_of_a_body() -> None:
    net = load(
        """g (float[N,4] x, bool on) => (float[N,4] y) {
          gate = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)
          y = If(on) <
            then_branch = t () => (float[N,4] p) { p = Mul(x, gate) },
            else_branch = e () => (float[N,4] q) { q = Relu(x) }
          >
        }"""
    )
    assert fuse_hard_swish(net) == 0
    assert [node.op_type for node in net.graph] == ["HardSigmoid", "If"]


@pytest.mark.parametrize(("shape", "found"), [("N,5,1,1", 1), ("N,5,2,1", 0)])
def test_converted_softmax_is_one_node_where_it_is_one(shape: str, found: int) -> None:
    body = f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Softmax <axis = 1> (x) }}"
    before = load(body, opset=11)
    assert size(before) == 4
    after = before.clone()
    assert unflatten_softmax(after) == found
    assert outputs_differ(before, after) is None


def test_equal_weights_are_held_once() -> None:
    weight = "{" + ", ".join(["0.5"] * 300) + "}"
    before = load(
        f"g (float[N,300] x) => (float[N,300] y)"
        f"<float[300] uu = {weight}, float[300] v = {weight}> {{ a = Mul(x, uu) y = Div(a, v) }}"
    )
    share_equals(before)
    assert list(before.graph.initializers) == ["v"]


def test_a_second_round_changes_nothing() -> None:
    done = load(OUTER_VALUE)
    for step in STEPS:
        step.apply(done)
    before = size(done)
    for step in STEPS:
        step.apply(done)
    assert size(done) == before
