"""Shape arithmetic on numbers gives what ONNX Runtime computes."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxslim_kd.folding import FOLDS
from onnxslim_kd.runtime import Session

X = np.array([[7, -7, 0], [2**53 + 1, -(2**53) - 1, 5]])
CASES = {
    "y = ReduceSum(x, a)": [X, np.array([], np.int64)],
    "y = ReduceSum<noop_with_empty_axes = 1>(x, a)": [X, np.array([], np.int64)],
    "y = ReduceSum<keepdims = 0>(x, a)": [X, np.array([-1])],
    "y = ReduceMax<axes = [0]>(x)": [X],
    "y = ReduceProd(x)": [X[:1]],
    "y = Div(x, a)": [X, np.array([1, 2, -3])],
    "y = Reshape(x, a)": [X, np.array([0, 3, 1])],
    "y = Reshape<allowzero = 1>(x, a)": [np.zeros((0, 3), np.int64), np.array([3, 0])],
    "y = Mod(x, a)": [X, np.array([2, 3, 4])],
    "y = Squeeze(x, a)": [X[:, :1], np.array([-1])],
    "y = Slice(x, a, b, c, d)": [X, np.array([2]), np.array([-9]), np.array([1]), np.array([-1])],
    "y = Clip(x, , a)": [X, np.array(3)],
}


@pytest.mark.parametrize("body", CASES)
def test_a_rule_gives_what_the_runtime_gives(body: str) -> None:
    feeds = dict(zip("xabcd", CASES[body], strict=False))
    inputs = ", ".join(
        f"int64[{','.join(map(str, v.shape))}] {n}" if v.ndim else f"int64 {n}"
        for n, v in feeds.items()
    )
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => (int64[] y) {{ {body} }}'
    )
    node = model.graph.node(0)
    given = [None if value is None else feeds[value.name] for value in node.inputs]
    (found,) = FOLDS[node.op_type](node, given)
    wanted = Session(model, optimise=False).run(feeds)["y"]
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype
