"""Weights from another file, by name."""

from typing import Any

import onnx_ir as ir

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
