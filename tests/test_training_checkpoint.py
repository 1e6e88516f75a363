import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from training_models import classifier, numbers, pair

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.training import checkpoint, engine
from onnxslim_kd.training import config as configs

SETTINGS = {
    "epochs": 2,
    "batch_size": 64,
    "optimizer": {"lr": 0.1},
    "seed": 3,
    "threads": 1,
    "ema": 0.9,
    "schedule": {"kind": "cosine", "warmup": 1},
    "preprocess": "shift=1",
}


def fit(model, listen=lambda event: None, **settings):
    return engine.train(model, configs.parse(SETTINGS | settings), listen)


def same_bits(a, b):
    return all(np.array_equal(value, numbers(b)[name]) for name, value in numbers(a).items())


@pytest.fixture(scope="module")
def undisturbed():
    return fit(pair()).model


def test_checkpoints_are_by_number_and_old_ones_go(tmp_path):
    fit(classifier(), checkpoint=tmp_path, epochs=12, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"11", "12", "best.onnx"}
    held = {path.name for path in (tmp_path / "12").iterdir()}
    assert held == {"state.json", "state.safetensors", "eval_model.onnx"}


def test_the_eval_model_is_the_student_alone(tmp_path):
    fit(pair(), checkpoint=tmp_path)
    model = model_io.load(tmp_path / "2" / "eval_model.onnx")
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert not any("teacher" in name or "loss" in name for name in numbers(model))


def test_no_save_eval_model(tmp_path):
    fit(classifier(), checkpoint=tmp_path, save_eval_model=False)
    assert not list(tmp_path.glob("*/eval_model.onnx"))


def test_ctrl_c_checkpoints_and_the_same_command_goes_on(tmp_path, undisturbed):
    def interrupt(event):
        if event["event"] == "tick" and (event["epoch"], event["step"]) == (1, 7):
            signal.raise_signal(signal.SIGINT)

    stopped = fit(pair(), interrupt, checkpoint=tmp_path)
    assert not stopped.finished and (tmp_path / "1-7").is_dir()
    events = []
    finished = fit(pair(), events.append, checkpoint=tmp_path)
    assert {"event": "resume", "epoch": 1, "step": 7} in events
    assert finished.finished and same_bits(finished.model, undisturbed)


def test_a_finished_run_does_nothing_more(tmp_path, undisturbed):
    fit(pair(), checkpoint=tmp_path)
    again = fit(pair(), checkpoint=tmp_path)
    assert same_bits(again.model, undisturbed) and len(again.history) == 2


def test_edited_settings_take_effect_after_a_restart(tmp_path):
    fit(classifier(), checkpoint=tmp_path)
    events = []
    fit(classifier(), events.append, checkpoint=tmp_path, epochs=3, optimizer={"name": "adam"})
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [3]


def test_a_checkpoint_of_another_graph_is_refused(tmp_path):
    fit(classifier(4), checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"checkpoint .*/2 is of another graph"):
        fit(classifier(6), checkpoint=tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    fit(classifier(), checkpoint=tmp_path)
    with (tmp_path / "2" / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"2 is damaged: .*remove it to go on from the one before"):
        fit(classifier(), checkpoint=tmp_path)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    fit(classifier(), checkpoint=tmp_path)

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OperationError, match=r"cannot be written: .*No space left"):
        fit(classifier(), checkpoint=tmp_path, epochs=3)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "best.onnx"}


def child(path, folder):
    model = model_io.load(path)
    fit(model, checkpoint=folder, checkpoint_steps=2, keep=2)
    model_io.save(model, folder / "done.onnx", overwrite=True)


def killed_run(tmp_path, kills, seed):
    """Run to the end through ``kills`` kills at random moments; return the model."""
    context = multiprocessing.get_context("forkserver")
    heavy = ["onnxslim_kd.training.engine", "sklearn.datasets", "onnxruntime"]
    context.set_forkserver_preload(heavy)
    source, folder = tmp_path / "pair.onnx", tmp_path / "run"
    model_io.save(pair(), source)
    folder.mkdir()
    rng = random.Random(seed)
    moments, done = [], 0
    while not (folder / "done.onnx").exists():
        process = context.Process(target=child, args=(source, folder))
        process.start()
        if done < kills:
            before = newest(folder)
            while process.is_alive() and newest(folder) == before:
                time.sleep(0.001)  # progress first, or a slow machine never gets to the end
            time.sleep(rng.uniform(0, 0.05))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                done += 1
                moments.append(newest(folder))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    return model_io.load(folder / "done.onnx"), moments


def newest(folder):
    places = [path.name for path in folder.iterdir() if path.name[0].isdigit()]
    return max(places, key=lambda name: [int(part) for part in name.split("-")], default="")


def test_killed_at_random_moments_the_run_ends_with_the_same_bits(tmp_path, undisturbed):
    model, moments = killed_run(tmp_path, kills=5, seed=0)
    assert len(moments) == 5
    assert same_bits(model, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_fifty_times(tmp_path, undisturbed, seed):
    model, _ = killed_run(tmp_path, kills=13, seed=seed)
    assert same_bits(model, undisturbed)
