"""Training on a GPU; where there is none, every test says why it did not run."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_models import classifier, numbers, pair

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.training import config as configs
from onnxslim_kd.training import distributed, engine

SETTINGS = {"epochs": 2, "batch_size": 64, "optimizer": {"lr": 0.1}, "seed": 3, "log_steps": 1}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def losses(model, **settings):
    found = []

    def listen(event):
        if event["event"] == "step":
            found.append(event["loss"])

    outcome = engine.train(model, configs.parse(SETTINGS | settings), listen)
    return torch.tensor(found), outcome


@needs_gpu
@pytest.mark.parametrize("runtime", ["auto", "ort"])
def test_a_gpu_trains_as_the_processor_does(runtime):
    there, outcome = losses(pair(), device="cuda", teacher_runtime=runtime)
    here, _ = losses(pair(), device="cpu")
    torch.testing.assert_close(there[:10], here[:10], rtol=1e-2, atol=1e-2)
    assert all(np.isfinite(value).all() for value in numbers(outcome.model).values())


@needs_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_mixed_precision_trains(amp, optimizer):
    settings = {"amp": amp, "ema": 0.9, "optimizer": {"name": optimizer, "lr": 0.01}}
    found, _ = losses(pair(), device="cuda", **settings)
    assert found[-5:].mean() < found[:5].mean()


@needs_gpu
def test_a_checkpoint_goes_on_with_the_scaler_and_the_optimiser(tmp_path):
    settings = {"device": "cuda", "amp": "fp16", "optimizer": {"name": "adamw", "lr": 0.01}}
    losses(classifier(), checkpoint=tmp_path, **settings)
    found, outcome = losses(classifier(), checkpoint=tmp_path, **settings | {"epochs": 3})
    assert len(found) == 22 and outcome.history[-1]["epoch"] == 3


@needs_gpu
def test_processes_over_nccl(tmp_path):
    count = min(torch.cuda.device_count(), 2)
    model_io.save(pair(), tmp_path / "pair.onnx")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    options = ["--epochs", "1", "--device", "cuda", "--sync-bn"]
    command = [*launcher, "-m", "onnxslim_kd", "train", "pair.onnx", "-o", "done.onnx", *options]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_more_processes_than_devices_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    with (
        pytest.raises(UserError, match="process 1 of this machine has no CUDA device of its own"),
        distributed.join("cuda"),
    ):
        pass
