"""Weights from another file, by name."""

from typing import Any

import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import UserError


def load_weights(model: ir.Model, other: ir.Model) -> dict[str, Any]:
    """Give ``model`` the float initializers of ``other`` that have the same name and shape.

    Returns:
        ``loaded``: how many; ``other_shape``: name -> both shapes; ``missing``: names of ``model``
        that ``other`` does not have.

    Raises:
        UserError: Not one of them fits.
    """
    loaded, missing, other_shape = 0, [], {}
    for name, value in model.graph.initializers.items():
        own = value.const_value
        if own is None or not own.dtype.is_floating_point():
            continue
        found = other.graph.initializers.get(name)
        new = found.const_value if found is not None else None
        if new is None:
            missing.append(name)
        elif new.shape != own.shape or new.dtype != own.dtype:
            other_shape[name] = f"{own.dtype.name}{own.shape} <- {new.dtype.name}{new.shape}"
        else:
            value.const_value = new
            loaded += 1
    if loaded == 0:
        raise UserError(
            "init_from: no initializer has the same name and shape; is it a model of another kind?"
        )
    return {"loaded": loaded, "other_shape": other_shape, "missing": missing}


def take_shapes(model: ir.Model, other: ir.Model) -> None:
    """Make ``model`` as narrow as ``other``, a pruned file of the same net, in place.

    Initializers of another shape, the numbers that count channels among them, come from ``other``,
    as do the attributes of the nodes with the same name; then all shapes are inferred again.

    Raises:
        ModelError: The graph does not hold together with these shapes.
    """
    for name, value in model.graph.initializers.items():
        found = other.graph.initializers.get(name)
        if found is None or found.const_value is None or value.const_value is None:
            continue
        counts = not value.const_value.dtype.is_floating_point()
        if counts or found.const_value.shape != value.const_value.shape:
            value.const_value = found.const_value
            value.shape = ir.Shape(found.const_value.shape.numpy())
    named = {node.name: node for node in other.graph}
    for node in model.graph:
        twin = named.get(node.name)
        if twin is not None and twin.op_type == node.op_type:
            node.attributes.update(twin.attributes)
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    model_io.infer_shapes(model)
