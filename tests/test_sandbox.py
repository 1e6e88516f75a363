"""Files that nobody vouches for: what loading them may do, and what a child process catches."""

import random
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from onnxslim_kd import mapped, sandbox
from onnxslim_kd.cli import main
from onnxslim_kd.errors import ModelError
from onnxslim_kd.model import load
from tests.models import MODELS, proto

# 4 * 10^9 rounds of nothing: seconds to write, hours to run
ENDLESS = """n = Constant<value=int64 {4000000000}>() b = Constant<value=bool {1}>()
    z = Constant<value=float {0.0}>()
    s = Loop(n, b, z) <body = turn (int64 i, bool c, float a) => (bool d, float e) {
        d = Identity(c) e = Identity(a) }>
    y = Add(x, s)"""
HUGE = """n = Constant<value=int64[1] {100000000000}>() r = ConstantOfShape(n)
    s = ReduceSum<keepdims=0>(r) y = Add(x, s)"""
TWICE = "y = Relu(x) y = Neg(x)"


def written(tmp_path: Path, nodes: str) -> Path:
    path = tmp_path / "model.onnx"
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {{ {nodes} }}'
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def mutant(chance: random.Random) -> bytes:
    """A small model with some of its bytes changed, lost or added."""
    data = bytearray(proto(MODELS[chance.choice(list(MODELS))]).SerializeToString())
    how = chance.randrange(4)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at, size = chance.randrange(len(data)), chance.choice((1, 2, 8))
        if how == 0:
            data[at] = chance.randrange(256)
        elif how == 1:
            data[at] ^= 1 << chance.randrange(8)
        elif how == 2:
            del data[at : at + size]
        else:
            data[at:at] = chance.randbytes(size)
    return bytes(data)


def fuzz(path: Path, seed: int, count: int) -> tuple[int, int]:
    """How many mutants load, and how many are refused; any other end is an error."""
    chance, loaded, refused = random.Random(seed), 0, 0
    for _ in range(count):
        path.write_bytes(mutant(chance))
        try:
            load(path)
            loaded += 1
        except ModelError as error:
            assert "\n" not in str(error), error
            refused += 1
    return loaded, refused


def test_mutants_load_or_are_refused_in_one_sentence(tmp_path: Path) -> None:
    loaded, refused = fuzz(tmp_path / "mutant.onnx", seed=0, count=300)
    assert loaded > 50 and refused > 150


def test_mutants_of_mapped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "LARGE", 0)
    monkeypatch.setattr(mapped, "LEAST", 16)
    loaded, refused = fuzz(tmp_path / "mutant.onnx", seed=1, count=150)
    assert loaded > 20 and refused > 70


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_mutants(seed: int, tmp_path: Path) -> None:
    assert sum(fuzz(tmp_path / "mutant.onnx", seed, 3000)) == 3000


def test_values_from_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="node Add reads 'z', which is no graph input"):
        load(written(tmp_path, "y = Add(x, z)"))
    with pytest.raises(ModelError, match="graph output 'y' is the output of no node"):
        load(written(tmp_path, "z = Neg(x)"))


def test_a_good_file_passes(tmp_path: Path) -> None:
    path = tmp_path / "good.onnx"
    path.write_bytes(proto(MODELS["residual"]).SerializeToString())
    sandbox.check(path)


def test_what_takes_too_long(tmp_path: Path) -> None:
    path = written(tmp_path, ENDLESS)
    load(path)  # harmless until it runs
    with pytest.raises(ModelError, match=r"reading it took more than 5 s; not used$"):
        sandbox.check(path, seconds=5)


def test_what_takes_too_much_memory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"takes more memory than it may; not used$"):
        sandbox.check(written(tmp_path, HUGE), memory=2**30)


def test_what_kills_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -ABRT $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killer))
    with pytest.raises(ModelError, match=r"its reader crashed \(SIGABRT\) under limits of 60 s"):
        sandbox.check(tmp_path / "model.onnx")
    killer.write_text("#!/bin/sh\necho not an answer\nexit 3\n")
    with pytest.raises(ModelError, match="its reader ended with code 3"):
        sandbox.check(tmp_path / "model.onnx")


def test_what_the_checker_refuses(tmp_path: Path) -> None:
    path = written(tmp_path, TWICE)
    with pytest.raises(ModelError, match="y") as caught:
        sandbox.check(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["inspect", "prune", "infer-prune", "bench", "merge"])
def test_commands_try_untrusted_files_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> None:
        raise ModelError(f"{path}: tried")

    monkeypatch.setattr(sandbox, "check", refuse)
    more = {
        "prune": ["--pattern", ".*", "-o", "out.onnx"],
        "infer-prune": ["-o", "out.onnx"],
        "merge": ["--teacher", "model.onnx", "-o", "out.onnx"],
    }
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "y = Relu(x)")
    arguments = [command, "model.onnx", "--untrusted", *more.get(command, [])]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.output) == (2, "Error: model.onnx: tried\n")
