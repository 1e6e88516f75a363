"""Older opsets: the raised model computes what the file does."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxslim_kd.errors import ModelError
from onnxslim_kd.model import load, save
from tests.models import Case, proto

UP, DOWN, BOTH = "1.0, 1.0, 1.5, 2.5", "1.0, 1.0, 0.6, 0.6", "1.0, 1.0, 2.0, 0.5"
SCALES = "s = Constant<value=float[4] {{{}}}>() y = {}(x, s)"
NORM = "y = BatchNormalization<spatial={}>(x, w1, w2, w3, wpos4)"
VECTORS = "float[{0}] w1, float[{0}] w2, float[{0}] w3, float[{0}] wpos4"
FORMS = {  # what the converter gets wrong, and neighbours that it gets right
    "upsample-7": (7, f'y = Upsample<mode="linear",scales=[{UP}]>(x)'),
    "upsample-9": (9, SCALES.format(UP, 'Upsample<mode="linear">')),
    "upsample-9-nearest": (9, SCALES.format(UP, "Upsample")),
    "resize-10": (10, SCALES.format(UP, 'Resize<mode="linear">')),
    "resize-10-smaller": (10, SCALES.format(DOWN, 'Resize<mode="linear">')),
    "resize-10-nearest-smaller": (10, SCALES.format(DOWN, "Resize")),
    "resize-10-nearest-both": (10, SCALES.format(BOTH, "Resize")),
    "pad-10-reflect": (10, 'y = Pad<mode="reflect",pads=[0,0,1,2,0,0,0,1],value=0.3>(x)'),
    "pad-10-constant": (10, "y = Pad<pads=[0,0,1,2,0,0,0,1],value=0.3>(x)"),
    "hardmax-7": (7, "y = Hardmax(x)"),
    "hardmax-11": (11, "y = Hardmax<axis=-2>(x)"),
    "hardmax-13": (13, "y = Hardmax<axis=-2>(x)"),
    "softmax-11": (11, "y = Softmax<axis=2>(x)"),
    "max-pool-same-dilated": (
        12,
        'y = MaxPool<kernel_shape=[3,3],dilations=[2,2],auto_pad="SAME_UPPER">(x)',
    ),
    "batch-norm-7": (7, NORM.format(1)),
}


def outputs(path: object) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # it warns of a shape that it computes otherwise than ONNX
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("as_file", [True, False])
def test_what_is_computed_stays(tmp_path, name, as_file):
    opset, body = FORMS[name]
    given = proto(Case(body, VECTORS.format(3), outputs="float[A,B,C,D] y", opset=opset))
    onnx.save(given, tmp_path / "old.onnx")
    save(load(tmp_path / "old.onnx" if as_file else given), tmp_path / "new.onnx")
    expected = outputs(tmp_path / "old.onnx")
    np.testing.assert_allclose(outputs(tmp_path / "new.onnx"), expected, rtol=1e-5, atol=1e-6)


def test_what_has_no_newer_form_is_refused_in_a_sentence():
    case = Case(NORM.format(0), VECTORS.format("3,8,8"), outputs="float[A,B,C,D] y", opset=7)
    with pytest.raises(ModelError, match=r"^opset 7 cannot be raised to 17: Attribute"):
        load(proto(case))
