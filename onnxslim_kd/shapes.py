"""Concrete shapes of every value, and the numbers that shape arithmetic computes.

Dynamic models are looked at through a *sample*: every dynamic input dimension gets a number, and
from there each shape is an exact tuple of integers. Real exports compute Reshape targets, Slice
ends and attention scales from Shape nodes; those numbers are folded here (up to `LIMIT` elements),
both for the graph as it is and, for a pruning plan, for the graph as it will be: `fold` takes the
shapes to assume.
"""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd import contrib
from onnxslim_kd.access import extents_of, symbol
from onnxslim_kd.errors import ModelError, UserError
from onnxslim_kd.folding import FOLDS, LIMIT, Array, folded, slice_index
from onnxslim_kd.inference import outline, types
from onnxslim_kd.model import dims, name_of
from onnxslim_kd.node_shapes import Shape, Shapes, infer_node, static

__all__ = [
    "FOLDS",
    "LIMIT",
    "Array",
    "Shape",
    "Shapes",
    "choose_inputs",
    "fold",
    "follow",
    "given_symbols",
    "is_dynamic",
    "sample",
    "slice_index",
]

_BATCH, _SPATIAL, _SEQUENCE = (2, 3), (64, 96), (16, 24)
_LONGER = (64, 1024)


def sample(
    model: ir.Model,
    given: Mapping[str, Sequence[int]] | None = None,
    *,
    variant: int = 0,
    base: Shapes | None = None,
) -> Shapes:
    """Find the shape of every value for one choice of the dynamic dimensions.

    Where strides leave nothing of it (sound, of which a network sees every 320th sample), the
    choice is a longer one.

    Args:
        model: A loaded model.
        given: Shapes of inputs, by name, instead of the choice made here.
        variant: 0 or 1, two different choices.
        base: An earlier sample of the same graph, to save time.

    Raises:
        UserError: ``given`` names no input or contradicts its static dimensions.
        ModelError: The graph contradicts itself under this sample.
    """
    first = _sample(model, choose_inputs(model, given or {}, variant), base)
    if not (is_dynamic(model) and _is_empty(first)):
        return first
    for longer in _LONGER:
        inputs = choose_inputs(model, given or {}, variant, longer)
        try:
            found = _sample(model, inputs, first)
        except ModelError:  # too long for it
            break
        if not _is_empty(found):
            return found
    return first


def _sample(model: ir.Model, inputs: Mapping[str, Shape], base: Shapes | None) -> Shapes:
    found = Shapes(inputs)
    dynamic = is_dynamic(model)
    if dynamic:
        found.outline = base.outline if base is not None and base.outline else outline(model)
    known = _infer_all(found.outline, inputs, _sizes(model, inputs)) if found.outline else {}
    _add_known(found, model)
    versions = dict(model.graph.opset_imports)
    for node in model.graph:
        if not _add_numbers(found, node):
            infer_node(found, node, known if dynamic else None, versions)
    return found


def _is_empty(found: Shapes) -> bool:
    """Tell whether a computed value has no element."""
    return any(
        0 in shape and value.producer() is not None and value not in found.number
        for value, shape in found.shape.items()
    )


def follow(
    model: ir.Model, inputs: Mapping[str, Shape], otherwise: Mapping[ir.Value, Shape]
) -> Shapes:
    """Find the shapes of a changed graph, whose values still say what they were.

    Args:
        model: The graph.
        inputs: The shape of every graph input, by name.
        otherwise: The shapes to go on with where an operator gives none.
    """
    found = Shapes(inputs)
    _add_known(found, model)
    versions = dict(model.graph.opset_imports)
    for node in model.graph:
        if not _add_numbers(found, node):
            infer_node(found, node, {}, versions)
        for value in node.outputs:
            if value not in found.shape and value in otherwise:
                found.shape[value] = otherwise[value]
    return found


def _add_known(found: Shapes, model: ir.Model) -> None:
    for value in model.graph.inputs:
        found.shape[value] = found.inputs[name_of(value)]
    for value in model.graph.initializers.values():
        _add_initializer(found, value)


def _add_numbers(found: Shapes, node: ir.Node) -> bool:
    """Add what a node computes, where that is known; tell whether it is."""
    for output, number in zip(node.outputs, _fold_node(found, node), strict=False):
        if number is not None and number.size <= LIMIT:
            found.number[output] = number
            found.shape[output] = number.shape
    return all(output in found.number for output in node.outputs)


def is_dynamic(model: ir.Model) -> bool:
    """Tell whether a dimension of an input is left open."""
    return any(None in dims(v) for v in model.graph.inputs if v.shape is not None)


def choose_inputs(
    model: ir.Model, given: Mapping[str, Sequence[int]], variant: int, longer: int = 1
) -> dict[str, Shape]:
    """Give every graph input a full shape: one number per symbol, so that inputs agree.

    Args:
        model: Whose inputs.
        given: Shapes by name, instead of the choice made here.
        variant: 0 or 1, two different choices.
        longer: How many times as many pixels or steps as usual.

    Raises:
        UserError: ``given`` names no input or contradicts its static dimensions.
    """
    symbols = given_symbols(model, given)
    chosen = {}
    for value in model.graph.inputs:
        shape = list(value.shape) if value.shape is not None else []
        for axis, dim in enumerate(shape):
            if not isinstance(dim, int):
                choice = _choice(value, axis, variant, longer)
                shape[axis] = symbols.setdefault(symbol(value, axis), choice)
        name = name_of(value)
        chosen[name] = tuple(int(d) for d in given.get(name, shape))  # type: ignore[arg-type]
    return chosen


def given_symbols(model: ir.Model, given: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the dynamic dimensions that given shapes, and operators, fix for all inputs.

    Raises:
        UserError: ``given`` names no input or contradicts its static dimensions.
    """
    inputs = {name_of(value): value for value in model.graph.inputs}
    symbols = contrib.fixed(model)
    for name, asked in given.items():
        if name not in inputs:
            raise UserError(f"--input {name}: the model's inputs are {', '.join(inputs)}")
        shape = inputs[name].shape
        _check_given(name, [None] * len(asked) if shape is None else list(shape), asked)
        for axis, dim in enumerate(shape or ()):
            if not isinstance(dim, int):
                symbols[symbol(inputs[name], axis)] = int(asked[axis])
    return symbols


def _check_given(name: str, shape: Sequence[object], asked: Sequence[int]) -> None:
    wrong = len(shape) != len(asked) or any(
        have != want if isinstance(have, int) else want < 1
        for have, want in zip(shape, asked, strict=False)
    )
    if wrong:
        have = ", ".join(map(str, shape))
        raise UserError(f"--input {name}: {list(asked)} does not fit the model's [{have}]")


def _choice(value: ir.Value, axis: int, variant: int, longer: int) -> int:
    """A number for a dynamic dimension: batch first, then pixels or steps."""
    rank = len(value.shape) if value.shape is not None else 0
    if axis == 0 and rank != 1:
        return _BATCH[variant]
    return (_SPATIAL if rank >= 4 else _SEQUENCE)[variant] * longer


def _sizes(model: ir.Model, inputs: Mapping[str, Shape]) -> dict[str, int]:
    """The size of every symbol in the shapes of inputs."""
    return {
        symbol(value, axis): size
        for value in model.graph.inputs
        for axis, size in enumerate(inputs[name_of(value)])
    }


def _infer_all(
    proto: onnx.ModelProto, inputs: Mapping[str, Shape], sizes: Mapping[str, int]
) -> dict[str, Shape]:
    """Shape inference over the whole graph at once, for the given input shapes."""
    claimed = onnx.GraphProto(value_info=proto.graph.value_info)  # of custom operators
    for info in proto.graph.value_info:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    for info in proto.graph.input:
        if info.name in inputs:
            _set_dims(info, inputs[info.name])
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"shape inference fails for inputs {dict(inputs)}: {error};"
            f" give shapes that fit with --input name=1x3x224x224"
        ) from error
    finally:
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(claimed.value_info)
    found, known = {}, dict[bytes, Shape | None]()
    for name, kind in types(inferred).items():
        key = kind.SerializeToString()
        if key not in known:
            known[key] = static(kind)
        if (shape := known[key]) is not None:
            found[name] = shape
    return found


def _set_dims(info: onnx.ValueInfoProto, shape: Shape) -> None:
    proto = info.type.tensor_type.shape
    del proto.dim[:]
    for dim in shape:
        proto.dim.add().dim_value = dim


def _add_initializer(found: Shapes, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    found.shape[value] = shape = extents_of(tensor)
    if len(shape) <= 1 and prod(shape) <= LIMIT and tensor.dtype != ir.DataType.STRING:
        found.number[value] = tensor.numpy()


# ------------------------------------------------------------------ folding of numbers


def fold(model: ir.Model, shape: Mapping[ir.Value, Shape], base: Shapes) -> dict[ir.Value, Array]:
    """Compute again what shape arithmetic gives, assuming ``shape`` where it says so.

    Args:
        model: The graph that ``base`` was sampled from.
        shape: The shapes that differ from the base.
        base: The sample.

    Returns:
        The numbers of every value that `Shapes.number` knows and that come out different.
    """
    after = Shapes(base.inputs, {**base.shape, **shape}, dict(base.number))
    changed: dict[ir.Value, Array] = {}
    for node in model.graph:
        if not any(output in base.number for output in node.outputs):
            continue
        sources = [v for v in node.inputs if v is not None]
        reads_shape = node.op_type in ("Shape", "Size") and sources[0] in shape
        if not reads_shape and not any(v in changed for v in sources):
            continue
        for output, number in zip(node.outputs, _fold_node(after, node), strict=False):
            if number is not None and not np.array_equal(number, base.number.get(output)):  # type: ignore[arg-type]
                after.number[output] = changed[output] = number
    return changed


def _fold_node(found: Shapes, node: ir.Node) -> Sequence[Array | None]:
    rule = FOLDS.get(node.op_type) if node.domain == "" else None
    if rule is None:
        return ()
    if node.op_type in ("Shape", "Size"):
        shape = found.of(node.inputs[0]) if node.inputs[0] is not None else None
        return () if shape is None else rule(node, [np.array(shape, np.int64)])
    inputs = []
    for value in node.inputs:
        number = found.number.get(value) if value is not None else None
        if number is None and value is not None:
            return ()
        inputs.append(number)
    return folded(node, inputs)  # type: ignore[arg-type]
