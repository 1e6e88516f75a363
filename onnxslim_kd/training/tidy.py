"""Make a graph quick to train before it is lowered; what it computes stays the same."""

from collections.abc import Collection, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd.training.rows import pick_early
from onnxslim_kd.training.sizes import fold_sizes


def extract(
    model: ir.Model, outputs: Sequence[str], inputs: Sequence[str] | None = None
) -> ir.Model:
    """Return the part of ``model`` that computes ``outputs``.

    Args:
        model: Only read.
        outputs: Value names.
        inputs: The inputs of the part; None for those of the model that it needs.
    """
    every = [str(value.name) for value in model.graph.inputs]
    graph = ir.convenience.extract(model.graph, list(inputs or every), list(outputs))
    part = ir.Model(graph, ir_version=model.ir_version)
    part.opset_imports.update(model.opset_imports)
    if inputs is None:
        for value in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(value)
    return part


def tidied(model: ir.Model, outputs: Sequence[str], keep: Collection[str] = ()) -> ir.Model:
    """Return the part of ``model`` that computes ``outputs``, without work that can be spared.

    Args:
        model: Only read; its weights are shared.
        outputs: Value names.
        keep: The initializers that train.
    """
    part = extract(model, list(dict.fromkeys(outputs)))
    fold_sizes(part, keep)
    pick_early(part)
    common.RemoveUnusedNodesPass()(part)
    return part
