"""Graphs of losses alone, whose inputs are the values to compare."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd.passes import losses
from onnxslim_kd.passes.scope import Labels, Scope
from onnxslim_kd.runtime import Session

GOLDEN = Path(__file__).parent / "golden" / "losses"


def loss_model(
    text: str, shapes: Mapping[str, tuple[int | str, ...]], *, opset: int = 17
) -> ir.Model:
    """Build ``loss[;loss...]`` between inputs of these shapes: output ``total``, then each one."""
    values = {name: ir.val(name, ir.DataType.FLOAT, shape) for name, shape in shapes.items()}
    specs = [losses.parse(part) for part in text.split(";")]
    used = {name for spec in specs for name in (*spec.student, *spec.teacher)}
    inputs = [value for name, value in values.items() if name in used]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name="losses")
    labels, parts = Labels(graph), []
    for spec in specs:
        scope = Scope(graph, spec.name or spec.kind, labels=labels)
        sides = ([values[n] for n in side] for side in (spec.student, spec.teacher))
        part = losses.build(scope, spec, *sides)
        parts.append(scope.op("Mul", part, spec.weight))
    total = scope.total(parts)
    graph.outputs.extend([total])
    return ir.Model(graph, ir_version=8 if opset < 19 else 10)


def free_batch(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int | str, ...]]:
    """Return the shapes of ``arrays`` with the batch left open."""
    return {name: ("N", *array.shape[1:]) for name, array in arrays.items() if array.ndim}


def runner(model: ir.Model) -> Callable[[Mapping[str, np.ndarray]], float]:
    """Open in ONNX Runtime."""
    session, names = Session(model, threads=1), [v.name for v in model.graph.inputs]

    def run(feeds: Mapping[str, np.ndarray]) -> float:
        (result,) = session.run({n: feeds[n] for n in names}).values()
        assert result.dtype == np.float32
        assert result.shape == ()
        return float(result)

    return run


def value(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> float:
    """Run once in ONNX Runtime."""
    return runner(model)(feeds)


def check(model: ir.Model) -> None:
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@cache
def newest_opset() -> int:
    """Return the newest opset that ONNX Runtime loads."""
    for opset in range(onnx.defs.onnx_opset_version(), 21, -1):
        try:
            value(loss_model("l1:s=t", {"s": (1,), "t": (1,)}, opset=opset), _ONES)
        except losses.UserError:  # the runtime refuses the model
            continue
        return opset
    raise AssertionError("ONNX Runtime loads no opset above 21")


_ONES = {"s": np.ones(1, np.float32), "t": np.ones(1, np.float32)}
