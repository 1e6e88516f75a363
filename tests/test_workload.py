"""Shapes, batches and inputs to feed."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxslim_kd import runtime
from onnxslim_kd.errors import NotFoundError, UserError
from onnxslim_kd.workload import SAMPLES, parse_shapes, read_inputs, workloads

FREE = ir.from_onnx_text("""
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3, H, W] image, int64[N, 2] size) => (float[N, 3, H, W] y)
{ y = Relu(image) }
""")
FIXED = ir.from_onnx_text("""
<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4] x, float scale) => (float[1, 4] y) { y = Mul(x, scale) }
""")


def text(graph):
    return ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]> g {graph}')


def test_a_free_batch_is_one_and_other_sizes_are_asked_for():
    with pytest.raises(UserError, match=r"input image is free in size; .*--input image=1x3x\?x\?"):
        workloads(FREE)
    (only,) = workloads(FREE, [{"image": (1, 3, 8, 8)}])
    assert only.shapes == {"image": (1, 3, 8, 8), "size": (1, 2)}


def test_samples_differ_but_are_the_same_every_time():
    (first,), (second,) = workloads(FIXED), workloads(FIXED)
    assert len(first.feeds) == SAMPLES
    assert first.shapes == {"x": (1, 4), "scale": ()}
    assert not np.array_equal(first.feeds[0]["x"], first.feeds[1]["x"])
    np.testing.assert_array_equal(first.feeds[3]["x"], second.feeds[3]["x"])


def test_batches_and_sizes_make_a_sweep():
    found = workloads(FREE, [{"image": (1, 3, 8, 8)}, {"image": (1, 3, 9, 9)}], batches=[1, 4])
    assert [w.shapes["image"] for w in found] == [
        (1, 3, 8, 8), (4, 3, 8, 8), (1, 3, 9, 9), (4, 3, 9, 9),
    ]  # fmt: skip
    assert found[1].shapes["size"] == (4, 2)


def test_a_fixed_batch_refuses_another():
    with pytest.raises(UserError, match="--batch 8: every input has a fixed first axis"):
        workloads(FIXED, batches=[8])
    assert workloads(FIXED, batches=[1])[0].shapes["x"] == (1, 4)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 4, 8, 8), "input image: shape 1x4x8x8 does not fit, the model takes [?]x3x[?]x[?]"),
        ((1, 3, 8), "input image: shape 1x3x8 does not fit"),
        ((1, 3, 0, 8), "input image: shape 1x3x0x8 does not fit"),
    ],
)
def test_a_shape_that_does_not_fit(shape, text):
    with pytest.raises(UserError, match=text):
        workloads(FREE, [{"image": shape}])


def test_an_unknown_input_lists_the_known():
    with pytest.raises(NotFoundError, match=r"no input imag, it has image, size; near misses: im"):
        workloads(FREE, [{"imag": (1, 3, 8, 8)}])


def test_given_inputs_settle_the_shapes(tmp_path):
    arrays = {"x": np.ones((1, 4), np.float32), "scale": np.float32(2) * np.ones((), np.float32)}
    np.savez(tmp_path / "in.npz", **arrays)
    (only,) = workloads(FIXED, inputs=read_inputs(tmp_path / "in.npz"))
    assert only.shapes == {"x": (1, 4), "scale": ()} and len(only.feeds) == 1
    with pytest.raises(UserError, match="leave out --input and --batch"):
        workloads(FIXED, batches=[1], inputs=arrays)
    with pytest.raises(UserError, match="hold no array for input scale"):
        workloads(FIXED, inputs={"x": arrays["x"]})
    with pytest.raises(UserError, match="input x: float64 given, the model takes float32"):
        workloads(FIXED, inputs=arrays | {"x": np.ones((1, 4))})
    with pytest.raises(UserError, match="shape 2x4 does not fit, the model takes 1x4"):
        workloads(FIXED, inputs=arrays | {"x": np.ones((2, 4), np.float32)})
    with pytest.raises(NotFoundError, match="no input y"):
        workloads(FIXED, inputs=arrays | {"y": arrays["x"]})


def test_files_that_are_no_npz(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    for name, said in (
        ("text.npz", "is no npz file; write one with numpy.savez"),
        ("cut.npz", "is no npz file"),
        ("one.npy", "is no npz file"),
        ("objects.npz", "cannot be read as npz: Object arrays"),
        ("missing.npz", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=f"{name}: {said}"):
            read_inputs(tmp_path / name)


def test_strings_are_fed_as_text(tmp_path):
    model = text("(string[N] x) => (string[N] y) { y = Identity(x) }")
    np.savez(tmp_path / "in.npz", x=np.array(["a", "bc"]))
    (only,) = workloads(model, inputs=read_inputs(tmp_path / "in.npz"))
    assert runtime.Session(model).run(only.feeds[0])["y"].tolist() == ["a", "bc"]
    with pytest.raises(UserError, match="input x has type object; give it with --inputs"):
        workloads(model)


def test_inputs_that_cannot_be_made(monkeypatch):
    sequence = text("(seq(float[N]) x) => (float[M] y) { y = ConcatFromSequence<axis=0>(x) }")
    with pytest.raises(UserError, match="input x is no tensor, and nothing else can be fed"):
        workloads(sequence)
    huge = (2**20, 3, 2**14, 2**14)
    with pytest.raises(
        UserError, match=r"image of shape \[10485\d+, 3, .* too large to be made up"
    ):
        workloads(FREE, [{"image": huge, "size": (1, 2)}])

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(runtime, "random_feeds", full)
    with pytest.raises(UserError, match="inputs of this size do not fit into memory: image 9x3x"):
        workloads(FREE, [{"image": (9, 3, 8, 8), "size": (1, 2)}])


def test_an_input_that_is_empty_by_itself():
    model = text("(float[0,4] x) => (float[0,4] y) { y = Relu(x) }")
    assert workloads(model)[0].shapes == {"x": (0, 4)}


def test_shapes_are_parsed():
    assert parse_shapes([]) == []
    assert parse_shapes(["x=1x3x8x8", "s=2"]) == [{"x": (1, 3, 8, 8), "s": (2,)}]
    assert parse_shapes(["a=b=1,3"]) == [{"a=b": (1, 3)}]
    assert parse_shapes(["scalar="]) == [{"scalar": ()}]
    swept = parse_shapes(["x=1x8", "x=1x9", "s=2"])
    assert swept == [{"x": (1, 8), "s": (2,)}, {"x": (1, 9), "s": (2,)}]


@pytest.mark.parametrize("text", ["x", "x=a", "=1x3", "x=1xx3", "x=-1x3"])
def test_malformed_shapes(text):
    with pytest.raises(UserError, match="write it as name=1x3x224x224"):
        parse_shapes([text])


def test_uneven_sweeps():
    with pytest.raises(UserError, match="--input b is given 2 times and another input 3 times"):
        parse_shapes(["a=1", "a=2", "a=3", "b=1", "b=2"])
