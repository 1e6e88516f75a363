import onnx_ir as ir
import pytest

from onnxslim_kd import model, node_shapes
from onnxslim_kd.passes import symbolic
from onnxslim_kd.passes.cleanup import remove_dead
from onnxslim_kd.passes.gate import size
from onnxslim_kd.passes.shape_fold import fold_known
from onnxslim_kd.passes.shape_known import known
from onnxslim_kd.passes.symbolic import (
    Number,
    add,
    divide,
    divided,
    equal,
    multiply,
    remainder,
    subtract,
)
from onnxslim_kd.shapes import sample
from tests.models import MODELS, build
from tests.same import outputs_differ

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
B, S = symbolic.symbol("b"), symbolic.symbol("s")
NUMBERS = """<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] first = {0},
  int64[1] second = {1}, int64[1] third = {2}, int64[1] minus = {-1}, int64[1] four = {4},
  int64[1] eight = {8}, int64[1] start = {-9223372036854775807}>"""


def load(body: str) -> ir.Model:
    return model.load(ir.from_onnx_text(HEADER + body.replace("{", NUMBERS + " {", 1)))


# ------------------------------------------------------------------------ polynomials


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (divide(multiply(B, 64), 64), B),
        (divide(multiply(multiply(B, 12), S), multiply(S, 4)), multiply(B, 3)),
        (divide(-7, 2), -3),
        (divide(add(B, 1), 0), None),
        (divided(add(B, 1), 0), None),
        (divide(subtract(B, 3), 2), None),  # might be negative
        (divide(B, 3), divide(B, 3)),
        (subtract(add(B, S), B), S),
        (subtract(B, B), 0),
        (remainder(multiply(B, 8), 4), 0),
        (remainder(7, 4), 3),
        (remainder(-7, 4), None),
        (equal(B, -1), False),
        (equal(add(B, 1), B), False),
        (equal(B, 2), None),
        (equal(multiply(B, S), multiply(S, B)), True),
    ],
)
def test_arithmetic(got: Number | None, want: Number | None) -> None:
    assert got == want


def test_what_cannot_be_divided_is_itself_only() -> None:
    third = divide(B, 3)
    assert third is not None
    assert third != divide(S, 3)
    assert multiply(third, 3) != B


# ---------------------------------------------------------------------------- folding

FOLDED = {
    "a reshape that keeps the batch": (
        """g (float[N,2,4] x) => (float[N,8] y) {
          s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, first)
          t = Concat <axis = 0> (u, minus) y = Reshape(x, t) }""",
        ["Reshape"],
    ),
    "a batch that is split and merged": (
        """g (float[N,8,4] x) => (float[N,8,4] y) {
          s = Shape(x) n = Gather(s, zero) k = Mul(n, two) k1 = Unsqueeze(k, first)
          t = Concat <axis = 0> (k1, four, four) a = Reshape(x, t) r = Relu(a)
          rs = Shape(r) m = Gather(rs, zero) h = Div(m, two) h1 = Unsqueeze(h, first)
          q = Concat <axis = 0> (h1, eight, minus) y = Reshape(r, q) }""",
        ["Reshape", "Relu", "Reshape"],
    ),
    "an expand to what is there": (
        """g (float[N,4] x) => (float[N,4] y) {
          s = Shape(x) e = Expand(x, s) y = Relu(e) }""",
        ["Relu"],
    ),
    "a slice of everything": (
        """g (float[N,T] x) => (float[N,T] y) {
          s = Shape(x) n = Gather(s, one) e = Unsqueeze(n, first)
          c = Slice(x, first, e, second) y = Relu(c) }""",
        ["Relu"],
    ),
    "one dimension computed twice": (
        """g (float[N,T] x) => (int64[1] a, int64[1] b) {
          r = Relu(x) s = Shape(x) n = Gather(s, one) p = Shape(r) m = Gather(p, one)
          i = Unsqueeze(n, first) j = Unsqueeze(m, first) a = Mul(i, four) b = Add(j, four) }""",
        ["Shape", "Gather", "Unsqueeze", "Mul", "Add"],
    ),
    "pads that are turned around in two dimensions": (
        """g (float[N,5,4] x) => (float[N,U,V] y) {
          s = Shape(x) n = Gather(s, two) m = Mod(n, two) p = Sub(two, m) u = Unsqueeze(p, first)
          c = Concat <axis = 0> (first, u, first, second, first, first)
          pairs = Concat <axis = 0> (minus, third) a = Reshape(c, pairs)
          b = Slice(a, minus, start, first, minus) t = Transpose <perm = [1, 0]> (b)
          q = Reshape(t, minus) y = Pad(x, q) }""",
        ["Pad"],
    ),
    "a range of a static dimension": (
        """g (float[N,4] x) => (float[N,4] y) {
          s = Shape(x) n = Gather(s, one) r = Range(zero, n, one) t = Unsqueeze(r, second)
          e = Squeeze(t, second) f = Cast <to = 1> (e) y = Mul(x, f) }""",
        ["Cast", "Mul"],
    ),
    "a static dimension": (
        """g (float[N,4] x) => (float[N,4] y) {
          s = Shape(x) n = Gather(s, one) f = Cast <to = 1> (n) y = Mul(x, f) }""",
        ["Cast", "Mul"],
    ),
    "a choice by a comparison that dimensions decide": (
        """g (float[N,1] x) => (float[N,T] y) {
          s = Shape(x) n = Gather(s, first) w = Concat <axis = 0> (n, four)
          q = Equal(w, minus) o = Concat <axis = 0> (second, second)
          t = Where(q, o, w) y = Expand(x, t) }""",
        ["Expand"],
    ),
}
KEPT = {
    "two unknown dimensions": """g (float[N,T,4] x) => (float[P,Q,R] y) {
      s = Shape(x) n = Gather(s, first) t = Gather(s, second)
      a = Concat <axis = 0> (t, n, four) y = Reshape(x, a) }""",
    "a slice of a part": """g (float[N,T] x) => (float[N,U] y) {
      s = Shape(x) n = Gather(s, second) e = Sub(n, second)
      y = Slice(x, first, e, second) }""",
    "a slice backwards": """g (float[N,T] x) => (float[N,U] y) {
      c = Slice(x, minus, start, second, minus) y = Relu(c) }""",
    "a range": """g (float[N,T] x) => (int64[U] y) {
      s = Shape(x) n = Gather(s, one) m = Sub(n, two) y = Range(zero, m, one) }""",
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    body, want = FOLDED[name]
    before = load(body)
    after = before.clone()
    assert fold_known(after)
    remove_dead(after)
    assert [node.op_type for node in after.graph] == want
    assert outputs_differ(before, after) is None
    assert not fold_known(after)


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    before = load(KEPT[name])
    after = before.clone()
    fold_known(after)
    remove_dead(after)
    assert size(after) == size(before)
    assert outputs_differ(before, after) is None


@pytest.mark.parametrize("name", MODELS)
def test_what_is_known_is_true(name: str) -> None:
    """Compare with the exact shapes and numbers for two choices of the dynamic dimensions."""
    loaded = build(MODELS[name])
    found = known(loaded)
    for variant in (0, 1):
        exact = sample(loaded, variant=variant)
        values = _dimensions(loaded, exact.inputs)
        for value, shape in found.shape.items():
            for number, true in zip(shape, exact.of(value) or (), strict=False):
                assert _evaluate(number, values) in (None, true), value.name
        for value, numbers in found.number.items():
            if value in exact.number:
                flat = exact.number[value].reshape(-1).tolist()
                for number, true in zip(numbers.reshape(-1), flat, strict=True):
                    assert _evaluate(number, values) in (None, true), value.name


def _dimensions(loaded: ir.Model, shapes) -> dict[str, int]:
    return {
        f"'{dim.value}'": size
        for value in loaded.graph.inputs
        for dim, size in zip(value.shape or (), shapes[value.name], strict=True)
        if not isinstance(dim, int) and dim.value is not None
    }


def _evaluate(number: Number, values: dict[str, int]) -> int | None:
    if isinstance(number, int):
        return number
    total = 0
    for symbols, factor in number.terms:
        if any(name not in values for name in symbols):
            return None
        for name in symbols:
            factor *= values[name]
        total += factor
    return total


def test_dimensions_that_a_reshape_keeps_of_the_unknown_are_unknown() -> None:
    loaded = load("""g (float[N,T,4] x) => (int64[1] y) {
      z = Unheard(x) t = Constant <value_ints = [0, 0, -1]> () r = Reshape(z, t)
      s = Shape(r) n = Gather(s, first) y = Mul(n, four) }""")
    assert fold_known(loaded) == 0


@pytest.mark.parametrize("name", MODELS)
def test_rules_give_the_shapes_that_onnx_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build(MODELS[name])
    for node in graph.graph:
        for value in node.outputs:
            value.shape = None
    by_rule = sample(graph).shape
    monkeypatch.setattr(node_shapes, "RULES", {})
    by_onnx = sample(graph).shape
    assert by_onnx.items() <= by_rule.items()


@pytest.mark.parametrize(
    ("call", "want"),
    [
        ("Conv <pads = [1, 0, 2, 1], strides = [2, 3], dilations = [1, 2]> (x, w)", (2, 4, 6, 2)),
        ("Conv (x, long)", (2, 4, 0, 7)),
        ("MaxPool <kernel_shape = [2, 2], ceil_mode = 1> (x)", (2, 3, 10, 8)),
        (
            "AveragePool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 1, 0, 0]> (x)",
            (2, 3, 5, 5),
        ),
        ("Unsqueeze (x, both)", (2, 1, 3, 11, 9, 1)),
        ("Slice (x, low, high, axes)", (2, 3, 4, 8)),
    ],
)
def test_shape_of_a_window(
    call: str, want: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""g (float[2,3,11,9] x, float[4,3,3,3] w, float[4,3,12,3] long) => (float[A] y)
      <int64[2] both = {{1, -1}}, int64[2] low = {{-5, 1}}, int64[2] high = {{-1, 99}},
       int64[2] axes = {{2, -1}}> {{ y = {call} }}"""
    graph = model.load(ir.from_onnx_text(HEADER + text))
    output = graph.graph.outputs[0]
    output.shape = None
    assert sample(graph).shape[output] == want
    monkeypatch.setattr(node_shapes, "RULES", {})
    assert sample(graph).shape[output] == want
