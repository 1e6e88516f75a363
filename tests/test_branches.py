import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxslim_kd import model
from onnxslim_kd.api import prune
from onnxslim_kd.compare import Reference
from onnxslim_kd.passes.branches import inline_branches, read_claims
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.passes.ratios import Amount
from onnxslim_kd.passes.shape_fold import fold_known

HEAD = '<ir_version: 10, opset_import: ["": 21]> g'
BRANCHES = """then_branch =
    a () => (float[M,K] u) <float[1] two = {2.0}> { t = Mul(x, two) u = Abs(t) },
  else_branch = b () => (float[M,K] v) { v = Neg(x) }"""


def load(condition: str, branches: str = BRANCHES, inputs: str = "float[M,4] x") -> ir.Model:
    text = f"""{HEAD} ({inputs}) => (float[M,K] y)
      <int64 zero = {{0}}, int64 one = {{1}}, int64 three = {{3}}, bool yes = {{1}}>
      {{ s = Shape(x) n = Size(s) m = Gather(s, zero) w = Gather(s, one)
        {condition} r = If(c) <{branches}> y = Relu(r) }}"""
    return model.load(onnx.parser.parse_model(text))


def kinds(loaded: ir.Model) -> list[str]:
    return [node.op_type for node in loaded.graph]


@pytest.mark.parametrize(
    ("condition", "then"),
    [
        ("c = Greater(n, one)", True),
        ("c = Less(n, one)", False),
        ("c = GreaterOrEqual(n, three)", False),
        ("c = LessOrEqual(w, three)", False),
        ("d = Equal(n, one) c = Not(d)", True),
        ("c = Identity(yes)", True),
        ("k = Add(m, one) c = Less(m, k)", True),  # for every M
        ("k = Add(m, one) c = GreaterOrEqual(m, k)", False),
    ],
)
def test_the_branch_taken_is_inlined(condition: str, then: bool) -> None:
    loaded = load(condition)
    before = Reference.of(loaded)
    assert inline_branches(loaded) == 1
    assert kinds(loaded) == (["Mul", "Abs", "Relu"] if then else ["Neg", "Relu"])
    assert before.worst(loaded) == 0


@pytest.mark.parametrize("condition", ["c = Greater(m, three)", "j = Cast<to=9>(m) c = Not(j)"])
def test_a_branch_that_depends_on_the_input_stays(condition: str) -> None:
    loaded = load(condition)
    assert inline_branches(loaded) == 0
    assert "If" in kinds(loaded)


def test_names_taken_outside_are_free_again() -> None:
    first, second = (
        f"""then_branch = a{i} () => (float[M,K] u{i}) {{ q = Neg(x) u{i} = Abs(q) }},
            else_branch = b{i} () => (float[M,K] v{i}) {{ q = Abs(x) v{i} = Neg(q) }}"""
        for i in range(2)
    )
    text = f"""{HEAD} (float[M,4] x) => (float[M,K] y, float[M,K] z)
      <bool yes = {{1}}, bool no = {{0}}>
      {{ r = If(yes) <{first}> y = If(no) <{second}> z = Identity(r) }}"""
    loaded = model.load(onnx.parser.parse_model(text))
    before = Reference.of(loaded)
    assert inline_branches(loaded) == 2
    names = [value.name for node in loaded.graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert [value.name for value in loaded.graph.outputs] == ["y", "z"]
    assert before.worst(loaded) == 0


def test_a_branch_within_a_branch() -> None:
    inner = """then_branch = c () => (float[M,K] uu) { p = Exp(x) uu = Abs(p) },
      else_branch = d () => (float[M,K] vv) { vv = Neg(x) }"""
    branches = f"""then_branch = a () => (float[M,K] u) {{
        k = Greater(n, one) u = If(k) <{inner}> }},
      else_branch = b () => (float[M,K] v) {{ v = Neg(x) }}"""
    loaded = load("c = Greater(n, one)", branches)
    before = Reference.of(loaded)
    assert inline_branches(loaded) == 2
    assert kinds(loaded) == ["Exp", "Abs", "Relu"]
    assert before.worst(loaded) == 0


def test_a_known_branch_within_one_that_depends_on_the_input() -> None:
    inner = """then_branch = c () => (float[M,K] uu) { p = Exp(x) uu = Abs(p) },
      else_branch = d () => (float[M,K] vv) { vv = Neg(x) }"""
    branches = f"""then_branch = a () => (float[M,K] u) {{
        k = Greater(n, one) w = If(k) <{inner}> u = Exp(w) }},
      else_branch = b () => (float[M,K] v) {{ v = Neg(x) }}"""
    loaded = load("c = Greater(m, one)", branches)
    before = Reference.of(loaded)
    assert inline_branches(loaded) == 1
    assert {node.op_type for node in loaded.graph.all_nodes()}.isdisjoint({"Size"})
    assert len(list(loaded.graph.all_nodes())) == 9
    assert before.worst(loaded) == 0


RANKS = """then_branch = a () => (float[M,K] u) { u = Squeeze(x, last) },
  else_branch = b () => (float[M,K,L] v) { v = Identity(x) }"""


@pytest.mark.parametrize(
    ("way", "known"),
    [("p = Unsqueeze(r, first)", True), ("q = Abs(x) p = Identity(q)", False)],
)
def test_a_rank_that_both_branches_state(way: str, known: bool) -> None:
    """Which rank comes out of the first If is not known, but what the second one says of it."""
    text = f"""{HEAD} (float[M,K,1] x) => (float[A,B] y)
      <int64[1] last = {{2}}, int64[1] first = {{0}}, int64 two = {{2}}, int64 one = {{1}}> {{
        s = Shape(x) z = Size(x) c = GreaterOrEqual(z, one) r = If(c) <{RANKS}>
        t = Shape(r) n = Size(t) d = Equal(n, two)
        h = If(d) <then_branch = e () => (float[M,4] o) {{ o = Identity(r) }},
                   else_branch = f () => (float[1,M,4] p) {{ {way} }}>
        y = Relu(h) }}"""
    loaded = model.load(onnx.parser.parse_model(text))
    before = Reference.of(loaded)
    read_claims(loaded)
    assert inline_branches(loaded) == known
    assert kinds(loaded).count("If") == 2 - known
    assert before.worst(loaded) == 0


def test_shapes_inside_of_bodies_are_folded_with_what_stands_before_them() -> None:
    branches = """then_branch = a () => (float[M,K] u) {
        i = Shape(x) j = Gather(i, one) f = Cast<to=1>(j) u = Mul(x, f) },
      else_branch = b () => (float[M,K] v) {
        k = Shape(x) l = Gather(k, zero) g = Cast<to=1>(l) v = Mul(x, g) }"""
    loaded = load("o = Shape(x) e = Gather(o, zero) c = Greater(e, three)", branches)
    before = Reference.of(loaded)
    fold_known(loaded)
    common.RemoveUnusedNodesPass()(loaded)
    assert kinds(loaded) == ["Shape", "Gather", "Greater", "If", "Relu"]
    then, other = (branch.value for branch in loaded.graph[3].attributes.values())
    assert [node.op_type for node in then] == ["Cast", "Mul"]
    assert [node.op_type for node in other] == ["Cast", "Mul"]
    assert before.worst(loaded) == 0


def test_what_is_computed_behind_an_if_is_not_used_in_it() -> None:
    text = f"""{HEAD} (float[M,4] x) => (float[M,K] y, int64 z) <int64 zero = {{0}}> {{
        w = Size(x) c = Greater(w, zero)
        y = If(c) <
          then_branch = a () => (float[M,K] u) {{
            i = Shape(x) j = Gather(i, zero) f = Cast<to=1>(j) u = Mul(x, f) }},
          else_branch = b () => (float[M,K] v) {{ v = Neg(x) }}>
        k = Shape(x) l = Gather(k, zero) z = Mul(l, l) }}"""
    loaded = model.load(onnx.parser.parse_model(text))
    before = Reference.of(loaded)
    fold_known(loaded)
    assert before.worst(loaded) == 0


def test_layers_around_a_known_branch_are_pruned() -> None:
    text = f"""{HEAD} (float[N,3,8,8] x) => (float[N,2,8,8] y) <int64 three = {{3}}> {{
      a = Conv(x, w1) s = Shape(a) n = Size(s) c = Greater(n, three)
      b = If(c) <then_branch = t () => (float[N,8,8,8] u) {{ u = Conv(a, w2) }},
                 else_branch = e () => (float[N,8,8,8] v) {{ v = Identity(a) }}>
      y = Conv(b, w3) }}"""
    proto = onnx.parser.parse_model(text)
    for name, shape in {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "w3": (2, 8, 1, 1)}.items():
        array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    done = prune(proto, Choice(".*", 0.5, amount=Amount(1)))
    assert done.after.macs == 64 * (3 * 4 + 4 * 4 + 4 * 2)
    assert done.plan.notes == ("1 If whose condition never changes: the branch taken was inlined",)
