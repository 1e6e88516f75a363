import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from test_strip import merged

from onnxslim_kd import model
from onnxslim_kd.cli import main


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model.save(merged(), tmp_path / "merged.onnx")
    return tmp_path / "merged.onnx"


def test_it_says_what_went_and_why_it_is_right(file: Path) -> None:
    output = file.with_name("student.onnx")
    result = run("infer-prune", file, "-o", output)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.replace(str(output), "").splitlines())) <= 80
    assert ["BatchNormalization", "1", "0"] in [line.split() for line in result.output.splitlines()]
    assert "Nodes less by step: dead code" in result.output
    assert "Note: 1 nodes switched from training to inference" in result.output
    assert "Proof: full checker; outputs within" in result.output
    assert "on 2 inputs\n  x 2x3x8x8, label 2\n" in result.output
    onnx.checker.check_model(str(output), full_check=True)


def test_json_and_nothing_else(file: Path) -> None:
    result = run("infer-prune", file, "-o", file.with_name("s.onnx"), "--json", "--fp16")
    said = json.loads(result.output)
    assert said["counts"]["Conv"] == [2, 1]
    assert said["proof"]["worst"] < said["proof"]["tolerance"]
    assert 0 < said["half"] < 0.01


def test_the_mobile_format_stands_beside(file: Path) -> None:
    output = file.with_name("s.onnx")
    assert run("infer-prune", file, "-o", output, "--format", "ort").exit_code == 0
    assert output.with_suffix(".ort").read_bytes()[4:8] == b"ORTM"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--softmax", "--sigmoid"], "give either --softmax or --sigmoid, not both"),
        (["--keep", "nobody"], "--keep nobody: the roles of this model are student, t"),
        (["--outputs", "z"], "'z' is not a value of the graph"),
        (["--input", "x=1x4x8x8"], "does not fit"),
    ],
)
def test_refusals(file: Path, options: list[str], said: str) -> None:
    result = run("infer-prune", file, "-o", file.with_name("s.onnx"), *options)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert not file.with_name("s.onnx").exists()


def test_no_file_is_overwritten_by_accident(file: Path) -> None:
    result = run("infer-prune", file, "-o", file)
    assert result.exit_code == 2
    assert "exists; choose another name or pass --force" in result.output
    result = run("infer-prune", file, "-o", file.with_suffix(".ort"))
    assert "name the .onnx file" in result.output
    assert run("infer-prune", file, "-o", file, "--force", "--no-verify").exit_code == 0
