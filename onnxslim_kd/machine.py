"""What numbers depend on: processor, cores, load and versions; no host name, no path."""

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("onnxslim-kd", "onnxruntime-gpu", "onnxruntime", "onnx", "onnx-ir", "numpy")


@dataclass(frozen=True)
class Environment:
    """Where something was measured."""

    cpu: str
    cores: int
    system: str
    versions: dict[str, str]


def environment(packages: Iterable[str] = ()) -> Environment:
    """Describe this machine, and the versions of our packages and of ``packages``."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime comes under one of two names
            continue
    return Environment(cpu(), cores(), f"{platform.system()} {platform.machine()}", found)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Return the load of the last minute, or None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
