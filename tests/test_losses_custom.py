"""The user's own losses: ONNX models, ONNX functions, Python functions."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from losses_models import check, loss_model, value
from onnx_torch import gradients

from onnxslim_kd.errors import ModelError, NotFoundError, OperationError, UserError

KINDS = {"custom"}
SHAPES = {"s": ("N", 6), "t": ("N", 6)}
RNG = np.random.default_rng(2)
FEEDS = {n: RNG.standard_normal((4, 6)).astype(np.float32) for n in SHAPES}
GAP = FEEDS["s"] - FEEDS["t"]
SCALE = np.arange(1, 7, dtype=np.float32)

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
loss (float[N, 6] a, float[N, 6] b) => (float l)
<float[6] scale = {1, 2, 3, 4, 5, 6}>
{
    d = Sub(a, b)
    e = Mul(d, scale)
    q = Mul(e, e)
    l = ReduceMean<keepdims = 0>(q)
}"""
FUNCTION = """<domain: "my", opset_import: ["" : 17]>
gap (a, b) => (l)
{
    d = Sub(a, b)
    e = Abs(d)
    l = ReduceMean<keepdims = 0>(e)
}"""


def mean_gap(scope, students, teachers, factor=1.0):
    gap = scope.op("Sub", students[0], teachers[0])
    return scope.op("Mul", scope.mean(scope.op("Abs", gap)), float(factor))


def no_scalar(scope, students, teachers):
    return scope.op("Sub", students[0], teachers[0])


def nothing(scope, students, teachers):
    return None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(MODEL), "loss.onnx")
    (tmp_path / "function.onnx").write_bytes(
        onnx.parser.parse_function(FUNCTION).SerializeToString()
    )
    return tmp_path


def test_python_function_with_an_option():
    model = loss_model("custom:s=t,function=test_losses_custom:mean_gap,factor=3", SHAPES)
    assert value(model, FEEDS) == pytest.approx(3 * np.abs(GAP).mean(), rel=1e-6)


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_onnx_model_is_raised_to_the_opset(folder, opset):
    model = loss_model("custom:s=t,file=loss.onnx", SHAPES, opset=opset)
    check(model)
    assert value(model, FEEDS) == pytest.approx(((GAP * SCALE) ** 2).mean(), rel=1e-6)
    names = [node.name for node in model.graph] + list(model.graph.initializers)
    assert all(name.startswith("loss/custom/") for name in names if name != "total")


def test_onnx_model_may_train(folder):
    model = loss_model("custom:s=t,file=loss.onnx,train=true", SHAPES)
    assert "loss_custom_scale" in model.graph.initializers
    _, found = gradients(model, FEEDS, ["loss_custom_scale"])
    expected = 2 * SCALE * (GAP**2).sum(0) / GAP.size
    np.testing.assert_allclose(found["loss_custom_scale"], expected, rtol=1e-5)


def test_onnx_function(folder):
    model = loss_model("custom:s=t,file=function.onnx", SHAPES)
    check(model)
    assert value(model, FEEDS) == pytest.approx(np.abs(GAP).mean(), rel=1e-6)


def test_two_terms_from_one_file(folder):
    text = "custom:s=t,file=loss.onnx,name=one;custom:t=s,file=loss.onnx,name=two"
    model = loss_model(text, SHAPES)
    assert value(model, FEEDS) == pytest.approx(2 * ((GAP * SCALE) ** 2).mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("", UserError, "takes file=loss.onnx or function=module:name"),
        (",file=loss.onnx,alpha=2", UserError, "a file takes no option alpha"),
        (",file=none.onnx", ModelError, "none.onnx: no such file"),
        (",function=test_losses_custom:gone", NotFoundError, "no 'gone' in there"),
        (",function=test_losses_custom:no_scalar", UserError, "not a scalar"),
        (",function=test_losses_custom:nothing", UserError, "returned NoneType, not a value"),
        (",function=json:dumps", OperationError, "json:dumps failed: TypeError: dumps"),
    ],
)
def test_refusals(folder, options, error, message):
    with pytest.raises(error, match=message):
        loss_model("custom:s=t" + options, SHAPES)


@pytest.mark.parametrize("file", ["loss.onnx", "function.onnx"])
def test_refuses_another_number_of_values(folder, file):
    with pytest.raises(UserError, match="takes 2 values and gives 1, it must take 3 and give 1"):
        loss_model(f"custom:s+s=t,file={file}", SHAPES)
    with pytest.raises(UserError, match="takes 2 values and gives 1, it must take 1 and give 1"):
        loss_model(f"custom:s,file={file}", SHAPES)


def test_refuses_a_newer_opset(folder):
    proto = onnx.parser.parse_model(MODEL)
    proto.opset_import[0].version = 21
    onnx.save(proto, "new.onnx")
    with pytest.raises(UserError, match=r"new.onnx has opset 21, the models 17"):
        loss_model("custom:s=t,file=new.onnx", SHAPES)


def test_the_file_is_not_changed(folder):
    before = (folder / "loss.onnx").read_bytes()
    loss_model("custom:s=t,file=loss.onnx", SHAPES)
    assert (folder / "loss.onnx").read_bytes() == before
    assert isinstance(ir.load(folder / "loss.onnx"), ir.Model)
