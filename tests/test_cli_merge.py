import json
import re
import xml.etree.ElementTree as ET

import onnx
import pytest
from click.testing import CliRunner
from merge_models import net, saved

from onnxslim_kd import roles
from onnxslim_kd.cli import main
from onnxslim_kd.model import load


@pytest.fixture
def pair(tmp_path):
    return saved(tmp_path, student=net(), teacher=net(width=6, x="image", seed=1))


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_merge_writes_and_says_what(pair, tmp_path):
    output = tmp_path / "merged.onnx"
    printed = call(
        "merge", pair[0], "--teacher", pair[1], "--loss", "l2:y=y,weight=2",
        "--loss", "l1:y=y,start=5,end=9", "--loss", "kl:y=y,start=3", "-o", output
    )  # fmt: skip
    onnx.checker.check_model(output, full_check=True)
    cells = [re.split(r"  +", line) for line in printed.splitlines()[1:4]]
    assert [row[:4] for row in cells] == [
        ["l2", "l2", "2", "all"], ["l1", "l1", "1", "5 to 9"], ["kl", "kl", "1", "from 3"]
    ]  # fmt: skip
    assert "teacher: input image reads x" in printed
    assert "2 values equal bit for bit at 2 input sizes" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80 + len(str(output))


def test_merge_with_all_options(pair, tmp_path):
    output = tmp_path / "merged.onnx"
    arguments = ["--teacher", pair[1], "--prefix", "t_", "--map", "image=x", "--seed", 1]
    arguments += ["--adapt", "mean=0.5", "--input", "x=4x3x8x8", "--external-data", "--json"]
    printed = call("merge", pair[0], *arguments, "--loss", "kl:y=y", "-o", output)
    result = json.loads(printed)
    assert result["proof"]["sizes"] == [{"x": [4, 3, 8, 8]}]
    assert result["roles"]["teachers"][0]["inputs"] == {"image": "t_image"}
    assert (tmp_path / "merged.onnx.data").exists()
    assert roles.read(load(output)).teachers[0].prefix == "t_"


def test_several_teachers(pair, tmp_path):
    output = tmp_path / "merged.onnx"
    arguments = ["--teacher", f"big={pair[1]}", "--teacher", f"same={pair[0]}", "--no-verify"]
    call(
        "merge", pair[0], *arguments, "--loss", "l2:y=big_y", "--loss", "l2:y=same_y", "-o", output
    )
    assert [t.name for t in roles.read(load(output)).teachers] == ["big", "same"]


def test_free_batch(tmp_path):
    pair = saved(tmp_path, student=net(), teacher=net(batch=1, seed=1))
    output = tmp_path / "merged.onnx"
    call("merge", pair[0], "--teacher", pair[1], "--free-batch", "--loss", "l2:y=y", "-o", output)
    assert load(output).graph.inputs[0].shape[0] == "N"


def test_suggest_prints_losses_to_copy(pair, tmp_path):
    printed = call("merge", pair[0], "--teacher", pair[1], "--suggest")
    assert "--loss 'kl:y=y'" in printed
    listed = json.loads(call("merge", pair[0], "--teacher", pair[1], "--suggest", "--json"))
    assert listed["teacher"][0]["score"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"student.onnx", "teacher.onnx"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "l2:y=q"], "Error: the teacher has no value 'q'"),
        (["--loss", "l2:y=y", "--map", "image"], "--map image: expected"),
        (["--loss", "l2:y=y", "--adapt", "size=3"], "unknown key 'size'"),
        (["--loss", "l2:y=y", "--teacher", "x.onnx"], "two teachers are called 'teacher'"),
        (["--loss", "l2:y=y", "--prefix", ""], "--prefix '': give a name"),
        ([], "at least one loss"),
    ],
)
def test_refusals_are_one_sentence_and_write_nothing(pair, tmp_path, arguments, message):
    output = tmp_path / "merged.onnx"
    printed = call("merge", pair[0], "--teacher", pair[1], *arguments, "-o", output, code=2)
    assert message in printed
    assert printed.count("\n") == 1
    assert not output.exists()


def test_files_are_not_replaced_by_accident(pair):
    arguments = ["merge", pair[0], "--teacher", pair[0], "--loss", "l2:y=y", "-o", pair[1]]
    assert "exists" in call(*arguments, code=2)
    call(*arguments, "--force")
    assert roles.read(load(pair[1])) is not None


def test_an_output_or_suggestions(pair):
    assert "-o" in call("merge", pair[0], "--teacher", pair[1], "--loss", "l2:y=y", code=2)


def test_draw_writes_a_picture(pair, tmp_path):
    output = tmp_path / "graph.svg"
    assert call("draw", pair[0], "-o", output) == f"Wrote {output}\n"
    assert ET.fromstring(output.read_text()).tag.endswith("svg")
    call("draw", pair[0], "-o", output, code=2)
