import numpy as np
import onnx
import onnx_ir as ir
import pytest
from merge_models import net

from onnxslim_kd import probe
from onnxslim_kd.model import load
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.probe import Probe
from onnxslim_kd.verify_merge import verify_merge

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}


def test_inner_values_are_returned():
    found = Probe(load(net()), ["r1", "y"]).run(X)
    assert found["r1"].shape == (2, 4, 8, 8)
    assert np.array_equal(found["r1"], np.maximum(Probe(load(net()), ["c1"]).run(X)["c1"], 0))


def test_fed_weights_give_the_same_bits(monkeypatch):
    model = load(net())
    plain = Probe(model, ["r1", "y"])
    monkeypatch.setattr(probe, "BIG", 0)
    monkeypatch.setattr(probe, "PART", 400)
    fed = Probe(model, ["r1", "y"])
    assert set(fed.weights) == {"w1", "w2"}
    assert np.shares_memory(fed.weights["w1"], model.graph.initializers["w1"].const_value.numpy())
    for name, array in plain.run(X).items():
        assert np.array_equal(fed.run(X)[name], array)
    assert list(model.graph.initializers) == ["w1", "w2", "fc"]


def test_small_weights_may_lie_in_a_file_beside_the_model(monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    model = net(width=12)
    onnx.save(ir.to_proto(model), folder / "net.onnx", save_as_external_data=True, size_threshold=0)
    monkeypatch.setattr(probe, "BIG", 0)
    monkeypatch.setattr(probe, "PART", 2000)
    found = Probe(load(folder / "net.onnx"), ["y"])
    assert set(found.weights) == {"w2"}
    assert np.array_equal(found.run(X)["y"], Probe(load(model), ["y"]).run(X)["y"])


@pytest.mark.parametrize("part", [0, 400])
def test_merges_are_proven_with_fed_weights(monkeypatch, part):
    monkeypatch.setattr(probe, "BIG", 0)
    monkeypatch.setattr(probe, "PART", part)
    merged = merge(net(), net(width=6, seed=1), ["l2:y=y", "at:r2=r2"])
    assert verify_merge(merged, net(), net(width=6, seed=1)).values == 4
