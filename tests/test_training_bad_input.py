"""What `train`, `eval`, `infer` and `calibrate` say of bad input: one sentence, no traceback."""

import resource
import signal

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from PIL import Image
from training_models import build, classifier, numbers, pair

from onnxslim_kd import model as model_io
from onnxslim_kd.cli import main
from onnxslim_kd.training import bn
from onnxslim_kd.training.config import TrainConfig
from onnxslim_kd.training.data import Loader
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.engine import train
from onnxslim_kd.training.transforms import Preprocess

CODE = """
import torch

class Raises:
    def __len__(self): return 16
    def __getitem__(self, index): raise KeyError("nothing here")

class Words(Raises):
    def __getitem__(self, index): return "a", 3

def fails(): raise RuntimeError("no network")
def number(): return 3
def nan(outputs, entries): return torch.tensor(float("nan"))
def boom(outputs, entries): raise ValueError("boom")
def plain(outputs, entries): return 3.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data, good and bad."""
    folder = tmp_path_factory.mktemp("bad")
    model_io.save(classifier(), folder / "net.onnx")
    model_io.save(pair(), folder / "pair.onnx")
    model_io.save(strange(), folder / "strange.onnx")
    model_io.save(logarithm(), folder / "log.onnx")
    model_io.save(without_weights(), folder / "bare.onnx")
    (folder / "user_code.py").write_text(CODE)
    (folder / "broken.yaml").write_text("a: [1, 2\nb: }")
    (folder / "typo.yaml").write_text("optimiser: {name: sgd}")
    (folder / "kind.yaml").write_text("optimizer: {name: lamb}")
    (folder / "file").write_text("")
    write_arrays(folder)
    write_images(folder)
    return folder


def strange() -> ir.Model:
    """Two kinds of operators that nothing knows."""
    model = classifier()
    for node in model.graph:
        if node.op_type == "Relu":
            node.op_type, node.domain, node.name = "Strange", "my.ops", node.outputs[0].name
        if node.op_type == "GlobalAveragePool":
            node.op_type, node.domain, node.name = "Odd", "my.ops", "odd"
    model.opset_imports["my.ops"] = 1
    return model


def logarithm() -> ir.Model:
    """A net with the logarithm of numbers below zero."""
    model = classifier()
    next(node for node in model.graph if node.op_type == "Relu").op_type = "Log"
    return model


def without_weights() -> ir.Model:
    return build(" logits = Flatten(image)\n", "float[N,1,8,8] image", "float[N,64] logits", {})


def write_arrays(folder):
    x, y = np.zeros((16, 1, 8, 8), np.float32), np.zeros(16, np.int64)
    np.savez(folder / "good.npz", x=x, y=y)
    np.savez(folder / "few.npz", x=x[:5], y=y[:5])
    np.savez(folder / "none.npz", x=x[:0], y=y[:0])
    np.savez(folder / "names.npz", left=x, right=x, y=y)
    np.savez(folder / "large.npz", x=np.zeros((16, 1, 9, 9), np.float32), y=y)
    np.savez(folder / "classes.npz", x=x, y=y + 10)
    np.savez(folder / "negative.npz", x=x, y=y - 3)
    np.savez(folder / "words.npz", x=x, y=np.array(["cat"] * 16))
    np.savez(folder / "onehot.npz", x=x, y=np.zeros((16, 10), np.float32))
    np.savez(folder / "unlabelled.npz", x=x)
    np.savez(folder / "nan.npz", x=x * np.nan, y=y)


def write_images(folder):
    rng = np.random.default_rng(0)
    lines = []
    for number in range(8):
        pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png {number}")
    (folder / "corrupt.png").write_bytes((folder / "0.png").read_bytes()[:40])
    lines += ["missing.png 3", "corrupt.png 4"]
    (folder / "images.txt").write_text("\n".join(lines))
    (folder / "mostly.txt").write_text("\n".join(lines[:2] + [f"no{n}.png 1" for n in range(8)]))


def run(command, *arguments):
    return CliRunner().invoke(main, [command, *map(str, arguments)])


BATCH = ("--batch-size", "8", "--epochs", "1")
GOOD = ("--data", "npz:good.npz")
IMAGES = ("--data", "imagelist:images.txt", "--preprocess", "gray", "--batch-size", "2")
MODEL = ("net.onnx", *BATCH)
CASES = {
    # the model
    "unknown operators, all at once": (
        ("strange.onnx", *GOOD),
        "operators that cannot be trained: my.ops.Odd (odd); my.ops.Strange (2 nodes, first r1)",
    ),
    "no parameter": (("bare.onnx", *GOOD), "no parameter is left to train"),
    # the loss
    "loss not finite": (("log.onnx", *GOOD, *BATCH), "the first value that is not finite is 'r1'"),
    "data not finite": ((*MODEL, "--data", "npz:nan.npz"), "is not finite is 'image'"),
    "loss of the user's, not finite": (
        (*MODEL, *GOOD, "--set", "labels.loss=user_code:nan"),
        "the first value that is not finite is 'labels'",
    ),
    "loss of the user's, fails": (
        (*MODEL, *GOOD, "--set", "labels.loss=user_code:boom"),
        "labels.loss user_code:boom failed: ValueError: boom",
    ),
    "loss of the user's, no tensor": (
        (*MODEL, *GOOD, "--set", "labels.loss=user_code:plain"),
        "labels.loss user_code:plain must return a scalar tensor, got float",
    ),
    "no such loss": (
        (*MODEL, *GOOD, "--set", "labels.loss=huber"),
        "labels.loss 'huber' is not one of ce, bce, mse, module:function",
    ),
    "loss of another shape": (
        (*MODEL, *GOOD, "--set", "labels.loss=mse"),
        "labels.loss mse wants labels of the output's shape [8, 10], the data gives [8]",
    ),
    "no such term": (
        ("pair.onnx", *GOOD, "--set", "terms.kll.weight=2"),
        "terms.kll: the model's loss terms are: kl, hint; near misses: kl",
    ),
    # labels
    "label too large": ((*MODEL, "--data", "npz:classes.npz"), "sample 0 has label 10, the model"),
    "label below -1": ((*MODEL, "--data", "npz:negative.npz"), "sample 0 has label -3, the model"),
    "labels as words": (
        (*MODEL, "--data", "npz:words.npz"), "'y' holds <U3, which are no numbers",
    ),
    "labels as probabilities": (
        (*MODEL, "--data", "npz:onehot.npz"),
        "cross-entropy wants one class per sample (or pixel, or token) of scores [8, 10], the"
        " data gives float32 [8, 10]",
    ),
    "no labels": ((*MODEL, "--data", "npz:unlabelled.npz"), "needs 'label' or 'mask' in the data"),
    "no labels to mix": (
        (*MODEL, "--data", "npz:unlabelled.npz", "--set", "labels.mixup=0.2"),
        "labels.mixup and cutmix need 'image' and 'label' in the data, which has image",
    ),
    # data
    "files missing and corrupt": (
        (*MODEL, *IMAGES), "1 sample cannot be read, 0 are allowed (max_bad); the first: ",
    ),
    "more than allowed": (
        (*MODEL, *IMAGES, "--max-bad", "1"),
        "2 samples cannot be read, 1 are allowed (max_bad); the first: ",
    ),
    "fewer than a batch": (
        (*MODEL, "--data", "npz:few.npz"),
        "the data set has 5 samples, less than one batch of 8; lower batch_size",
    ),
    "other names": (
        (*MODEL, "--data", "npz:names.npz"),
        "the data has no 'image' for the model's input 'image', only label, left, right",
    ),
    "another size": (
        (*MODEL, "--data", "npz:large.npz"),
        "input 'image' has shape [batch, 1, 8, 8], the data gives [8, 1, 9, 9]",
    ),
    "no npz": ((*MODEL, "--data", "npz:images.txt"), "npz:images.txt: is not an npz file"),
    "dataset of the user's, fails": (
        (*MODEL, "--data", "user_code:Raises"), "user_code:Raises: item ",
    ),
    "dataset of the user's, no numbers": (
        (*MODEL, "--data", "user_code:Words"), "TypeError: new(): invalid data type 'str'",
    ),
    "dataset of the user's, cannot be made": (
        (*MODEL, "--data", "user_code:fails"),
        "data user_code:fails failed: RuntimeError: no network",
    ),
    "dataset of the user's, is none": (
        (*MODEL, "--data", "user_code:number"), "must return a Dataset with a length, got int",
    ),
    # evaluation: before the first step, not after the first epoch
    "evaluation of another size": (
        (*MODEL, *GOOD, "--val-data", "npz:large.npz"), "the data gives [8, 1, 9, 9]",
    ),
    "evaluation without data": (
        (*MODEL, *GOOD, "--val-data", "npz:none.npz"), "the evaluation data has no samples",
    ),
    "no such metric": (
        (*MODEL, *GOOD, "--val-data", "npz:good.npz", "--metric", "top"),
        "metric 'top' is not one of top1, miou, map or module:function (train has loss as well);"
        " near misses: top1",
    ),
    "metric of other outputs": (
        (*MODEL, *GOOD, "--val-data", "npz:good.npz", "--metric", "map"),
        "the metric map needs an output [batch, boxes, 6]",
    ),
    # settings
    "no YAML": ((*MODEL, "--config", "broken.yaml"), "broken.yaml: is not YAML: "),
    "no such file": ((*MODEL, "--config", "no.yaml"), "no.yaml: cannot be read: No such file"),
    "unknown key": (
        (*MODEL, "--config", "typo.yaml"), "'optimiser' is not known; near misses: optimizer",
    ),
    "unknown optimiser": (
        (*MODEL, "--config", "kind.yaml"),
        "setting 'optimizer.name': Input should be 'sgd', 'adam' or 'adamw', got 'lamb'",
    ),
    "no YAML in an option": ((*MODEL, "--set", "a=["), "override 'a=[' is not YAML: "),
    "freeze matches nothing": (
        (*MODEL, *GOOD, "--freeze", "conv9_weights"),
        "freeze: no parameter matches 'conv9_weights'; near misses: conv2_weights, conv1_weights",
    ),
    "train matches nothing": (
        (*MODEL, *GOOD, "--train", "block"), "matches 'block'; there are conv1_weights, bn1_scale",
    ),
    "everything frozen": ((*MODEL, *GOOD, "--freeze", ".*"), "no parameter is left to train"),
    "nothing to learn from": (
        (*MODEL, *GOOD, "--mutual"), "mutual needs a merged model with a teacher",
    ),
    "nothing to put back": (
        (*MODEL, *GOOD, "--like", "net.onnx"), "like is for BatchNormalization that is put back",
    ),
    "nothing to measure": (
        (*MODEL, *GOOD, "--metric", "loss"), "metric loss has nothing to measure: give val_data",
    ),
    "nowhere to write": (
        (*MODEL, *GOOD, "--checkpoint", "file"), "checkpoint file",
    ),
    "steps without a folder": (
        (*MODEL, *GOOD, "--checkpoint-steps", "2"), "checkpoint_steps has no effect without",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence_and_writes_nothing(folder, monkeypatch, name):
    arguments, message = CASES[name]
    monkeypatch.chdir(folder)
    done = run("train", *arguments, "-o", "out.onnx")
    last = done.output.splitlines()[-1]
    assert last.startswith("Error: ") and message in last
    assert isinstance(done.exception, SystemExit) and done.exit_code in (1, 2)
    assert "step" not in "".join(done.output.splitlines()[:-1])  # before anything was trained
    assert not (folder / "out.onnx").exists()


OTHERS = {
    "label too large": (
        ("eval", "net.onnx", "--data", "npz:classes.npz"),
        "the data has label 10, the model has 10 classes (0 to 9; -1 is unlabelled)",
    ),
    "label below -1": (("eval", "net.onnx", "--data", "npz:negative.npz"), "has label -3"),
    "no samples": (("eval", "net.onnx", "--data", "npz:none.npz"), "has no samples"),
    "nothing to calibrate on": (
        ("calibrate", "net.onnx", "-o", "out.onnx", "--data", "npz:none.npz"),
        "the data has no samples to measure on",
    ),
    "nothing to compare with": (
        ("calibrate", "net.onnx", "-o", "out.onnx", *GOOD, "--like", "net.onnx"),
        "the model has live BatchNormalization, which needs no --like",
    ),
    "a plan that leads from nothing": (
        ("calibrate", "net.onnx", "-o", "out.onnx", *GOOD, "--plan", "no.json"),
        "the model has live BatchNormalization, which needs no --like or --plan",
    ),
    "no file of names": (
        ("infer", "net.onnx", "0.png", "--labels", "no.txt"), "no.txt: cannot be read: No such",
    ),
    "no image": (
        ("infer", "net.onnx", "no.png"), "1 sample cannot be read; the first: no.png: No such file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_bad_input_of_the_other_commands(folder, monkeypatch, name):
    arguments, message = OTHERS[name]
    monkeypatch.chdir(folder)
    done = run(*arguments)
    assert done.exit_code == 2 and message in done.output.splitlines()[-1]
    assert not (folder / "out.onnx").exists()


@pytest.mark.parametrize("option", ["--batch-size", "--batches", "--topk"])
def test_counts_are_one_or_more(option):
    commands = {"--batches": "calibrate", "--topk": "infer"}
    done = run(commands.get(option, "eval"), "net.onnx", option, "0")
    assert done.exit_code == 2 and f"Invalid value for '{option}'" in done.output


# ------------------------------------------------------------------- what may be bad


def test_files_that_cannot_be_read_are_counted_and_left_out(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    done = run("train", *MODEL, *IMAGES, "--max-bad", "2", "-o", tmp_path / "out.onnx")
    assert done.exit_code == 0 and "bad_samples 2" in done.output


def test_a_batch_with_no_sample_left_is_left_out(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    data = ["--data", "imagelist:mostly.txt", "--preprocess", "gray", "--max-bad", "8"]
    options = [*MODEL, *data, "--batch-size", "2", "--accumulate", "2"]
    done = run("train", *options, "-o", tmp_path / "out.onnx")
    assert done.exit_code == 0 and "bad_samples 8" in done.output
    loader = Loader(open_source("imagelist:mostly.txt"), Preprocess(), 2, max_bad=8)
    assert [len(batch) for batch in loader.train(0)].count(0) >= 3
    assert sum(len(batch) for batch in loader.evaluate()) == 2


def test_a_merged_model_is_calibrated_without_labels_and_without_its_teacher(folder):
    model = model_io.load(folder / "pair.onnx")
    before = numbers(model)
    done = bn.calibrate(model, bn.some_batches(model, "digits", batches=2))
    after = numbers(model)
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert done["reestimated"] == 1 and changed == {"bn1_mean", "bn1_var"}


# ------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_another_graph_is_refused_and_stays(folder, tmp_path):
    kept = tmp_path / "kept"
    options = ["--epochs", "1", "--checkpoint", kept, "-o", tmp_path / "out.onnx", "--force"]
    assert run("train", folder / "net.onnx", *options).exit_code == 0
    before = (kept / "1" / "state.safetensors").read_bytes()
    done = run("train", folder / "pair.onnx", *options)
    assert done.exit_code == 2 and "is of another graph; give the model it was made" in done.output
    assert (kept / "1" / "state.safetensors").read_bytes() == before


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(folder, tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out.onnx"
    options = ["--checkpoint", kept, "-o", out, "--force", "--no-save-eval-model"]
    assert run("train", folder / "net.onnx", "--epochs", "1", *options).exit_code == 0
    held = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    before = out.read_bytes()
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        done = run("train", folder / "net.onnx", "--epochs", "2", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.exit_code == 1 and "cannot be written: " in done.output.splitlines()[-1]
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == held
    assert out.read_bytes() == before
    done = run("train", folder / "net.onnx", "--epochs", "2", *options)
    assert done.exit_code == 0 and "resumes after epoch 1\n" in done.output


def test_inside_an_epoch_another_batch_size_goes_on_at_the_same_sample(tmp_path):
    def trained(size, heard):
        settings = {"epochs": 1, "batch_size": size, "checkpoint": tmp_path, "checkpoint_steps": 8}
        train(classifier(), TrainConfig(data="digits?split=test", **settings), heard.append)

    trained(40, [])  # nine steps
    whole = tmp_path / "1"
    for path in whole.iterdir():
        path.unlink()
    whole.rmdir()
    heard = []
    trained(20, heard)
    assert [e["step"] for e in heard if e["event"] == "resume"] == [16]
    assert [e["step"] for e in heard if e["event"] in ("tick", "step")] == [17, 18]
