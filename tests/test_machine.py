"""What numbers depend on."""

import dataclasses
import json
import socket
from pathlib import Path

from onnxslim_kd import machine


def test_environment_names_versions_but_no_host():
    found = json.dumps(dataclasses.asdict(machine.environment(["click", "no-such-package"])))
    versions = json.loads(found)["versions"]
    assert {"python", "onnx", "onnx-ir", "click"} <= versions.keys()
    assert "no-such-package" not in versions
    assert socket.gethostname() not in found and str(Path.home()) not in found


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
