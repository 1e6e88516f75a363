"""Latency of models against each other, on this machine's ONNX Runtime.

    report = bench(["original.onnx", "pruned.onnx"], batches=[1, 8])
    report.cases[0].rows[1].ratio          # Ratio(median=0.61, low=0.60, high=0.62)

All models live in one process and run in turn (see `onnxslim_kd.timing`), on inputs that are
already where they compute; their outputs on the same inputs are compared, so that a fast wrong
model is not called fast.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxslim_kd import machine, runtime, timing
from onnxslim_kd import model as model_io
from onnxslim_kd.cost import cost
from onnxslim_kd.difference import Difference, difference
from onnxslim_kd.errors import UserError
from onnxslim_kd.interface import check_interface
from onnxslim_kd.machine import Environment
from onnxslim_kd.profile import Operator, profile
from onnxslim_kd.shapes import sample
from onnxslim_kd.statistics import Latency, Ratio
from onnxslim_kd.workload import Array, Workload, workloads

Source = str | os.PathLike[str] | ir.Model


@dataclass(frozen=True)
class Setting:
    """How to measure."""

    provider: str = "cpu"
    threads: int = 0
    """Threads inside an operator; 0 stands for the cores that this process may use."""
    rounds: int = 30
    seconds: float = 30.0
    """Of one case, after which no further round begins."""
    profile: bool = False
    """Also measure every operator, in runs of their own."""

    def __post_init__(self) -> None:
        if self.rounds < timing.FEWEST_ROUNDS:
            raise UserError(f"rounds must be at least {timing.FEWEST_ROUNDS}, got {self.rounds}")
        if self.threads < 0 or not self.seconds > 0:
            raise UserError(
                f"threads must be at least 0 and seconds above 0,"
                f" got {self.threads} and {self.seconds}"
            )
        object.__setattr__(self, "threads", self.threads or machine.cores())


@dataclass(frozen=True)
class Row:
    """One model at one size of inputs."""

    model: str
    latency: Latency
    ratio: Ratio
    """To the first model."""
    macs: int
    """For one element of a free batch."""
    difference: Difference
    milliseconds: tuple[float, ...]
    """Every timed run, in order."""
    operators: tuple[Operator, ...] = ()

    @property
    def verdict(self) -> str:
        """What may be said of this model against the first."""
        if self.ratio.low <= 1 <= self.ratio.high:
            speed = "no difference in speed seen"
        else:
            speed = "faster" if self.ratio.median < 1 else "slower"
        return speed if self.difference.same else f"{speed}, but {self.difference}"


@dataclass(frozen=True)
class Case:
    """All models at one size of inputs."""

    shapes: Mapping[str, tuple[int, ...]]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """What speaks against trusting the times."""


@dataclass(frozen=True)
class Subject:
    """What does not depend on the size of the inputs."""

    name: str
    parameters: int
    bytes: int
    """Of the file and its external data; of the weights, for a model that is no file."""


@dataclass(frozen=True)
class Report:
    """Everything that `bench` found."""

    models: tuple[Subject, ...]
    cases: tuple[Case, ...]
    setting: Setting
    ran_on: str
    """The provider that really ran, as ONNX Runtime names it."""
    environment: Environment

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)


def bench(
    models: Sequence[Source],
    *,
    shapes: Sequence[Mapping[str, Sequence[int]]] = (),
    batches: Sequence[int] = (),
    inputs: Mapping[str, Array] | None = None,
    setting: Setting | None = None,
) -> Report:
    """Measure one model, or several against the first.

    Args:
        models: Paths or models; all must have the interface of the first.
        shapes: Shapes of inputs by name, one mapping per size to measure.
        batches: Sizes of the free first axes.
        inputs: Arrays to feed instead of random numbers.
        setting: Provider, threads and how long.

    Raises:
        UserError: The interfaces differ, an input's size is not known, or the provider is not here.
        ModelError: A model cannot be read, or the runtime refuses it.
    """
    setting = setting or Setting()
    if not models:
        raise UserError("nothing to measure: give at least one model")
    names = _names(models)
    loaded = [model_io.load(source) for source in models]
    sessions = [_session(source, setting) for source in models]
    for name, session in zip(names[1:], sessions[1:], strict=True):
        check_interface(names[0], sessions[0], name, session)
    subjects = [_subject(*each) for each in zip(names, models, loaded, strict=True)]
    cases = []
    for workload in workloads(loaded[0], shapes, batches, inputs):
        case = _measure(names, sessions, workload, setting)
        macs = [cost(model, sample(model, workload.shapes)).macs for model in loaded]
        rows = [dataclasses.replace(r, macs=m) for r, m in zip(case.rows, macs, strict=True)]
        case = dataclasses.replace(case, rows=tuple(rows))
        cases.append(_profiled(case, models, workload, setting) if setting.profile else case)
    ran_on = runtime.PROVIDERS[sessions[0].provider]
    return Report(tuple(subjects), tuple(cases), setting, ran_on, machine.environment())


def _session(source: Source, setting: Setting) -> runtime.Session:
    return runtime.Session(source, provider=setting.provider, threads=setting.threads, spin=False)


def _measure(
    names: Sequence[str],
    sessions: Sequence[runtime.Session],
    workload: Workload,
    setting: Setting,
) -> Case:
    load = machine.load_average()
    timings = timing.interleave(
        [session.bind(workload.feeds[0]) for session in sessions],
        rounds=setting.rounds,
        seconds=setting.seconds,
    )
    outputs = [[session.run(feeds) for feeds in workload.feeds] for session in sessions]
    rows = tuple(
        Row(
            name,
            measured.latency,
            measured.ratio_to(timings[0]),
            0,
            difference(outputs[0], found),
            tuple(1e3 * seconds for seconds in measured.seconds),
        )
        for name, measured, found in zip(names, timings, outputs, strict=True)
    )
    notes = timing.noise(timings[0], load=load)
    if setting.threads > machine.cores():
        notes.append(f"{setting.threads} threads share {machine.cores()} cores")
    return Case(workload.shapes, rows, tuple(notes))


def _profiled(case: Case, models: Sequence[Source], workload: Workload, setting: Setting) -> Case:
    found = profile(models, workload.feeds[0], provider=setting.provider, threads=setting.threads)
    rows = tuple(
        dataclasses.replace(row, operators=operators)
        for row, operators in zip(case.rows, found, strict=True)
    )
    wanted = runtime.PROVIDERS[setting.provider]
    elsewhere = tuple(
        f"{row.model}: {len(strays)} of {len(row.operators)} nodes did not run on {wanted},"
        f" the first is {strays[0].name} ({strays[0].op}, {strays[0].provider})"
        for row in rows
        if (strays := [o for o in row.operators if o.provider != wanted])
    )
    return dataclasses.replace(case, rows=rows, notes=case.notes + elsewhere)


# ------------------------------------------------------------------- names and sizes


def _names(models: Sequence[Source]) -> list[str]:
    """Name files by their file name, or by their path where two share one."""
    short = [(m.graph.name or "model") if isinstance(m, ir.Model) else Path(m).name for m in models]
    full = [n if isinstance(m, ir.Model) else str(m) for m, n in zip(models, short, strict=True)]
    names = short if len(set(short)) == len(short) else full
    return [
        name if names.count(name) == 1 else f"{name} #{index}"
        for index, name in enumerate(names, start=1)
    ]


def _subject(name: str, source: Source, model: ir.Model) -> Subject:
    weights = cost(model)
    size = weights.bytes
    if not isinstance(source, ir.Model):
        data = {
            Path(value.const_value.path)
            for graph in model.graphs()
            for value in graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        size = sum(path.stat().st_size for path in {Path(source), *data})
    return Subject(name, weights.parameters, size)
