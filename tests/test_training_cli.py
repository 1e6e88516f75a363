import json
import re

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from PIL import Image
from training_models import classifier, numbers, pair

from onnxslim_kd import model as model_io
from onnxslim_kd.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a classifier of digits that works."""
    folder = tmp_path_factory.mktemp("trained")
    model_io.save(classifier(16), folder / "raw.onnx")
    done = run("train", folder / "raw.onnx", "-o", folder / "model.onnx", "--epochs", 8,
               "--lr", 0.1, "--threads", 1, "--log", folder / "log.jsonl")  # fmt: skip
    assert done.exit_code == 0, done.output
    (folder / "said.txt").write_text(done.output)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_train_prints_plain_lines_and_logs_json(trained):
    said = (trained / "said.txt").read_text()
    assert "trains 7 tensors" in said and "epoch 1 step 20/22: loss" in said and "Wrote" in said
    events = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][:2] == ["start", "unreached"]
    assert events[-1]["event"] == "end"
    steps = [event for event in events if event["event"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[0]["samples_per_second"] > 0


def test_eval_agrees_with_training(trained):
    done = run("eval", trained / "model.onnx", "--json")
    found = json.loads(done.output)
    last = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    epoch = [event for event in last if event["event"] == "epoch"][-1]
    assert found["top1"] == pytest.approx(epoch["top1"]) and found["samples"] == 360
    assert found["top1"] > 85
    assert "top1" in run("eval", trained / "model.onnx").output


def test_eval_of_a_merged_model_measures_the_student(tmp_path):
    model_io.save(pair(), tmp_path / "pair.onnx")
    done = run("eval", tmp_path / "pair.onnx")
    assert done.exit_code == 0 and "360 samples" in done.output


def test_eval_feeds_a_model_with_a_fixed_batch(trained, tmp_path):
    model = model_io.load(trained / "model.onnx")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = type(value.shape)([7, *value.shape[1:]])
    model_io.save(model, tmp_path / "seven.onnx")
    found = [
        json.loads(run("eval", path, "--json").output)
        for path in (tmp_path / "seven.onnx", trained / "model.onnx")
    ]
    assert found[0] == found[1]


def test_infer_names_the_digits(trained, tmp_path):
    from sklearn.datasets import load_digits

    images = load_digits().images[:2]
    for number, image in enumerate(images):
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "names.txt").write_text("zero\none\n")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    options = ["--preprocess", "gray", "--labels", tmp_path / "names.txt", "--topk", 2]
    done = run("infer", trained / "model.onnx", *files, *options, "--json")
    lines = [json.loads(line) for line in done.output.splitlines()]
    assert [line["classes"][0]["name"] for line in lines] == ["zero", "one"]
    assert all(len(line["classes"]) == 2 for line in lines)
    assert "zero" in run("infer", trained / "model.onnx", *files, *options).output
    (tmp_path / "0.png").write_text("no image")
    done = run("infer", trained / "model.onnx", *files, *options)
    assert done.exit_code == 2 and "0.png: cannot identify image file" in done.output


def test_calibrate_restores_spoilt_statistics(trained, tmp_path):
    model = model_io.load(trained / "model.onnx")
    before = json.loads(run("eval", trained / "model.onnx", "--json").output)["top1"]
    for name in ("bn1_mean", "bn1_var"):
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(numbers(model)[name] * 3 + 1, name=name)
    model_io.save(model, tmp_path / "spoilt.onnx")
    spoilt = json.loads(run("eval", tmp_path / "spoilt.onnx", "--json").output)["top1"]
    done = run("calibrate", tmp_path / "spoilt.onnx", "-o", tmp_path / "new.onnx", "--data",
               "digits")  # fmt: skip
    assert "1 BatchNormalization re-estimated" in done.output
    after = json.loads(run("eval", tmp_path / "new.onnx", "--json").output)["top1"]
    assert spoilt < before - 10 and after > before - 2


def test_after_mutual_learning_either_network_ships(tmp_path):
    model_io.save(classifier(4), tmp_path / "small.onnx")
    model_io.save(classifier(8, seed=1), tmp_path / "large.onnx")
    losses = ["--loss", "dml:logits=logits", "--loss", "ce:logits", "--loss",
              "ce:teacher_logits,name=teacher_ce"]  # fmt: skip
    done = run("merge", tmp_path / "small.onnx", "--teacher", tmp_path / "large.onnx", *losses,
               "-o", tmp_path / "merged.onnx")  # fmt: skip
    assert done.exit_code == 0, done.output
    done = run("train", tmp_path / "merged.onnx", "-o", tmp_path / "trained.onnx", "--mutual",
               "--epochs", 6, "--lr", 0.1, "--threads", 1)  # fmt: skip
    assert done.exit_code == 0, done.output
    for keep, name in (("student", "small"), ("teacher", "large")):
        done = run("infer-prune", tmp_path / "trained.onnx", "--keep", keep, "-o",
                   tmp_path / f"{keep}.onnx")  # fmt: skip
        assert done.exit_code == 0, done.output
        before, after = (model_io.load(tmp_path / f"{n}.onnx") for n in (name, keep))
        assert [v.name for v in after.graph.inputs] == [v.name for v in before.graph.inputs]
        assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.outputs]
        scores = [
            json.loads(run("eval", tmp_path / f"{n}.onnx", "--json").output)["top1"]
            for n in (name, keep)
        ]
        assert scores[1] > scores[0] + 20, (keep, scores)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["raw.onnx", "-o", "model.onnx"], 2, "exists; choose another name or pass --force"),
        (["no.onnx", "-o", "x.onnx"], 2, "no.onnx: no such file"),
        (["raw.onnx", "-o", "x.onnx", "--data", "digts"], 2, "near misses: digits"),
        (["raw.onnx", "-o", "x.onnx", "--set", "epocs=1"], 2, "near misses: epochs"),
        (["raw.onnx", "-o", "x.onnx", "--lr", "1e30", "--epochs", "1"], 1, "is not finite"),
        (["raw.onnx", "-o", "x.onnx", "--device", "cuda"], 2, "torch finds no CUDA device here"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(trained, arguments, code, message):
    arguments = [trained / a if str(a).endswith(".onnx") else a for a in arguments]
    done = run("train", *arguments)
    assert done.exit_code == code and message in done.output
    assert "Error: " in done.output and not (trained / "x.onnx").exists()


def test_a_terminal_sees_a_bar_with_every_term(tmp_path):
    model_io.save(pair(), tmp_path / "pair.onnx")
    arguments = ["train", tmp_path / "pair.onnx", "-o", tmp_path / "out.onnx", "--epochs", 1]
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "200", "TERM": "xterm"}
    done = CliRunner().invoke(main, [str(a) for a in arguments], env=terminal)
    assert done.exit_code == 0, done.output
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.output)  # colours, and moves of the cursor
    assert re.search(r"epoch 1/1.*22/22 .*loss [\d.]+, kl [\d.]+, hint [\d.]+, \d+/s", said)
