"""What latency pruning measures: nodes of a model, single layers, one model against another."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxslim_kd import cost, profile, staircase, timing
from onnxslim_kd import model as model_io
from onnxslim_kd.bench import Setting
from onnxslim_kd.errors import OperationError
from onnxslim_kd.model import ModelLike
from onnxslim_kd.passes.latency_layers import WHOLE
from onnxslim_kd.passes.targets import Device
from onnxslim_kd.runtime import Session
from onnxslim_kd.staircase import Table
from onnxslim_kd.statistics import Ratio
from onnxslim_kd.workload import Shape, workloads

FINE = time.get_clock_info("thread_time").resolution < 1e-4
"""Whether a thread's own time is told in small steps; on Windows they are 16 milliseconds."""


@dataclass(frozen=True)
class Clock:
    """What is measured; tests put in their own."""

    trace: Callable[[ir.Model, Mapping[str, Shape]], dict[str, float]]
    """The seconds of every node of a model that ran, by name."""
    ratio: Callable[[ir.Model, ir.Model, Mapping[str, Shape]], float]
    """The latency of the second model over that of the first."""
    table: Table
    """The seconds of single layers."""


def this_machine(device: Device) -> Clock:
    """Return what measures on this machine, with its table on disk."""
    setting = device.setting

    def trace(model: ir.Model, shapes: Mapping[str, Shape]) -> dict[str, float]:
        feeds = workloads(model, [shapes])[0].feeds[0]
        if setting.provider != "cpu":  # a trace tells when kernels were launched, not how long
            call = _session(model, setting).bind(feeds)
            (whole,) = timing.interleave([call], rounds=setting.rounds, seconds=setting.seconds)
            return {WHOLE: float(whole.medians.min())}
        (found,) = profile.profile(
            [model], feeds, threads=setting.threads, quantile=staircase.FASTEST
        )
        return by_layer(model, found)

    def ratio(original: ir.Model, pruned: ir.Model, shapes: Mapping[str, Shape]) -> float:
        return compare(original, pruned, shapes, setting).median

    table = staircase.open_table(setting.provider, setting.threads, device.cache)
    return Clock(trace, ratio, table)


def compare(
    original: ir.Model, pruned: ir.Model, shapes: Mapping[str, Shape], setting: Setting
) -> Ratio:
    """Measure the latency of one model over that of another, in turn.

    A single thread on a processor is timed by the time that it had the processor: what a clock
    shows on an idle machine, and what it would show here without other programs.
    """
    feeds = workloads(original, [shapes])[0].feeds[0]
    calls = [_session(model, setting).bind(feeds) for model in (original, pruned)]
    alone = setting.provider == "cpu" and setting.threads == 1 and FINE
    first, second = timing.interleave(
        calls,
        rounds=setting.rounds,
        seconds=setting.seconds,
        clock=time.thread_time if alone else time.perf_counter,
    )
    return second.ratio_to(first)


def _session(model: ir.Model, setting: Setting) -> Session:
    return Session(model, provider=setting.provider, threads=setting.threads, spin=False)


def quick(provider: str = "cpu", threads: int = 0) -> Setting:
    """Return the setting for a glance at the result: seconds, not minutes."""
    return Setting(provider, threads, rounds=15, seconds=2.0)


def not_slower(
    original: ModelLike,
    pruned: ir.Model,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    setting: Setting | None = None,
    force: bool = False,
) -> Ratio:
    """Measure a cut against the original.

    Args:
        original: The model before the cut.
        pruned: The model after it.
        shapes: Shapes of dynamic inputs, by name.
        setting: Where and how long to measure.
        force: Whether a cut that is slower may pass.

    Raises:
        OperationError: The cut is slower, and that is no accident of measuring.
        UserError: An input's size is not known, or the provider is not here.
    """
    before = model_io.load(original)
    sizes = workloads(before, [shapes] if shapes else ())[0].shapes
    ratio = compare(before, pruned, sizes, setting or quick())
    if ratio.low > 1 and not force:
        raise OperationError(
            f"the cut measures {ratio} of the original's latency: it is slower, and was not"
            f" written; keep multiples of the runtime's block (--round-to), or --force-slower"
        )
    return ratio


def by_layer(model: ir.Model, found: Sequence[profile.Operator]) -> dict[str, float]:
    """Return seconds by name; a fused layer goes by the node that multiplies, not the one behind.

    What belongs to no node of the model (layout conversions) is kept under its own name.
    """
    nodes = {node.name or "": node for node in model.graph}
    seconds: dict[str, float] = {}
    for operator in found:
        name, node = operator.name, nodes.get(operator.name)
        if node is not None and node.op_type not in cost.MACS and "Conv" in operator.op:
            name = _fused_into(node)
        seconds[name] = seconds.get(name, 0.0) + operator.milliseconds / 1e3
    return seconds


def _fused_into(node: ir.Node) -> str:
    """Return the nearest node before ``node`` that multiplies."""
    waiting = deque([node])
    while waiting:
        nearest = waiting.popleft()
        if nearest.op_type in cost.MACS:
            return nearest.name or ""
        sources = [v.producer() for v in nearest.inputs if v is not None]
        waiting.extend(source for source in sources if source is not None)
    return node.name or ""
