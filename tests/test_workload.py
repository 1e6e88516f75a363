"""Shapes, batches and inputs to feed."""

import numpy as np
import onnx_ir as ir
import pytest

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
    with pytest.raises(UserError, match="input x: float64 given, the model takes FLOAT"):
        workloads(FIXED, inputs=arrays | {"x": np.ones((1, 4))})
    with pytest.raises(UserError, match="shape 2x4 does not fit, the model takes 1x4"):
        workloads(FIXED, inputs=arrays | {"x": np.ones((2, 4), np.float32)})
    with pytest.raises(NotFoundError, match="no input y"):
        workloads(FIXED, inputs=arrays | {"y": arrays["x"]})


def test_files_that_are_no_npz(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "one.npy", np.ones(3))
    for name in ("text.npz", "cut.npz", "missing.npz"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as npz"):
            read_inputs(tmp_path / name)
    with pytest.raises(UserError, match=r"one.npy: holds one array; write named ones"):
        read_inputs(tmp_path / "one.npy")


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
