"""bench: the library and the command."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxslim_kd import bench as bench_module
from onnxslim_kd import machine, runtime
from onnxslim_kd import model as model_io
from onnxslim_kd.bench import Ratio, Row, Setting, bench
from onnxslim_kd.cli import main
from onnxslim_kd.difference import Difference
from onnxslim_kd.errors import ModelError, OperationError, UserError
from onnxslim_kd.profile import Operator, by_node, by_type, profile
from onnxslim_kd.statistics import Latency
from onnxslim_kd.workload import workloads
from tests.test_cuda import missing

QUICK = Setting(rounds=5, seconds=0.1, threads=1)
MACS = 8 * 8 * 9 * 16 * 16
"""Of one convolution in `net`."""


def net(depth=1, *, x="float[N, 8, 16, 16] x", y="float[N, 8, 16, 16] y"):
    """A row of equal convolutions with Relu."""
    rng = np.random.default_rng(0)
    values = [", ".join(f"{v:.4f}" for v in rng.standard_normal(576) / 8) for _ in range(depth)]
    weights = ", ".join(f"float[8, 8, 3, 3] w{n} = {{{v}}}" for n, v in enumerate(values))
    rows, last = [], x.split()[-1]
    for n in range(depth):
        out = y.split()[-1] if n == depth - 1 else f"r{n}"
        rows.append(f"[conv{n}] c{n} = Conv <pads = [1, 1, 1, 1]> ({last}, w{n})")
        rows.append(f"[relu{n}] {out} = Relu(c{n})")
        last = out
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["": 17]> net{depth} ({x}) => ({y}) <{weights}>'
        f" {{ {' '.join(rows)} }}"
    )


@pytest.fixture
def files(tmp_path):
    for depth in (2, 8):
        model_io.save(net(depth), tmp_path / f"net{depth}.onnx")
    return str(tmp_path / "net8.onnx"), str(tmp_path / "net2.onnx")


def test_the_smaller_model_is_faster_and_its_outputs_are_said_to_differ(files):
    found = bench(files, setting=QUICK)
    assert [model.name for model in found.models] == ["net8.onnx", "net2.onnx"]
    assert [model.parameters for model in found.models] == [8 * 576, 2 * 576]
    (case,) = found.cases
    assert dict(case.shapes) == {"x": (1, 8, 16, 16)}
    assert [row.macs for row in case.rows] == [8 * MACS, 2 * MACS]
    assert case.rows[0].ratio == Ratio(1, 1, 1)
    assert case.rows[1].ratio.median < 0.9
    assert case.rows[1].verdict.startswith("faster, but top-1 agreement")
    assert found.ran_on == "CPUExecutionProvider" and found.setting.threads == 1


def test_the_report_is_json(files):
    found = bench(files, batches=[1, 2], setting=QUICK)
    data = json.loads(found.to_json())
    assert [case["shapes"]["x"][0] for case in data["cases"]] == [1, 2]
    assert len(data["cases"][0]["rows"][0]["milliseconds"]) >= 5
    assert "python" in data["environment"]["versions"]


def test_a_model_against_itself_has_the_same_outputs():
    row = bench([net(), net()], setting=QUICK).cases[0].rows[1]
    assert row.difference.same and row.difference.agreement == 1
    assert "but" not in row.verdict


def row(ratio, difference=None):
    difference = difference or Difference(None, 0, 0)
    return Row("m", Latency(1, 1, 1, 1), Ratio(*ratio), 0, difference, ())


def test_verdicts():
    def verdict(ratio, difference):
        return row(ratio, difference).verdict

    same, far = Difference(None, 0, 0), Difference(None, 3.0, 0.5)
    assert verdict((0.6, 0.5, 0.7), same) == "faster"
    assert verdict((1.2, 1.1, 1.3), same) == "slower"
    assert verdict((0.98, 0.9, 1.1), same) == "no difference in speed seen"
    assert (
        verdict((0.6, 0.5, 0.7), far)
        == "faster, but largest difference 3 (50.00% of the range)"
    )  # fmt: skip


def test_given_inputs_are_fed():
    feeds = {"x": np.zeros((3, 8, 16, 16), np.float32)}
    case = bench([net()], inputs=feeds, setting=QUICK).cases[0]
    assert case.shapes["x"] == (3, 8, 16, 16) and case.rows[0].macs == MACS


def test_names_stay_apart(files, tmp_path):
    (tmp_path / "sub").mkdir()
    model_io.save(net(2), tmp_path / "sub" / "net2.onnx")
    twice = [files[1], tmp_path / "sub" / "net2.onnx", files[1]]
    names = [model.name for model in bench(twice, setting=QUICK).models]
    assert names == [f"{files[1]} #1", str(tmp_path / "sub" / "net2.onnx"), f"{files[1]} #3"]


def test_size_counts_external_data(tmp_path):
    model_io.save(net(8), tmp_path / "big.onnx", external_data=True)
    (model,) = bench([tmp_path / "big.onnx"], setting=QUICK).models
    assert model.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"x": "float[N, 8, 16, 16] z"}, "net1 #1 has the input x, net1 #2 has not"),
        ({"y": "float[N, 8, 16, 16] out"}, "net1 #1 has the output y, net1 #2 has not"),
        ({"x": "float[N, 8, 12, 16] x"}, r"input x is tensor\(float\) \['N', 8, 16, 16\] in net1"),
        ({"x": "float[2, 8, 16, 16] x"}, r"and tensor\(float\) \[2, 8, 16, 16\] in net1 #2"),
    ],
)
def test_different_interfaces_are_refused(other, text):
    with pytest.raises(UserError, match=f"cannot be compared: .*{text}"):
        bench([net(), net(**other)], setting=QUICK)


def test_different_types_are_refused():
    models = [
        ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]> g ({t}[2] x) => ({t}[2] y)'
                          " { y = Neg(x) }")
        for t in ("float", "float16")
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"input x is tensor\(float\) .* tensor\(float16\)"):
        bench(models, setting=QUICK)


def test_bad_settings():
    with pytest.raises(UserError, match="rounds must be at least 5, got 1"):
        Setting(rounds=1)
    with pytest.raises(UserError, match="threads must be at least 0 and seconds above 0"):
        Setting(seconds=float("nan"))
    with pytest.raises(UserError, match="give at least one model"):
        bench([])


@pytest.mark.skipif(not missing(), reason="there is a GPU here, see test_cuda.py")
def test_no_silent_fallback():
    with pytest.raises(UserError, match="provider cuda"):
        bench([net()], setting=Setting("cuda"))


def test_too_many_threads_are_said(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 1)
    case = bench([net()], setting=Setting(threads=2, rounds=5, seconds=0.1)).cases[0]
    assert "2 threads share 1 cores" in case.notes


def test_sessions_do_not_spin_after_a_run(monkeypatch):
    asked = []
    real = runtime.Session
    monkeypatch.setattr(
        bench_module.runtime, "Session", lambda *a, **k: asked.append(k) or real(*a, **k)
    )
    bench([net()], setting=QUICK)
    assert asked == [{"provider": "cpu", "threads": 1, "spin": False}]


def test_a_bound_call_runs_the_model_and_says_when_it_fails():
    graph = "(float[N, 4] x, int64[2] s) => (float[A, B] y) { y = Reshape(x, s) }"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]> g {graph}')
    x = np.ones((2, 4), np.float32)
    session = runtime.Session(model)
    session.bind({"x": x, "s": np.array([4, 2])})()
    with pytest.raises(OperationError, match="failed while running"):
        session.bind({"x": x, "s": np.array([3, 2])})()


def test_models_whose_values_cannot_be_bound_are_measured():
    graphs = (
        "(float[2, 4] x) => (seq(float[2, 2]) y) <int64 s = {2}> { y = SplitToSequence(x, s) }",
        "(float[N] x) => (string[N] y) { y = Cast<to=8>(x) }",
        "(float x) => (float y) { y = Relu(x) }",
        "() => (float[4] y) <float[4] c = {1, 2, 3, 4}> { y = Relu(c) }",
    )
    for graph in graphs:
        model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]> g {graph}')
        (row,) = bench([model], setting=QUICK).cases[0].rows
        assert row.latency.median > 0


# ------------------------------------------------------------------------------ profile


def test_profile_names_layers_whatever_the_runtime_fused():
    (operators,) = profile([net(3)], {"x": np.zeros((1, 8, 16, 16), np.float32)}, threads=1)
    named = {operator.name: operator for operator in operators}
    assert {"conv0", "conv1", "conv2"} <= named.keys()
    assert all(named[f"conv{n}"].milliseconds > 0 for n in range(3))
    assert named["conv0"].provider == "CPUExecutionProvider"


def test_profiles_are_compared_by_type_and_by_node():
    feeds = {"x": np.zeros((1, 8, 16, 16), np.float32)}
    long, short = profile([net(3), net(1)], feeds, threads=1)
    slowest = by_type([long, short])[0]
    assert slowest.count == (3, 1) and slowest.milliseconds[0] > slowest.milliseconds[1]
    nodes = {change.name: change for change in by_node([long, short])}
    assert nodes["conv2"].count == (1, 0) and nodes["conv2"].milliseconds[1] == 0
    moved = [abs(c.milliseconds[0] - c.milliseconds[1]) for c in by_node([long, short])]
    assert moved == sorted(moved, reverse=True)


def test_nodes_that_ran_elsewhere_are_said(monkeypatch):
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    operators = (Operator("conv0", "Conv", cuda, 1.0), Operator("topk", "TopK", cpu, 1.0))
    monkeypatch.setattr(bench_module, "profile", lambda *a, **k: [operators])
    monkeypatch.setitem(runtime.PROVIDERS, "cpu", cuda)
    case = bench_module.Case({}, (row((1, 1, 1)),), ("noisy",))
    notes = bench_module._profiled(case, [net()], workloads(net())[0], QUICK).notes
    assert notes == (
        "noisy",
        "m: 1 of 2 nodes did not run on CUDAExecutionProvider,"
        " the first is topk (TopK, CPUExecutionProvider)",
    )


# ------------------------------------------------------------------------------ command


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_command_prints_tables_within_80_columns_and_writes_files(files, tmp_path):
    outputs = {kind: tmp_path / f"r.{kind}" for kind in ("json", "html", "markdown")}
    options = [text for kind, path in outputs.items() for text in (f"--{kind}", path)]
    found = run(*files, "--rounds", 5, "--threads", 1, "--profile", "--batch", "1,2", *options)
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("CPUExecutionProvider, 1 thread,")
    text = " ".join(found.output.split())
    assert "net2.onnx: faster, but top-1 agreement" in text
    assert "x 2x8x16x16" in text and "conv7" in text
    assert len(json.loads(outputs["json"].read_text())["cases"]) == 2
    assert outputs["html"].read_text().startswith("<!doctype html>")
    assert "| net2.onnx |" in outputs["markdown"].read_text()


def test_command_replaces_files_only_when_forced(files, tmp_path):
    target = tmp_path / "r.json"
    target.write_text("mine")
    found = run(files[0], "--json", target)
    assert found.exit_code == 2 and "r.json: exists" in found.output
    assert target.read_text() == "mine"
    assert run(files[0], "--json", target, "--rounds", 5, "--force").exit_code == 0
    assert target.read_text() != "mine"


def test_json_without_a_file_is_printed_alone(files):
    found = run(*files, "--rounds", 5, "--threads", 1, "--json")
    assert found.exit_code == 0, found.output
    assert [model["name"] for model in json.loads(found.stdout)["models"]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch", "1,a"], "is no list of sizes like 1,8"),
        (["--batch", "0"], "is no list of sizes like 1,8"),
        (["--input", "x"], "write it as name=1x3x224x224"),
        (["--input", "y=1x8x16x16"], "the model has no input y"),
        (["--inputs", "none.npz"], "none.npz: cannot be read: No such file"),
        (["--provider", "cuda"], "provider cuda"),
        (["--rounds", "2"], "rounds must be at least 5, got 2"),
        (["--threads", "-1"], "-1 is not in the range"),
        (["none.onnx"], "none.onnx: no such file"),
        (["--html", "none/r.html"], "the folder none does not exist"),
    ],
)
def test_command_refuses(files, arguments, text):
    found = run(files[0], *arguments)
    assert found.exit_code == 2
    assert text in found.output and "Traceback" not in found.output


def test_outputs_that_are_no_numbers_are_said_of_a_single_model(tmp_path):
    graph = "(float[1, 4] x) => (float[1, 4] y) { z = Sub(x, x) y = Div(z, z) }"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]> g {graph}')
    model_io.save(model, tmp_path / "nan.onnx")
    quick = ("--rounds", "5", "--seconds", "0.1", "--threads", "1")
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "nan.onnx"), *quick])
    assert result.exit_code == 0
    assert "nan.onnx: output y holds values that are not finite" in result.stdout


def test_not_a_model(tmp_path):
    (tmp_path / "bad.onnx").write_text("hello")
    with pytest.raises(ModelError, match="not an ONNX"):
        bench([tmp_path / "bad.onnx"])
