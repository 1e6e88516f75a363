"""The prune and inspect commands: texts and exit codes, and nothing left behind on bad input."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from onnxslim_kd.cli import main
from tests.models import MODELS, proto


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(proto(MODELS["residual"]), path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *texts: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1 or "Usage" in result.stderr
    for text in texts:
        assert text in result.stderr


def test_prune_prints_what_it_did(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = run("prune", model, "--pattern", "w", "--ratio", "0.5", "--round-to", "1", "-o", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"^w1 +8 +4 +50%", result.stdout, re.MULTILINE)
    assert re.search(r"^w2 +graph output y", result.stdout, re.MULTILINE)
    assert "Verified: 1 output and" in result.stdout
    assert f"Wrote {out}" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:12])) <= 80
    onnx.checker.check_model(out, full_check=True)


def test_json_plan_and_replay(model: Path, tmp_path: Path) -> None:
    plan, first, second = tmp_path / "plan.json", tmp_path / "a.onnx", tmp_path / "b.onnx"
    common = ("--pattern", "w1", "--round-to", "1", "--json")
    result = run("prune", model, *common, "-o", first, "--save-plan", plan)
    data = json.loads(result.stdout)
    assert data["after"]["parameters"] < data["before"]["parameters"]
    assert data["verified"]["error"] <= data["verified"]["tolerance"]
    assert run("prune", model, "--plan", plan, "-o", second).exit_code == 0
    assert first.read_bytes() == second.read_bytes()


def test_scores_that_are_infinite_are_json(model: Path, tmp_path: Path) -> None:
    parsed = onnx.load(model)
    weight = next(i for i in parsed.graph.initializer if i.name == "w1")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[1] = np.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "w1"))
    onnx.save(parsed, model)
    plan = tmp_path / "plan.json"
    given = ("--pattern", "w1", "--dry-run", "--save-plan", plan, "--json", "--round-to", "1")
    result = run("prune", model, *given)
    json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert run("prune", model, "--plan", plan, "--dry-run").exit_code == 0


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run("prune", model, "--pattern", "w", "--dry-run")
    assert result.exit_code == 0
    assert "Dry run: nothing was written." in result.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_the_tutorials_lists(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    given = ("--pruned-params", "w1,w3", "--pruned-ratios", "0.25,0.5", "--round-to", "1")
    result = run("prune", model, *given, "-o", out)
    assert result.exit_code == 0
    assert "w3 shares channels with w1: its ratio 0.5 gives way to 0.25" in result.stdout
    weights = {i.name: list(i.dims) for i in onnx.load(out).graph.initializer}
    assert weights["w1"] == [6, 3, 3, 3]


@pytest.mark.parametrize("wanted", [("--pattern", "w"), ("--ratios", "w1=0.5,w3=0.5")])
def test_what_is_ignored_stays_whoever_shares_it(model: Path, wanted: tuple[str, str]) -> None:
    result = run("prune", model, *wanted, "--ignore", "w3", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["plan"]
    reasons = {refusal["parameter"]: refusal["reason"] for refusal in plan["refused"]}
    assert reasons["w1"] == "--ignore keeps the channels of w3"
    assert not any(group["removed"] for group in plan["groups"])


def test_every_channel_pinned_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(proto(MODELS["unknown-operator"]), path)
    result = run("prune", path, "--pattern", "w", "--dry-run")
    assert "Nothing can be removed: every channel asked for must stay." in result.stdout
    assert "no rule for Det" in result.stdout


BAD_CHOICES = [
    (("--pattern", "("), "pattern '(' is not a regular expression"),
    (("--pattern", "conv9"), "pattern 'conv9' matches no parameter"),
    (("--pattern", "w", "--ratio", "1"), "a ratio must be in [0, 1), got 1"),
    (("--pattern", "w", "--ratio", "-0.1"), "a ratio must be in [0, 1), got -0.1"),
    (("--pattern", "w", "--ratio", "nan"), "a ratio must be in [0, 1), got nan"),
    (("--ratios", "w1=0.5,w9=0.5"), "no parameter or node is called 'w9'; near misses:"),
    (("--ratios", "w1"), "expected a form such as conv1_weights=0.3"),
    (("--pruned-params", "w1,w3", "--pruned-ratios", "0.5"), "2 names and --pruned-ratios 1"),
    (("--pruned-params", "w1"), "--pruned-params and --pruned-ratios go together"),
    (("--pattern", "w", "--ratios", "w1=0.5"), "give either a pattern"),
    ((), "give either a pattern"),
    (("--ratios", "w1=0.5,w1=0.25"), "--ratios: w1 is named twice"),
    (("--pruned-params", "w1,w1", "--pruned-ratios", "0.5,0.2"), "w1 is named twice"),
    (("--pattern", "w", "--input", "x=1x3x8x8", "--input", "x=1x3x9x9"), "x is named twice"),
    (("--ratios", "w1=0.5", "--ratio", "0.3"), "give either --ratio or --ratios"),
    (("--pattern", "w", "--ratio", "0.3", "--target-macs", "0.3"), "or --target-macs"),
    (("--plan", "p.json", "--ignore", "w", "--round-to", "8"), "out --ignore and --round-to"),
    (("--pattern", "w", "--criterion", "best"), "criterion 'best' is not one of l1, l2"),
    (("--pattern", "w1", "--criterion", "bn-scale"), "no BatchNormalization follows w1"),
    (
        ("--pattern", "w1", "--criterion", "bn-scale", "--group-score", "mean"),
        "no BatchNormalization follows w1",
    ),
    (("--pattern", "w", "--free-output", "z"), "the model's outputs are y"),
    (("--pattern", "w", "--input", "z=1x3x8x8"), "the model's inputs are x"),
    (("--pattern", "w", "--input", "x=1x4x8x8"), "does not fit the model's [N, 3, 8, 8]"),
    (("--pattern", "w", "--input", "x=1xC"), "expected a form such as image=1x3x224x224"),
    (("--pattern", "w", "--pass", "nowhere:f"), "nowhere"),
    (("--plan", "missing.json"), "missing.json: cannot be read"),
]


@pytest.mark.parametrize(("given", "text"), BAD_CHOICES, ids=[t for _, t in BAD_CHOICES])
def test_bad_choices(model: Path, tmp_path: Path, given: tuple[str, ...], text: str) -> None:
    out = tmp_path / "out.onnx"
    refused(run("prune", model, *given, "-o", out), text)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_plan_for_another_model(model: Path, tmp_path: Path) -> None:
    plan, other = tmp_path / "plan.json", tmp_path / "other.onnx"
    run("prune", model, "--pattern", "w", "--round-to", "1", "--dry-run", "--save-plan", plan)
    onnx.save(proto(MODELS["concat"]), other)
    result = run("prune", other, "--plan", plan, "-o", tmp_path / "out.onnx")
    refused(result, "the plan was made for another model")
    plan.write_text("{}")
    refused(run("prune", model, "--plan", plan, "-o", tmp_path / "x.onnx"), "not a pruning plan")


def test_bad_outputs(model: Path, tmp_path: Path) -> None:
    common = ("prune", model, "--pattern", "w", "-o")
    refused(run(*common, model), "is the input itself; choose another output")
    refused(run(*common, tmp_path / "no" / "out.onnx"), "does not exist; create it first")
    (tmp_path / "there.onnx").write_text("mine")
    refused(run(*common, tmp_path / "there.onnx"), "exists; choose another name or pass --force")
    assert (tmp_path / "there.onnx").read_text() == "mine"
    assert run(*common, tmp_path / "there.onnx", "--force").exit_code == 0
    refused(run("prune", model, "--pattern", "w"), "give -o FILE")
    out, plan = tmp_path / "out.onnx", "--save-plan"
    refused(run(*common, out, plan, model, "--force"), "is the input itself")
    refused(run(*common, out, plan, out, "--force"), "both for the model and for the plan")
    assert not out.exists()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "nowhere.onnx")
    refused(run(*common, tmp_path / "link.onnx"), "exists; choose another name")


def test_a_device_is_not_replaced_by_a_file(model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # a device needs privileges
    refused(run("prune", model, "--pattern", "w", "-o", pipe, "--force"), "a device or a pipe")
    assert pipe.is_fifo()


def test_names_in_any_script(model: Path, tmp_path: Path) -> None:
    parsed = onnx.load(model)
    for node in parsed.graph.node:
        node.input[:] = ["gewichtß コ" if name == "w1" else name for name in node.input]
    next(i for i in parsed.graph.initializer if i.name == "w1").name = "gewichtß コ"
    folder = tmp_path / "ein Ordner ü"
    folder.mkdir()
    onnx.save(parsed, folder / "m ö.onnx")
    command = [sys.executable, "-m", "onnxslim_kd", "prune", "m ö.onnx", "--pattern", "gewicht"]
    plain = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "POSIX"}
    plain["PYTHONCOERCECLOCALE"] = "0"  # as where a system's encoding is not UTF-8
    more = ["--save-plan", "plän.json", "-o", "aus ß.onnx"]
    done = subprocess.run(
        [*command, *more], cwd=folder, env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert r"gewicht\xdf \u30b3" in done.stdout
    replay = ("--plan", folder / "plän.json", "-o", folder / "b.onnx")
    assert run("prune", folder / "m ö.onnx", *replay).exit_code == 0
    assert (folder / "b.onnx").read_bytes() == (folder / "aus ß.onnx").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_output_that_cannot_be_written_is_one_sentence(model: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "onnxslim_kd", "inspect", model]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "No space left on device" in done.stderr


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to write to")
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512));"
        "from onnxslim_kd.cli import main; main()"
    )
    out = tmp_path / "out.onnx"
    command = [sys.executable, "-c", code, "prune", model, "--pattern", "w", "-o", out]
    done = subprocess.run([*command, "--no-verify"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_inspect(model: Path, tmp_path: Path) -> None:
    result = run("inspect", model)
    assert re.search(r"^w1 +8x3x3x3 +0 +0 +8 units", result.stdout, re.MULTILINE)
    assert "graph output y" in result.stdout
    listed = json.loads(run("inspect", model, "--json").stdout)
    assert {row["parameter"] for row in listed["list"]} == {"w1", "w2", "w3"}
    story = run("inspect", model, "--explain", "w2").stdout
    assert "w2 (axis 0) must stay: graph output y" in story
    assert re.search(r"^h +float\[N,8,8,8\]", run("inspect", model, "--values").stdout, re.M)
    assert run("inspect", model, model, "--values").stdout.count("float[N,4,8,8]") == 2
    longer = tmp_path / f"{'m' * 60}.onnx"
    longer.write_bytes(model.read_bytes())
    lines = run("inspect", model, longer, "--values").stdout.splitlines()
    assert lines[0].endswith(f"and below each value the one of {longer.name}")
    assert [line.split() for line in lines[1:3]] == [["h", "float[N,8,8,8]"]] * 2


def _group(value: object) -> Callable[[onnx.GraphProto], object]:
    return lambda g: g.node[0].attribute.append(onnx.helper.make_attribute("group", value))


def _dims(*sizes: int) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        for dim, size in zip(graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
            dim.dim_value = size

    return change


BROKEN: dict[str, tuple[Callable[[onnx.GraphProto], object], str]] = {
    "an attribute of another type": (_group("eight"), "Mismatched attribute type"),
    "no groups": (_group(0), "does not run"),
    "groups that do not divide": (_group(5), "does not run"),
    "an input without a shape": (
        lambda g: g.input[0].type.tensor_type.ClearField("shape"),
        "'shape' of 'type' is required",
    ),
    "a value that is something else": (
        lambda g: g.value_info.append(onnx.helper.make_tensor_value_info("h", 1, [1, 99, 2])),
        "differ in rank",
    ),
    "a huge input": (_dims(1, 3, 2**62, 8), "is too large to be made up"),
    "text that is none": (
        lambda g: g.node[0].attribute.add(name="auto_pad", type=3, s=b"\x83SAME"),
        "malformed ONNX: Value of attribute",
    ),
    "what nothing writes": (lambda g: g.node[0].input.__setitem__(0, "z"), "reads 'z'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_is_told_in_one_sentence(tmp_path: Path, what: str) -> None:
    broken = proto(MODELS["residual"])
    change, text = BROKEN[what]
    change(broken.graph)
    onnx.save(broken, tmp_path / "broken.onnx")
    result = run("prune", tmp_path / "broken.onnx", "--pattern", ".*", "-o", tmp_path / "a.onnx")
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    assert text in result.stderr and result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["broken.onnx"]


def test_patterns_try_nodes_and_scopes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    parsed = proto(MODELS["residual"])
    for node in parsed.graph.node:
        if node.op_type == "Conv" and "w3" in node.input:
            node.name = "/layer1/conv2/Conv"
            entry = node.metadata_props.add()
            entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'body.block.0']"
    onnx.save(parsed, path)
    for pattern in ("/layer1/conv2", "body.block", "w3"):
        result = run("inspect", path, "--pattern", pattern, "--json")
        assert [row["parameter"] for row in json.loads(result.stdout)["list"]] == ["w3"], pattern


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "inspect", tmp_path / "none.onnx")
    assert result.exception is not None and "no such file" in str(result.exception)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.process_time();"
        "from click.testing import CliRunner; from onnxslim_kd.cli import main;"
        "r = CliRunner().invoke(main, ['--help']); assert r.exit_code == 0;"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'scipy', 'numpy'} & set(sys.modules);"
        "import onnxslim_kd; heavy2 = {'torch', 'onnxruntime'} & set(sys.modules);"
        "print(time.process_time(), heavy, heavy2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *rest = done.stdout.split(maxsplit=1)
    assert rest == ["set() set()\n"]
    assert float(seconds) < 0.4


def test_pruning_imports_what_it_needs_and_no_more() -> None:
    code = (
        "import sys; from onnxslim_kd import api;"
        "print({'torch', 'onnxruntime', 'scipy', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_seeded_noise_is_the_same_everywhere(model: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        run(
            "prune", model, "--pattern", "w", "--criterion", "random", "--round-to", "1", "-o", path
        )
    first, second = (
        {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(p).graph.initializer}
        for p in paths
    )
    assert all(np.array_equal(first[n], second[n]) for n in first)
