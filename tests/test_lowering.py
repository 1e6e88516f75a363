import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from lowering_run import feeds_of, run_ort

from onnxslim_kd.errors import ModelError, NotFoundError, UserError
from onnxslim_kd.training.lowering import lower
from onnxslim_kd.training.weights import roles_of, trainable_parameters, untie

RNG = np.random.default_rng(0)


def parse(body, inputs, outputs, opset=18, **arrays):
    text = f'<ir_version: 9, opset_import: ["":{opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def linear():
    return parse(
        "h = MatMul(x, w) a = Add(h, b) y = Relu(a)",
        "float[N,3] x",
        "float[N,4] y",
        w=normal(3, 4),
        b=normal(4),
    )


def norm(momentum=0.9, **more):
    return parse(
        f"y = BatchNormalization<momentum={momentum}>(x, scale, bias, mean, var)",
        "float[N,3,5] x",
        "float[N,3,5] y",
        scale=normal(3),
        bias=normal(3),
        mean=np.zeros(3, np.float32),
        var=np.ones(3, np.float32),
        **more,
    )


# ------------------------------------------------------------------ names, feeds, outputs


def test_parameters_keep_initializer_names():
    model = linear()
    model.graph.initializers["w"].name = "layer.0/weight:0"
    lowered = lower(model)
    assert set(lowered.parameters_by_name) == {"layer.0/weight:0", "b"}
    assert {id(p) for p in lowered.parameters()} == {
        id(p) for p in lowered.parameters_by_name.values()
    }


def test_names_that_differ_only_in_punctuation_stay_apart():
    model = parse(
        "h = Mul(x, w) y = Add(h, b)", "float[2] x", "float[2] y", w=normal(2), b=normal(2)
    )
    model.graph.initializers["w"].name, model.graph.initializers["b"].name = "a.b", "a/b"
    lowered = lower(model, trainable=["a.b", "a/b"])
    x = torch.ones(2)
    expected = lowered.parameters_by_name["a.b"] + lowered.parameters_by_name["a/b"]
    torch.testing.assert_close(lowered({"x": x})["y"], expected)


@pytest.mark.parametrize("name", ["train", "half", "ops", "outputs", "self", "x", "1.weight"])
def test_any_name_may_be_that_of_a_weight_or_a_node(name):
    model = norm()
    model.graph.initializers["scale"].name = model.graph[0].name = name
    lowered = lower(model)
    assert set(lowered.parameters_by_name) == {name, "bias"}
    assert set(lowered.modal_nodes()) == {name}
    if name != "x":
        assert lowered({"x": torch.ones(2, 3, 5)})["y"].shape == (2, 3, 5)


def test_what_does_not_train_is_a_buffer():
    lowered = lower(linear(), trainable=["b"])
    assert list(lowered.parameters_by_name) == ["b"]
    assert list(lowered.buffers_by_name) == ["w"]


def test_outputs_can_be_any_values_and_cost_nothing_else():
    lowered = lower(linear(), outputs=["h", "y"])
    assert set(lowered({"x": torch.ones(2, 3)})) == {"h", "y"}
    assert set(lowered({"x": torch.ones(2, 3)}, ["h"])) == {"h"}
    assert "relu" not in lowered._programs[("h",)].module.code


def test_an_unused_input_need_not_be_fed():
    model = parse("y = Relu(x) u = Add(y, z)", "float[2] x, float[2] z", "float[2] y, float[2] u")
    lowered = lower(model)
    assert lowered({"x": torch.ones(2)}, ["y"])["y"].tolist() == [1, 1]
    with pytest.raises(UserError, match=r"input 'z' is missing among the feeds \['x'\]"):
        lowered({"x": torch.ones(2)})


def test_unknown_names_are_refused_with_near_misses():
    with pytest.raises(NotFoundError, match="'hh' is no value of the graph; near misses: h"):
        lower(linear(), outputs=["hh"])
    with pytest.raises(NotFoundError, match="'ww' is no initializer of the model; near misses: w"):
        lower(linear(), trainable=["ww"])
    with pytest.raises(NotFoundError, match="output 'h' was not chosen when lowering"):
        lower(linear())({"x": torch.ones(2, 3)}, ["h"])


def test_an_integer_cannot_be_trained():
    model = parse("y = Reshape(x, s)", "float[2,3] x", "float[6] y", s=np.array([6]))
    with pytest.raises(ModelError, match="initializer s has type INT64"):
        lower(model, trainable=["s"])


def test_all_unknown_operators_are_listed_at_once():
    model = parse(
        "a, n = StringSplit(t) b = Det(x) c = Multinomial(x) d = Multinomial(x)",
        "float[2,2] x, string[2] t",
        "string[2,2] a, int32[2,1] c, int32[2,1] d",
        opset=20,
    )
    with pytest.raises(ModelError) as error:
        lower(model)
    assert str(error.value) == (
        "operators that cannot be trained: Multinomial (2 nodes, first Multinomial_2);"
        " StringSplit (StringSplit_0); freeze or replace that part"
    )


def test_loop_is_refused_by_name():
    body = """y = Loop(n, c, x) <body = b (int64 i, bool k, float[2] s) => (bool o, float[2] t)
        { o = Identity(k) t = Add(s, s) }>"""
    model = parse(body, "float[2] x, int64 n, bool c", "float[2] y")
    with pytest.raises(ModelError, match=r"cannot be trained: Loop \(Loop_0\)"):
        lower(model)


def test_other_domains_are_named():
    model = parse("y = Relu(x)", "float[2] x", "float[2] y")
    model.graph[0].domain = "com.microsoft"
    with pytest.raises(ModelError, match=r"com.microsoft.Relu \(Relu_0\)"):
        lower(model)


def test_only_what_outputs_need_must_be_known():
    body = "y = Relu(x) c = Multinomial(x)"
    model = parse(body, "float[2,2] x", "float[2,2] y, int32[2,1] c")
    assert lower(model, outputs=["y"])({"x": -torch.ones(2, 2)})["y"].sum() == 0


# ----------------------------------------------------------------------------- training


def test_training_moves_only_what_trains():
    lowered = lower(linear(), trainable=["w"])
    optimizer = torch.optim.SGD(lowered.parameters(), 0.1)
    before = {k: v.clone() for k, v in lowered.buffers_by_name.items()}
    lowered({"x": torch.ones(2, 3)})["y"].sum().backward()
    optimizer.step()
    model = linear()
    held = {k: v.const_value.numpy().copy() for k, v in model.graph.initializers.items()}
    lowered.write_back(model)
    after = {k: v.const_value.numpy() for k, v in model.graph.initializers.items()}
    assert (after["w"] == lowered.parameters_by_name["w"].detach().numpy()).all()
    assert (after["b"] == held["b"]).all()
    torch.testing.assert_close(dict(lowered.buffers_by_name), before)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "bfloat16"])
def test_write_back_keeps_the_type(dtype):
    model = parse("y = Mul(x, w)", "float[2] x", "float[2] y")
    kind = ir.DataType.BFLOAT16 if dtype == "bfloat16" else ir.DataType.from_numpy(np.dtype(dtype))
    tensor = ir.Tensor(np.array([1.5, 2.5], dtype=kind.numpy()), dtype=kind, name="w")
    model.graph.initializers["w"] = ir.Value(name="w", const_value=tensor)
    model.graph[0].replace_input_with(1, model.graph.initializers["w"])
    lowered = lower(model, trainable=["w"])
    with torch.no_grad():
        lowered.parameters_by_name["w"].mul_(2)
    lowered.float().write_back(model)
    written = model.graph.initializers["w"].const_value
    assert written.dtype == kind
    assert written.numpy().astype(np.float32).tolist() == [3, 5]


def test_write_back_refuses_another_model():
    lowered = lower(linear())
    other = parse("y = MatMul(x, w)", "float[N,3] x", "float[N,5] y", w=normal(3, 5))
    with pytest.raises(ModelError, match=r"initializer w has shape \[3, 4\] here and \[3, 5\]"):
        lowered.write_back(other)
    del other.graph.initializers["w"]
    with pytest.raises(ModelError, match="initializer w is not in the model"):
        lowered.write_back(other)


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_batch_normalization_follows_onnx(momentum):
    lowered = lower(norm(momentum)).train()
    x = torch.randn(4, 3, 5) * 3 + 1
    y = lowered({"x": x})["y"]
    mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    scale, bias = (lowered.parameters_by_name[k].reshape(-1, 1) for k in ("scale", "bias"))
    normed = (x - mean.reshape(-1, 1)) / torch.sqrt(var.reshape(-1, 1) + 1e-5)
    torch.testing.assert_close(y, normed * scale + bias)
    torch.testing.assert_close(lowered.buffers_by_name["mean"], (1 - momentum) * mean)
    torch.testing.assert_close(
        lowered.buffers_by_name["var"], momentum + (1 - momentum) * var, rtol=1e-5, atol=1e-5
    )


def test_training_mode_1_has_its_statistics_as_outputs():
    model = parse(
        "y, m, v = BatchNormalization<training_mode=1>(x, scale, bias, mean, var)",
        "float[4,3,5] x",
        "float[4,3,5] y, float[3] m, float[3] v",
        **{k: np.ones(3, np.float32) for k in ("scale", "bias", "mean", "var")},
    )
    lowered = lower(model).train()
    found = lowered({"x": torch.randn(4, 3, 5) + 2})
    torch.testing.assert_close(found["m"], lowered.buffers_by_name["mean"])
    torch.testing.assert_close(found["v"], lowered.buffers_by_name["var"])
    assert found["m"].mean() > 1.05
    torch.testing.assert_close(found["y"].mean((0, 2)), torch.ones(3))


def test_frozen_statistics_do_not_drift():
    lowered = lower(norm())
    lowered.freeze_statistics(["BatchNormalization_0"])
    x = torch.randn(4, 3, 5) + 3
    still = lowered({"x": x})["y"]
    torch.testing.assert_close(lowered.train()({"x": x})["y"], still)
    assert lowered.buffers_by_name["mean"].tolist() == [0, 0, 0]
    with pytest.raises(NotFoundError, match="'BatchNormalization_1' is no node with a training"):
        lowered.freeze_statistics(["BatchNormalization_1"])


def test_running_statistics_are_written_back():
    model = norm()
    lowered = lower(model).train()
    lowered({"x": torch.randn(4, 3, 5) + 3})
    lowered.write_back(model)
    written = model.graph.initializers["mean"].const_value.numpy()
    assert (written == lowered.buffers_by_name["mean"].numpy()).all()
    assert (written > 0.1).all()


def test_shared_statistics_are_refused_until_untied():
    model = parse(
        """a = BatchNormalization(x, s0, bias, mean, var)
        y = BatchNormalization(a, s1, bias, mean, var)""",
        "float[N,3] x",
        "float[N,3] y",
        **{k: np.ones(3, np.float32) for k in ("s0", "s1", "bias", "mean", "var")},
    )
    with pytest.raises(ModelError, match="statistics mean are shared by BatchNormalization_0, Bat"):
        lower(model)
    lower(model, trainable=[])
    assert sorted(untie(model)) == ["bias_1", "mean_1", "var_1"]
    assert untie(model) == []
    assert set(lower(model).parameters_by_name) == {"s0", "s1", "bias", "bias_1"}


def test_dropout_drops_in_training_only():
    model = parse("y = Dropout(x, r)", "float[1000] x", "float[1000] y", r=np.float32(0.25))
    lowered = lower(model)
    x = torch.ones(1000)
    assert lowered({"x": x})["y"].equal(x)
    torch.manual_seed(0)
    dropped = lowered.train()({"x": x})["y"]
    assert 150 < (dropped == 0).sum() < 350
    torch.testing.assert_close(dropped[dropped > 0].mean(), torch.tensor(4 / 3))
    lowered.freeze_statistics()
    assert lowered.train()({"x": x})["y"].equal(x)


def test_quantisation_lets_the_gradient_pass():
    body = "q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = Mul(x, d)"
    scale, zero = np.float32(0.1), np.int8(0)
    model = parse(
        body, "float[3] x", "float[3] y", w=np.float32([0.31, -0.52, 90]), s=scale, z=zero
    )
    lowered = lower(model, trainable=["w"])
    y = lowered({"x": torch.tensor([1.0, 2, 3])})["y"]
    torch.testing.assert_close(y, torch.tensor([0.3, -1.0, 38.1]))
    y.sum().backward()
    assert lowered.parameters_by_name["w"].grad.tolist() == [1, 2, 0]


def test_the_first_value_that_is_not_finite_is_named():
    model = parse("a = Log(x) y = Mul(a, w)", "float[2] x", "float[2] y", w=np.ones(2, np.float32))
    lowered = lower(model)
    assert lowered.first_nonfinite({"x": torch.ones(2)}) is None
    assert lowered.first_nonfinite({"x": -torch.ones(2)}) == "a"


def test_a_copy_is_independent():
    lowered = lower(norm()).train()
    lowered({"x": torch.randn(4, 3, 5)})
    twin = copy.deepcopy(lowered)
    before = {name: buffer.clone() for name, buffer in lowered.buffers_by_name.items()}
    twin({"x": torch.randn(4, 3, 5)})
    twin.eval()
    torch.testing.assert_close(dict(lowered.buffers_by_name), before)
    assert all(node.training for node in lowered.modal_nodes().values())


def test_autocast_runs_products_in_bfloat16():
    lowered = lower(linear(), outputs=["h", "y"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lowered({"x": torch.ones(2, 3)}, ["h"])
    assert found["h"].dtype == torch.bfloat16


def test_looking_for_what_is_not_finite_leaves_statistics_alone():
    lowered = lower(norm()).train()
    assert lowered.first_nonfinite({"x": torch.randn(4, 3, 5)}) is None
    assert lowered.buffers_by_name["mean"].tolist() == [0, 0, 0]


# ----------------------------------------------------------------- constants and shapes


def test_constants_are_folded_once():
    body = "t = Transpose<perm=[1,0]>(w) s = Mul(t, two) y = MatMul(x, s)"
    two = np.float32(2)
    model = parse(body, "float[N,3] x", "float[N,4] y", w=normal(4, 3), two=two)
    frozen, trained = lower(model, trainable=[]), lower(model, trainable=["w"])
    assert list(frozen.buffers_by_name) == ["s"]
    x = torch.randn(2, 3)
    torch.testing.assert_close(frozen({"x": x})["y"], trained({"x": x})["y"])
    assert frozen._programs[("y",)].module.code.count("=") < 5


def test_shape_arithmetic_stays_off_the_device():
    body = """s = Shape(x) n = Gather(s, zero) m = Unsqueeze(n, axis) t = Concat<axis=0>(m, rest)
        r = Reshape(x, t) c = Cast<to=1>(n) y = Div(r, c)"""
    model = parse(
        body,
        "float[N,3,4] x",
        "float[N,12] y",
        zero=np.array(0),
        axis=np.array([0]),
        rest=np.array([-1]),
    )
    lowered = lower(model)
    lowered.to("meta")  # stands in for a device: a computation that reads it back fails there
    assert lowered({"x": torch.ones(5, 3, 4, device="meta")})["y"].shape == (5, 12)


def test_a_batch_size_other_than_the_declared_one_runs():
    model = parse("y = Flatten(x)", "float[1,3,4] x", "float[1,12] y")
    assert lower(model)({"x": torch.ones(7, 3, 4)})["y"].shape == (7, 12)


# ----------------------------------------------------------------------------------- If


BRANCHES = """y = If(c) <
    then_branch = t () => (float[2,3] a) { h = MatMul(x, w) a = Add(h, b) },
    else_branch = e () => (float[2,3] d) { g = Relu(x) d = Mul(g, b) }>"""


def branching(**arrays):
    inputs = "float[2,3] x" if arrays else "float[2,3] x, bool c"
    return parse(BRANCHES, inputs, "float[2,3] y", w=normal(3, 3), b=normal(3), **arrays)


@pytest.mark.parametrize("condition", [True, False])
def test_if_on_a_constant_disappears(condition):
    model = branching(c=np.array(condition))
    feeds = {"x": normal(2, 3)}
    lowered = lower(model)
    (expected,) = run_ort(model, feeds, ["y"])
    torch.testing.assert_close(lowered(feeds_of(feeds))["y"].detach().numpy(), expected)
    assert len(lowered.ops) == 0


@pytest.mark.parametrize("condition", [True, False])
def test_if_on_an_input_runs_one_branch(condition):
    model = branching()
    feeds = {"x": normal(2, 3), "c": np.array(condition)}
    lowered = lower(model)
    (expected,) = run_ort(model, feeds, ["y"])
    y = lowered(feeds_of(feeds))["y"]
    torch.testing.assert_close(y.detach().numpy(), expected)
    y.sum().backward()
    assert (lowered.parameters_by_name["w"].grad is not None) == condition
    assert lowered.parameters_by_name["b"].grad is not None


def test_branches_may_use_one_name_for_two_constants():
    body = """y = If(c) <
        then_branch = t () => (float[2] a) <float[2] k = {1.0, 2.0}> { a = Mul(x, k) },
        else_branch = e () => (float[2] b) <float[2] k = {3.0, 4.0}> { b = Mul(x, k) }>"""
    model = parse(body, "float[2] x, bool c", "float[2] y")
    lowered = lower(model, trainable=[])
    for condition, expected in ((True, [1, 2]), (False, [3, 4])):
        feeds = {"x": torch.ones(2), "c": torch.tensor(condition)}
        assert lowered(feeds)["y"].tolist() == expected
    with pytest.raises(ModelError, match="two initializers are called k; rename one"):
        lower(model, trainable=["k"])


def test_if_in_an_if_and_norms_inside():
    body = """y, z = If(c) <
        then_branch = t () => (float[4,3] a, float[4,3] a2) {
            a = BatchNormalization(x, scale, bias, mean, var) a2 = If(d) <
                then_branch = tt () => (float[4,3] p) { p = Add(x, bias) },
                else_branch = te () => (float[4,3] q) { q = Mul(a, x) }> },
        else_branch = e () => (float[4,3] u, float[4,3] v) { u = Relu(x) v = Neg(x) }>"""
    model = parse(
        body,
        "float[4,3] x, bool c, bool d",
        "float[4,3] y, float[4,3] z",
        **{k: np.full(3, 2, np.float32) for k in ("scale", "bias", "mean", "var")},
    )
    lowered = lower(model)
    for c, d in ((1, 1), (1, 0), (0, 1)):
        feeds = {"x": normal(4, 3), "c": np.array(bool(c)), "d": np.array(bool(d))}
        expected = run_ort(model, feeds, ["y", "z"])
        found = lowered(feeds_of(feeds))
        for name, want in zip(("y", "z"), expected, strict=True):
            np.testing.assert_allclose(found[name].detach().numpy(), want, rtol=1e-5, atol=1e-5)
    lowered.train()({"x": torch.randn(4, 3), "c": torch.tensor(True), "d": torch.tensor(True)})
    assert lowered.buffers_by_name["mean"][0] != 2


# ------------------------------------------------------------------------------- weights


def test_roles_say_what_trains_and_why():
    model = parse(
        """n = Sub(x, mean) p = Mul(n, invstd) h = Conv(p, w, wb) i = Mul(h, half)
        j = Add(i, mask) t = Transpose<perm=[1,0]>(m) k = MatMul(j, t) l = Add(k, position)
        y = Gather(emb, ids) z = Mul(l, table)""",
        "float[1,3,8,8] x, int64[2] ids",
        "float y, float z",
        mean=normal(1, 3, 1, 1),
        invstd=normal(1, 3, 1, 1),
        w=normal(4, 3, 1, 1),
        wb=normal(4),
        half=np.float32(0.5),
        mask=np.float32(np.triu(np.full((8, 8), -1e9), 1)),
        m=normal(8, 8),
        position=normal(8, 8),
        emb=normal(9, 4),
        table=normal(8, 8),
    )
    assert trainable_parameters(model) == {
        "w": "weight of Conv Conv_2",
        "wb": "bias of Conv Conv_2",
        "m": "weight of MatMul MatMul_6",
        "position": "bias of Add Add_7",
        "emb": "embedding of Gather Gather_8",
    }
    reasons = {name: role.reason for name, role in roles_of(model).items() if not role.trains}
    assert reasons == {
        "mean": "constant of Sub Sub_0",
        "invstd": "normalisation of a graph input of Mul Mul_1",
        "half": "scalar of Mul Mul_3",
        "mask": "mask of Add Add_4",
        "table": "table of Mul Mul_9",
    }


def test_recurrent_weights_are_found_behind_concat():
    model = parse(
        """u = Unsqueeze(w0, axes) v = Unsqueeze(w1, axes) w = Concat<axis=0>(u, v)
        a, y = GRU<hidden_size=2, direction="bidirectional">(x, w, r)""",
        "float[5,1,3] x",
        "float[2,1,2] y",
        axes=np.array([0]),
        w0=normal(6, 3),
        w1=normal(6, 3),
        r=normal(2, 6, 2),
    )
    assert trainable_parameters(model) == {
        "w0": "input weight of GRU GRU_3",
        "w1": "input weight of GRU GRU_3",
        "r": "recurrent weight of GRU GRU_3",
    }


def test_untie_leaves_shared_matrices_alone():
    model = parse(
        "a = MatMul(x, w) b = Add(a, v) c = MatMul(b, w) y = Add(c, v)",
        "float[2,3] x",
        "float[2,3] y",
        w=normal(3, 3),
        v=normal(3),
    )
    assert untie(model) == ["v_1"]
    assert set(lower(model).parameters_by_name) == {"w", "v", "v_1"}


def test_untie_leaves_the_bias_of_a_layer_that_runs_twice():
    model = parse(
        "a = Gemm(x, w, b) c = Gemm(a, w, b) y = Gemm(c, v, b)",
        "float[2,3] x",
        "float[2,3] y",
        w=normal(3, 3),
        v=normal(3, 3),
        b=normal(3),
    )
    assert untie(model) == ["b_1"]
    names = [node.inputs[2].name for node in model.graph]
    assert names == ["b", "b", "b_1"]


def test_values_named_like_others_with_a_number_stay_apart():
    model = parse(
        "a_1 = Neg(x) a = Add(a_1, a_2) b = Mul(a, a_3) y = Sub(b, a_1)",
        "float[2] x, float[2] a_3",
        "float[2] y",
        a_2=np.float32([5, 7]),
    )
    for name in ("a/1", "a.1"):
        model.graph[0].outputs[0].name = name
        y = lower(model, outputs=["y"])({"x": torch.ones(2), "a_3": torch.full((2,), 2.0)})["y"]
        assert y.tolist() == [9, 13]
