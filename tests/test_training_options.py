"""Options of training that need another package, a compiler, or a precision of their own."""

import os
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from training_models import build, classifier, pair

from onnxslim_kd.errors import UserError
from onnxslim_kd.training import config as configs
from onnxslim_kd.training import engine
from onnxslim_kd.training.journal import journal

SETTINGS = {"epochs": 1, "batch_size": 64, "optimizer": {"lr": 0.1}, "seed": 3, "threads": 1}


def losses(model, **settings):
    found = []

    def listen(event):
        if event["event"] == "step":
            found.append(event["loss"])

    engine.train(model, configs.parse(SETTINGS | {"log_steps": 1} | settings), listen)
    return torch.tensor(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch's compiler says of itself
def test_a_compiled_graph_trains_as_the_graph_does():
    torch.testing.assert_close(losses(pair(), compile=True), losses(pair()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runtime", ["ort", "torch"])
def test_bf16_trains_on_the_processor_close_to_float32(runtime):
    found = losses(pair(), amp="bf16", teacher_runtime=runtime)
    torch.testing.assert_close(found, losses(pair()), rtol=0.05, atol=0.05)
    assert not torch.equal(found, losses(pair()))


def test_fp16_wants_a_gpu():
    with pytest.raises(UserError, match="amp fp16 needs a CUDA device"):
        losses(classifier(), amp="fp16", device="cpu")


def test_tensorboard_gets_every_number(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is an extra: pip install 'onnxslim-kd[tensorboard]'",
    )
    config = configs.parse(SETTINGS | {"log_steps": 10})
    with journal(lambda event: None, tensorboard=tmp_path) as listen:
        outcome = engine.train(classifier(), config, listen)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"step/loss", "step/lr", "epoch/top1"} <= set(events.Tags()["scalars"])
    assert [loss.step for loss in events.Scalars("step/loss")] == [10, 20, 22]
    (top1,) = events.Scalars("epoch/top1")
    assert top1.value == pytest.approx(outcome.history[0]["top1"]) and top1.step == 1


def test_tensorboard_that_is_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(UserError, match="pip install 'onnxslim-kd\\[tensorboard\\]'"),
        journal(lambda event: None, tensorboard=tmp_path),
    ):
        pass


@pytest.mark.parametrize("own", [None, "7"])
def test_threads_spin_briefly_unless_the_user_says_otherwise(own):
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": own} if own else {}
    code = (
        "import os, sys, onnxslim_kd.training;"
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [own or "20000", "False"]


def test_mixed_precision_needs_weights_in_full_precision():
    half = build(
        "y = Gemm<transB=1>(image, fc)", "float[N,4] image", "float[N,3] y", {"fc": (3, 4)}
    )
    weight = half.graph.initializers["fc"]
    weight.const_value = ir.Tensor(weight.const_value.numpy().astype(np.float16), name="fc")
    weight.dtype = half.graph.inputs[0].dtype = ir.DataType.FLOAT16
    half.graph.outputs[0].dtype = ir.DataType.FLOAT16
    config = configs.parse({"data": "random?size=8", "batch_size": 4, "amp": "bf16", "epochs": 1})
    with pytest.raises(
        UserError, match=r"amp bf16 is for weights in float32, and 'fc' is in float16"
    ):
        engine.train(half, config)
