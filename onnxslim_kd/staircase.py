"""How long single layers take at given widths on this machine, kept on disk.

    table = Table(Meter("cpu", threads=1), folder)
    table.seconds([Probe("Conv", ...), ...])        # measured once, then read from the table

ONNX Runtime computes channels in blocks, so that time over width is a staircase, with widths off
its edges that cost more than wider ones. Nobody needs to know the block: it is in the numbers.

The table is a file of JSON lines, one per measurement, appended as soon as it was made: a run that
was killed goes on where it stopped. Every line says what it was measured on (processor, runtime,
provider, threads); lines from elsewhere are not used.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import machine, timing
from onnxslim_kd.errors import UserError
from onnxslim_kd.profile import profile
from onnxslim_kd.runtime import Session

FILE = "staircase.jsonl"
ROUNDS, SECONDS = 10, 1.0
"""Of interleaved runs, where a trace does not tell the time of a kernel."""
FASTEST = 0.0
"""The quantile of a kernel's runs that counts: the one that other programs disturbed least."""
BLOCKS = (4, 8, 16, 32)
IR_VERSION = 10


@dataclass(frozen=True)
class Probe:
    """One layer at one width: all that its time depends on."""

    op: str
    opset: int
    attributes: tuple[tuple[str, Any], ...]
    operands: tuple[tuple[str, tuple[int, ...], bool] | None, ...]
    """Element type, shape, and whether it is a weight, of each input; None where there is none."""
    result: str
    """Element type of the first output."""

    @property
    def key(self) -> str:
        """The name of the probe in the table."""
        return json.dumps([self.op, self.attributes, self.operands])


Measure = Callable[[Sequence[Probe]], list[float]]
"""From layers to seconds; all of one call are measured in turn."""


@dataclass(frozen=True)
class Origin:
    """What a measurement depends on beside the layer."""

    cpu: str
    runtime: str
    provider: str
    threads: int


def origin(provider: str, threads: int) -> Origin:
    """Describe this machine and runtime."""
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return Origin(machine.cpu(), version(package), provider, threads)
        except PackageNotFoundError:
            continue
    return Origin(machine.cpu(), "unknown", provider, threads)


class Table:
    """Measured times on disk.

    Args:
        measure: What to ask for times that are not there yet.
        origin: What ``measure`` runs on.
        folder: Where the file is; it is made when needed.

    Raises:
        UserError: The folder cannot be read or written.
    """

    def __init__(self, measure: Measure, origin: Origin, folder: Path) -> None:
        self._measure, self._origin = measure, origin
        self.path = folder / FILE
        self.measured = 0
        """How many times were measured, not read."""
        self.foreign: set[str] = set()
        """Processors and runtimes whose lines were not used."""
        self._known: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise UserError(f"--cache {folder}: {error.strerror}") from error
        for line in text.splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            where = Origin(**entry["origin"])
            key, seconds = str(entry["layer"]), float(entry["seconds"])
        except (ValueError, TypeError, KeyError):
            return  # cut short when a run was killed: measured again
        if not (isfinite(seconds) and seconds > 0):
            return
        if where == self._origin:
            self._known[key] = seconds
        elif (where.cpu, where.runtime) != (self._origin.cpu, self._origin.runtime):
            self.foreign.add(f"{where.cpu}, ONNX Runtime {where.runtime}")

    def seconds(self, probes: Sequence[Probe]) -> list[float]:
        """Return the time of every probe; those not known are measured in turn and kept."""
        missing = list(dict.fromkeys(p for p in probes if p.key not in self._known))
        if missing:
            found = self._measure(missing)
            self.measured += len(missing)
            self._append(zip(missing, found, strict=True))
        return [self._known[p.key] for p in probes]

    def _append(self, found: Iterable[tuple[Probe, float]]) -> None:
        lines = []
        for probe, seconds in found:
            self._known[probe.key] = seconds
            entry = {"origin": asdict(self._origin), "layer": probe.key, "seconds": seconds}
            lines.append(json.dumps(entry))
        try:
            with self.path.open("ab") as file:
                start = b"\n" if file.tell() else b""  # ends a line that was cut short
                file.write(start + "\n".join(lines).encode())
        except OSError as error:
            raise UserError(f"--cache {self.path.parent}: {error.strerror}") from error


def cache_folder() -> Path:
    """Return where this platform keeps what can be made again."""
    home = Path.home()
    if platform.system() == "Windows":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif platform.system() == "Darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "onnxslim-kd"


def block(table: Table) -> int:
    """Return how many channels the runtime computes at once: the step of a convolution's time.

    The step whose staircase leaves the least of the measured times unexplained.
    """
    widths = np.arange(128, 60, -4)
    times = np.array(table.seconds([_convolution(int(width)) for width in widths]))
    left = {}
    for step in BLOCKS:
        stairs = np.ceil(widths / step) * step
        fit = np.polynomial.Polynomial.fit(stairs, times, 1)
        left[step] = float(np.square(times - fit(stairs)).sum())
    return min(left, key=left.__getitem__)


def _convolution(width: int) -> Probe:
    kernel = (("kernel_shape", (3, 3)), ("pads", (1, 1, 1, 1)))
    x, w = ("FLOAT", (1, 64, 14, 14), False), ("FLOAT", (width, 64, 3, 3), True)
    return Probe("Conv", 17, kernel, (x, w), "FLOAT")


# ------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Meter:
    """Measures layers on this machine."""

    provider: str = "cpu"
    threads: int = 1

    def __call__(self, probes: Sequence[Probe]) -> list[float]:
        """Return the seconds that each layer takes.

        On a CPU all stand side by side in one model, and the runtime's trace tells the time of
        each kernel: what it costs to bring inputs into the runtime's layout and back, which
        happens between layers of a whole model only rarely, stays out. Elsewhere a trace knows
        only when kernels were launched, so that each has a session, and they run in turn.
        """
        if self.provider == "cpu":
            model, feeds = together(probes)
            (operators,) = profile([model], feeds, threads=self.threads, quantile=FASTEST)
            found = {o.name: o.milliseconds / 1e3 for o in operators}
            if all(f"layer{i}" in found for i in range(len(probes))):
                return [found[f"layer{i}"] for i in range(len(probes))]
        return self._in_turn(probes)

    def _in_turn(self, probes: Sequence[Probe]) -> list[float]:
        calls = []
        for probe in probes:
            model, feeds = together([probe])
            session = Session(model, provider=self.provider, threads=self.threads, spin=False)
            calls.append(session.bind(feeds))
        timings = timing.interleave(calls, rounds=ROUNDS, seconds=SECONDS * len(probes))
        return [float(t.medians.min()) for t in timings]


def together(probes: Sequence[Probe]) -> tuple[ir.Model, dict[str, np.ndarray[Any, Any]]]:
    """Return a model with every layer side by side, named ``layer0``, ..., and its inputs."""
    inputs: list[ir.Value] = []
    weights: list[ir.Value] = []
    outputs, nodes, feeds = [], [], {}
    for index, probe in enumerate(probes):
        values: list[ir.Value | None] = []
        for place, operand in enumerate(probe.operands):
            if operand is None:
                values.append(None)
                continue
            kind, shape, constant = operand
            array = numbers(kind, shape)
            value = ir.Value(
                name=f"in{index}_{place}",
                shape=ir.Shape(shape),
                type=ir.TensorType(ir.DataType[kind]),
                const_value=ir.Tensor(array, dtype=ir.DataType[kind]) if constant else None,
            )
            values.append(value)
            (weights if constant else inputs).append(value)
            if not constant:
                feeds[f"in{index}_{place}"] = array
        result = ir.Value(name=f"out{index}", type=ir.TensorType(ir.DataType[probe.result]))
        nodes.append(
            ir.node(
                probe.op,
                values,
                {k: list(v) if isinstance(v, tuple) else v for k, v in probe.attributes},
                outputs=[result],
                name=f"layer{index}",
            )
        )
        outputs.append(result)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=weights,
        opset_imports={"": max(p.opset for p in probes)},
        name="layers",
    )
    return ir.Model(graph, ir_version=IR_VERSION), feeds


def numbers(kind: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return numbers to compute with; cheap to make, and no denormals, which would be slow."""
    return np.resize(_pool(ir.DataType[kind].numpy()), shape)


@cache
def _pool(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).uniform(0.5, 1.5, 4099)
    return values.astype(dtype)


def open_table(provider: str, threads: int, folder: Path | None) -> Table:
    """Return the table of this machine."""
    return Table(Meter(provider, threads), origin(provider, threads), folder or cache_folder())
