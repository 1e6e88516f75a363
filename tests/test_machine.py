"""What numbers depend on."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from onnxslim_kd import machine


def test_environment_names_versions_and_neither_host_nor_path():
    found = dataclasses.asdict(machine.environment(["click", "no-such-package"]))
    assert found.keys() == {"cpu", "cores", "system", "versions"}
    versions = found["versions"]
    assert {"python", "onnx", "onnx-ir", "click"} <= versions.keys()
    assert "no-such-package" not in versions
    assert str(Path.home()) not in json.dumps(found)


def test_processor_and_cores():
    assert machine.cpu() and machine.cores() >= 1


def test_systems_that_tell_less(monkeypatch):
    def missing(_path):
        raise FileNotFoundError

    monkeypatch.setattr(machine.Path, "read_text", missing)
    assert machine.cpu()
    monkeypatch.delattr(machine.os, "getloadavg")
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    assert machine.load_average() is None and machine.cores() >= 1


def test_the_runtime_reports_to_nobody_and_leaves_no_file(tmp_path):
    code = "from onnxslim_kd import runtime; runtime._onnxruntime()"
    given = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment = given | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []
