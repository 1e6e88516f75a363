"""Half precision: weights and arithmetic in float16, inputs and outputs as they were."""

import warnings
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from onnxslim_kd import runtime
from onnxslim_kd.compare import Reference
from onnxslim_kd.errors import OperationError, ProofError
from onnxslim_kd.model import embedded, infer_shapes

TOLERANCE = 2e-2
"""Of an output's largest magnitude: float16 keeps 3 digits in each of many layers."""


def to_half(
    model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[ir.Model, float]:
    """Convert a model to float16 by ONNX Runtime's converter, which keeps fragile operators.

    Args:
        model: Stays as it is.
        shapes: Input shapes for the comparison, by name.

    Returns:
        The new model, and the largest difference of its outputs.

    Raises:
        OperationError: The converter fails on this model.
        ProofError: The outputs differ by more than `TOLERANCE`.
    """
    start = model.clone()
    infer_shapes(start)
    with embedded(start), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each number out of range: compared below
        try:
            proto = runtime.float16(ir.serde.serialize_model(start))
            _drop_repeated(proto.graph)
            half = ir.serde.deserialize_model(proto)
        except Exception as error:  # the converter raises many kinds, or makes what is no graph
            raise OperationError(f"--fp16: the converter fails on this model: {error}") from error
    worst = Reference.of(model, given=shapes).worst(half)
    if worst > TOLERANCE:
        raise ProofError(
            f"--fp16: outputs differ by {worst:.1e} of their magnitude, {TOLERANCE:.0e} allowed;"
            f" leave --fp16 out for this model"
        )
    return half, worst


def _drop_repeated(graph: onnx.GraphProto) -> None:
    """Keep one of the casts that the converter writes for each reader of a shared constant."""
    first = {tuple(node.output): index for index, node in reversed([*enumerate(graph.node)])}
    kept = [graph.node[index] for index in sorted(first.values())]
    del graph.node[:]
    graph.node.extend(kept)
