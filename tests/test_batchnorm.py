import numpy as np
import onnx_ir as ir
import pytest
from test_fold import filled

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.batchnorm import bare_convolutions, channel_statistics, fold, reinsert
from onnxslim_kd.runtime import Session
from tests.same import outputs_differ

NET = """g (float[N,3,8,8] x, float[4,3,3,3] w, float[4] b, float[6,4,3,3] v, float[2,6,1,1] h)
    => (float[N,2,8,8] y) {
        c = Conv <pads = [1,1,1,1]> (x, w, b)  r = Relu(c)
        d = Conv <pads = [1,1,1,1]> (r, v)     s = Relu(d)
        y = Conv(s, h)
    }"""
GATE = """g (float[N,4,8,8] x, float[4,4,1,1] w) => (float[N,4,8,8] y) {
        p = GlobalAveragePool(x)  c = Conv(p, w)  s = Sigmoid(c)  y = Mul(x, s) }"""
PATCHES = """g (float[N,3,8,8] x, float[4,3,2,2] w, int64[3] s, float[4] a)
    => (float[N,16,4] y) {
        c = Conv <strides = [2,2]> (x, w)  z = Shape(c)
        r = Reshape(c, s)  t = Transpose <perm = [0,2,1]> (r)
        y = LayerNormalization(t, a, a)
    }"""
CONVNEXT = """g (float[N,4,8,8] x, float[4,1,3,3] w, float[4] a, float[4,4,2,2] v, float[4,4,1,1] u)
    => (float[N,4,2,2] y) {
        c = Conv <group = 4> (x, w)  t = Transpose <perm = [0,2,3,1]> (c)
        n = LayerNormalization(t, a, a)  b = Transpose <perm = [0,3,1,2]> (n)
        d = Conv <strides = [2,2]> (b, v)  g = Relu(d)
        y = Conv <pads = [0,0,-1,-1]> (g, u)
    }"""
DECOMPOSED = """g (float[N,4,8,8] x, float[4,4,1,1] w) => (float[N,4,8,8] y) {
        c = Conv(x, w)  m = ReduceMean <axes = [1]> (c)  y = Sub(c, m) }"""


def batches(sizes: tuple[int, ...] = (8, 3, 5)) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((n, 3, 8, 8), np.float32) + i} for i, n in enumerate(sizes)]


def test_heads_and_gates_are_not_normalised() -> None:
    assert bare_convolutions(filled(NET)) == ["c", "d"]
    assert bare_convolutions(filled(GATE)) == []


DETECTION = """g (float[N,4,8,8] x, float[4,4,1,1] w, float[2,4,1,1] v, int64[3] s)
    => (float[N,6,64] y) {
        c = Conv(x, w)  d = Conv(x, v)  t = Concat <axis = 1> (c, d)  y = Reshape(t, s) }"""


@pytest.mark.parametrize("net", [PATCHES, CONVNEXT, DECOMPOSED, DETECTION])
def test_neighbours_of_other_normalisations_are_not_normalised(net: str) -> None:
    assert bare_convolutions(filled(net)) == []


@pytest.mark.parametrize("opset", [17, 18])
def test_statistics_equal_those_of_all_batches_at_once(opset: int) -> None:
    net = filled(NET)
    net.graph.opset_imports[""] = opset
    found = channel_statistics(net, ["c", "d"], batches())
    everything = net.clone()
    for node in everything.graph:
        if node.outputs[0].name in ("c", "d"):
            everything.graph.outputs.append(node.outputs[0])
    got = Session(everything).run({"x": np.concatenate([b["x"] for b in batches()])})
    for name in ("c", "d"):
        np.testing.assert_allclose(found[name][0], got[name].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name][1], got[name].std((0, 2, 3)), rtol=1e-4)
    assert [value.name for value in net.graph.outputs] == ["y"]


def test_reinserting_changes_no_output_and_folds_back() -> None:
    net = filled(NET)
    changed = net.clone()
    assert reinsert(changed, channel_statistics(net, ["c", "d"], batches())) == ["c", "d"]
    assert [n.op_type for n in changed.graph].count("BatchNormalization") == 2
    assert bare_convolutions(changed) == []
    assert outputs_differ(net, changed, tolerance=1e-5) is None
    assert fold(changed) == 2
    assert [n.op_type for n in changed.graph] == [n.op_type for n in net.graph]
    assert outputs_differ(net, changed, tolerance=1e-5) is None


def test_a_changed_net_gets_the_distribution_of_the_original() -> None:
    net, changed = filled(NET), filled(NET)
    wanted = channel_statistics(net, ["c"], batches())
    weight = changed.graph.initializers["w"]
    weight.const_value = ir.Tensor(weight.const_value.numpy() * 3 + 0.1)
    reinsert(changed, wanted, channel_statistics(changed, ["c"], batches()))
    got = channel_statistics(changed, ["c.normalised"], batches())["c.normalised"]
    np.testing.assert_allclose(got[0], wanted["c"][0], atol=1e-4)
    np.testing.assert_allclose(got[1], wanted["c"][1], rtol=1e-4)


def test_a_dead_channel_keeps_a_gamma_that_can_learn() -> None:
    net = filled(NET)
    reinsert(net, {"c": (np.zeros(4), np.zeros(4))})
    assert net.graph.initializers["c.bn_scale"].const_value.numpy().min() > 0


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="for 3 channels, the model has 4; take the rows that"):
        reinsert(filled(NET), {"c": (np.zeros(3), np.ones(3))})
    ones = (np.zeros(4), np.ones(4))
    with pytest.raises(UserError, match="running statistics of c are missing"):
        reinsert(filled(NET), {"c": ones}, {})


def test_statistics_need_batches_and_known_values() -> None:
    with pytest.raises(UserError, match="at least one batch"):
        channel_statistics(filled(NET), ["c"], [])
    with pytest.raises(UserError, match="nowhere is not a value of this model"):
        channel_statistics(filled(NET), ["nowhere"], batches())
