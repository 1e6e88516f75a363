"""Weights that the graph itself standardises, as BiT's convolutions do."""

import numpy as np
import onnx_ir as ir
import torch
from merge_models import HEADER, run, text

from onnxslim_kd import infer_prune
from onnxslim_kd.model import load
from onnxslim_kd.passes.prepare import prepare
from onnxslim_kd.training.lowering import lower

NET = """
 net (float[N,3,8,8] x) => (float[N,4,6,6] y)
 <float[4,3,3,3] w, int64[3] rows = {1, 4, 27}, int64[4] back = {4, 3, 3, 3},
  float[4] one = {1, 1, 1, 1}, float[4] zero = {0, 0, 0, 0},
  float[4] mean = {0, 0, 0, 0}, float[4] var = {1, 1, 1, 1}> {
  flat = Reshape(w, rows)
  even, m, v = BatchNormalization<training_mode=1, epsilon=1e-8>(flat, one, zero, mean, var)
  even_w = Reshape(even, back)
  y = Conv(x, even_w)
 }
"""
X = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}


def net() -> ir.Model:
    return text(HEADER.format(opset=17) + NET)


def test_weights_stay_standardised_in_inference():
    stripped = infer_prune(net()).model
    assert [node.op_type for node in stripped.graph] == ["Conv"]
    np.testing.assert_allclose(run(stripped, X)["y"], run(net(), X)["y"], rtol=1e-4, atol=1e-5)


def test_weights_are_standardised_in_training_and_evaluation():
    model = load(net())
    prepare(model)
    lowered = lower(model)
    wanted = run(net(), X)["y"]
    for module in (lowered.train(), lowered.eval()):
        found = module({"x": torch.from_numpy(X["x"])})["y"].detach().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
