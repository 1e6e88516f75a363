"""Where the time goes: ONNX Runtime's own trace, per node and per operator type.

A trace slows every operator a little, so it is taken in runs of its own; it says where time goes,
`onnxslim_kd.bench` says how much. The runtime fuses nodes before it runs them: a node here is one
that ran, under the name of the layer it was made of.
"""

import json
import os
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd import runtime

Source = str | os.PathLike[str] | ir.Model
ROUNDS, RUNS = 5, 3
"""Every round runs each model that often; a round before these warms up."""
_KERNEL, _BLOCKED = "_kernel_time", "_nchwc"
_FUSED = frozenset({"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish"})
_FUSED |= {"BatchNormalization"}
"""What the runtime puts into the convolution before it."""


@dataclass(frozen=True)
class Operator:
    """One node that ran."""

    name: str
    op: str
    provider: str
    milliseconds: float
    """Per run of the model, the median over runs unless another quantile was asked for."""


@dataclass(frozen=True)
class Change:
    """One line of a comparison: an operator type, or a node."""

    name: str
    milliseconds: tuple[float, ...]
    """Per model; 0 where a model has none."""
    count: tuple[int, ...]


def profile(
    sources: Sequence[Source],
    feeds: Mapping[str, np.ndarray[Any, Any]],
    *,
    provider: str = "cpu",
    threads: int = 0,
    quantile: float = 0.5,
) -> list[tuple[Operator, ...]]:
    """Run models in turn with tracing on and return the nodes of each in the order they ran.

    Args:
        sources: The models.
        feeds: Inputs for all of them.
        provider: Where to run.
        threads: Threads inside an operator; 0 lets the runtime choose.
        quantile: Which of the runs of a node counts; 0, the fastest, is the least disturbed one.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = [
            runtime.Session(
                source,
                provider=provider,
                threads=threads,
                profile_prefix=str(Path(folder) / f"trace{index}"),
                spin=False,
            )
            for index, source in enumerate(sources)
        ]
        for session in sessions * (1 + ROUNDS):
            for _ in range(RUNS):
                session.run(feeds)
        traces = [json.loads(session.end_profiling().read_text("utf-8")) for session in sessions]
    layers = map(_layers, sources)
    return [_operators(*each, quantile) for each in zip(traces, layers, strict=True)]


def _layers(source: Source) -> dict[str, str]:
    """Map what the runtime calls its blocked convolutions (the output's name) to the layer."""
    model = source if isinstance(source, ir.Model) else model_io.load(source, normalise=False)
    found = {}
    for node in model.graph:
        for output in node.outputs:
            layer = _convolution_of(node)
            found[f"{output.name}{_BLOCKED}"] = layer.name or str(output.name)
    return found


def _convolution_of(node: ir.Node) -> ir.Node:
    """Return the convolution that the runtime fuses a node into; the node where there is none."""
    layer: ir.Node | None = node
    while layer is not None and layer.op_type in _FUSED and layer.inputs[0] is not None:
        layer = layer.inputs[0].producer()
    return layer if layer is not None and layer.op_type == "Conv" else node


def _operators(
    events: Sequence[Mapping[str, Any]], layers: Mapping[str, str], quantile: float
) -> tuple[Operator, ...]:
    starts = sorted(e["ts"] for e in events if e.get("name") == "model_run")[RUNS:]
    times: dict[str, np.ndarray[Any, Any]] = defaultdict(lambda: np.zeros(len(starts)))
    kinds: dict[str, tuple[str, str]] = {}
    for event in sorted(events, key=lambda e: e.get("ts", 0)):
        run = bisect_right(starts, event.get("ts", 0)) - 1
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL) and run >= 0:
            name = event["name"].removesuffix(_KERNEL)
            name = layers.get(name, name)
            times[name][run] += event["dur"]
            kinds[name] = event["args"]["op_name"], event["args"].get("provider", "")
    return tuple(
        Operator(name, *kinds[name], float(np.quantile(spent, quantile)) / 1e3)
        for name, spent in times.items()
    )


def by_type(profiles: Sequence[Sequence[Operator]]) -> list[Change]:
    """Compare models by operator type, the one that takes longest first."""
    return _compare(profiles, "op")


def by_node(profiles: Sequence[Sequence[Operator]]) -> list[Change]:
    """Compare models node by node, the largest change against the first model first."""
    changes = _compare(profiles, "name")
    return sorted(changes, key=lambda c: -max(abs(m - c.milliseconds[0]) for m in c.milliseconds))


def _compare(profiles: Sequence[Sequence[Operator]], key: str) -> list[Change]:
    times: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(profiles))
    counts: dict[str, list[int]] = defaultdict(lambda: [0] * len(profiles))
    for index, operators in enumerate(profiles):
        for operator in operators:
            times[getattr(operator, key)][index] += operator.milliseconds
            counts[getattr(operator, key)][index] += 1
    changes = [Change(name, tuple(t), tuple(counts[name])) for name, t in times.items()]
    return sorted(changes, key=lambda change: -max(change.milliseconds))
