"""Free a batch dimension that an exporter fixed to 1.

1. The first dimension of every input becomes the symbol ``N``; shapes are inferred again.
2. A Reshape to a constant shape that begins with 1 keeps the batch instead (0 in ONNX).
3. Nothing else is guessed: the result must give, for a batch of two, what the model gives for
   each of the two alone.
"""

import numpy as np
import onnx_ir as ir

from onnxslim_kd import runtime
from onnxslim_kd.errors import OperationError, ProofError, UserError
from onnxslim_kd.model import ModelLike, constant, infer_shapes, load, name_of, new_initializer
from onnxslim_kd.passes import dims
from onnxslim_kd.shapes import choose_inputs

SYMBOL = "N"
RTOL, ATOL = 1e-3, 1e-4
"""Other batch sizes take other kernels; sums come out in another order."""


def free_batch(source: ModelLike) -> ir.Model:
    """Return a copy of the model that takes any batch size.

    Raises:
        UserError: No input begins with a dimension of 1.
        ProofError: The model mixes the samples of a batch, or does not run with two.
    """
    fixed = load(source)
    model = fixed.clone()
    freed = _fixed(model)
    if not freed:
        raise UserError("there is no batch of 1 to free: no input begins with a dimension of 1")
    for value in freed:
        assert value.shape is not None
        value.shape = ir.Shape([SYMBOL, *list(value.shape)[1:]])
    for node in model.graph:
        if node.op_type == "Reshape" and node.domain == "":
            _keep_batch(model.graph, node)
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    infer_shapes(model)
    _prove(fixed, model, [name_of(v) for v in freed])
    return model


def has_fixed_batch(source: ModelLike) -> bool:
    """Tell whether an input of the model begins with a dimension of 1."""
    return bool(_fixed(load(source)))


def _fixed(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.inputs if (dims.read(v) or [None])[0] == 1]


def _keep_batch(graph: ir.Graph, node: ir.Node) -> None:
    target, shape = constant(node.inputs[1]), dims.read(node.inputs[0])  # type: ignore[arg-type]
    keeps = target is not None and len(target) > 1 and target[0] == 1
    if keeps and shape and shape[0] in (1, SYMBOL) and not node.attributes.get_int("allowzero", 0):
        assert target is not None
        kept = np.array([0, *target[1:]], np.int64)
        node.replace_input_with(1, new_initializer(graph, f"{node.name}_shape", kept))


def _prove(fixed: ir.Model, free: ir.Model, freed: list[str]) -> None:
    shapes = choose_inputs(fixed, {}, 0)
    feeds = [runtime.random_feeds(fixed, shapes, seed=seed) for seed in (0, 1)]
    both = {
        name: np.concatenate([f[name] for f in feeds]) if name in freed else feeds[0][name]
        for name in shapes
    }
    for feed in feeds:  # inputs without a batch are the same for both
        feed.update((name, both[name]) for name in shapes if name not in freed)
    alone = runtime.Session(fixed)
    one_by_one = [alone.run(feed) for feed in feeds]
    try:
        together = runtime.Session(free).run(both)
    except (OperationError, UserError) as error:
        raise ProofError(
            f"the batch cannot be freed, the model runs with 1 only: {error}"
        ) from error
    for name in alone.outputs:
        if not _is_batch(together[name], [outputs[name] for outputs in one_by_one]):
            raise ProofError(
                f"the batch cannot be freed: output {name!r} of a batch of two differs from"
                f" the two samples alone"
            )


def _is_batch(found: runtime.Array, parts: list[runtime.Array]) -> bool:
    if not all(isinstance(part, np.ndarray) and part.ndim for part in parts):
        return False  # a number for all samples, or a sequence
    expected = np.concatenate(parts)
    if found.shape != expected.shape:
        return False
    if found.dtype.kind not in "fc":
        return np.array_equal(found, expected)
    return np.allclose(found, expected, rtol=RTOL, atol=ATOL, equal_nan=True)
