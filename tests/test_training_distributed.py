import os
import subprocess
import sys

import numpy as np
import pytest
from training_models import classifier, numbers, pair

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.training.data import Loader
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.transforms import Preprocess

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OPTIONS = ["--epochs", "1", "--lr", "0.1", "--seed", "3", "--threads", "1"]


def launch(folder, *arguments, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, "-m", "onnxslim_kd", "train", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )


def run(folder, *arguments, launcher=()):
    done = launch(folder, *arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one_does(tmp_path):
    model_io.save(pair(), tmp_path / "pair.onnx")
    options = [*OPTIONS, "--set", "sync_bn=true"]
    run(tmp_path, "pair.onnx", "-o", "one.onnx", *options)
    said = run(tmp_path, "pair.onnx", "-o", "two.onnx", *options, launcher=TORCHRUN)
    one, two = (numbers(model_io.load(tmp_path / name)) for name in ("one.onnx", "two.onnx"))
    start = numbers(pair())
    assert "step 22" in said and said.count("Wrote") == 1
    for name, value in one.items():
        assert np.allclose(value, two[name], atol=1e-4), name
    assert np.abs(one["conv1_weights"] - start["conv1_weights"]).max() > 1e-2


def test_every_sample_goes_to_one_process():
    source = open_source("digits")
    loaders = [Loader(source, Preprocess(), 32, shard=(rank, 2)) for rank in range(2)]
    alone = next(iter(Loader(source, Preprocess(), 32).train(epoch=1, start=3)))
    parts = [next(iter(loader.train(epoch=1, start=3))) for loader in loaders]
    assert [*parts[0].indices, *parts[1].indices] == alone.indices


def test_the_batch_must_divide_by_the_processes():
    with pytest.raises(UserError, match="batch_size 33 does not divide by 2 processes"):
        Loader(open_source("digits"), Preprocess(), 33, shard=(0, 2))


ONCE = """
import os
from onnxslim_kd.training.datasets import open_source

class Dies:
    def __init__(self):
        self.source, self.reads = open_source("digits"), 0

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 1000 and os.environ["RANK"] == "1" and not os.path.exists("died"):
            open("died", "w").close()
            os._exit(1)
        return self.source.sample(index, [0])
"""


@pytest.mark.slow
def test_after_a_worker_died_a_launch_or_restart_goes_on(tmp_path, monkeypatch):
    (tmp_path / "dies_once.py").write_text(ONCE)
    model_io.save(pair(), tmp_path / "pair.onnx")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["pair.onnx", *OPTIONS, "--checkpoint-steps", "5", "--data", "dies_once:Dies"]
    options[options.index("--epochs") + 1] = "2"
    died = launch(tmp_path, *options, "-o", "a.onnx", "--checkpoint", "a", launcher=TORCHRUN)
    assert died.returncode != 0 and (tmp_path / "died").exists()
    said = run(tmp_path, *options, "-o", "a.onnx", "--checkpoint", "a", launcher=TORCHRUN)
    assert "resumes after epoch 1" in said
    (tmp_path / "died").unlink()
    elastic = [*TORCHRUN, "--max-restarts", "1"]
    said = run(tmp_path, *options, "-o", "b.onnx", "--checkpoint", "b", launcher=elastic)
    assert "resumes after epoch 1" in said
    a, b = (numbers(model_io.load(tmp_path / name)) for name in ("a.onnx", "b.onnx"))
    assert all(np.array_equal(value, b[name]) for name, value in a.items())


UNEVEN = """
import os
from onnxslim_kd.training.datasets import open_source

class Uneven:
    def __init__(self):
        self.source = open_source("digits")

    def __len__(self):
        return len(self.source) - 100 * int(os.environ["RANK"])

    def __getitem__(self, index):
        return self.source.sample(index, [0])
"""


def test_processes_that_see_different_data_are_refused(tmp_path):
    (tmp_path / "uneven.py").write_text(UNEVEN)
    model_io.save(pair(), tmp_path / "pair.onnx")
    options = ["pair.onnx", "-o", "out.onnx", *OPTIONS, "--data", "uneven:Uneven"]
    done = launch(tmp_path, *options, launcher=TORCHRUN)
    assert "Error: the processes see different data, of 1437, 1337 samples" in done.stderr
    assert done.returncode != 0 and not (tmp_path / "out.onnx").exists()


UNREADABLE = """
import numpy as np
from onnxslim_kd.training.datasets import open_source

order = np.random.default_rng([3, 0]).permutation(1437)  # of seed 3, epoch 0
SOME = set(order[70:88].tolist())
PARTS = SOME | {*order[16:32].tolist(), *order[96:128].tolist()}

class Unreadable:
    '''Bad: some of step 2, of each part another count; PARTS: of step 0 one part, all of 3.'''

    def __init__(self, bad="PARTS"):
        self.source, self.bad = open_source("digits"), globals()[bad]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("torn")
        return self.source.sample(index, [0])
"""


@pytest.mark.parametrize(
    ("bad", "bn"), [("PARTS", ["--bn", "frozen"]), ("SOME", ["--set", "sync_bn=true"])]
)
def test_a_process_with_less_or_nothing_to_read_follows_the_others(tmp_path, monkeypatch, bad, bn):
    (tmp_path / "unreadable.py").write_text(UNREADABLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model_io.save(classifier(), tmp_path / "net.onnx")
    data = ["--data", f"unreadable:Unreadable?bad={bad}", "--batch-size", "32", "--max-bad", "100"]
    options = ["net.onnx", *OPTIONS, *data, *bn]
    run(tmp_path, *options, "-o", "one.onnx")
    run(tmp_path, *options, "-o", "two.onnx", launcher=TORCHRUN)
    one, two = (numbers(model_io.load(tmp_path / name)) for name in ("one.onnx", "two.onnx"))
    for name, value in one.items():
        assert np.allclose(value, two[name], atol=1e-5), name
    assert np.abs(one["conv1_weights"] - numbers(classifier())["conv1_weights"]).max() > 1e-2


def test_synchronised_statistics_need_a_sample_of_every_process(tmp_path, monkeypatch):
    (tmp_path / "unreadable.py").write_text(UNREADABLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model_io.save(classifier(), tmp_path / "net.onnx")
    data = ["--data", "unreadable:Unreadable", "--batch-size", "32", "--max-bad", "100"]
    options = ["net.onnx", "-o", "out.onnx", *OPTIONS, *data, "--set", "sync_bn=true"]
    done = launch(tmp_path, *options, launcher=TORCHRUN)
    assert "process 1 can read 0 samples of a batch, and sync_bn needs 1" in done.stderr
    assert done.returncode != 0 and not (tmp_path / "out.onnx").exists()
