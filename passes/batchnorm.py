"""Put BatchNormalization back where an exporter folded it away, and take it out again.

Exporters fold BatchNormalization into convolutions, but a pruned net recovers with live batch
statistics and hardly without. So for training::

    found = channel_statistics(original, bare_convolutions(original), batches)
    now = channel_statistics(model, bare_convolutions(model), batches)
    reinsert(model, found, now)
    ...                                           # train
    fold(model)                                   # exact
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import UserError
from onnxslim_kd.model import dims, has_rank, name_of, new_initializer
from onnxslim_kd.passes.fold import fold
from onnxslim_kd.runtime import Array, Session

__all__ = ["bare_convolutions", "channel_statistics", "fold", "reinsert"]

EPSILON = 1e-5
Statistics = Mapping[str, tuple[Array, Array]]
"""Mean and standard deviation of every channel, by the name of the value."""


def bare_convolutions(model: ir.Model) -> list[str]:
    """Return the outputs of the convolutions that a BatchNormalization may follow but does not.

    Left out, for there never was one to fold:

    1. a graph output, and what is only reshaped or transposed, as detection heads and the patches
       of a transformer are;
    2. neighbours of another normalisation, as in ConvNeXt;
    3. outputs of one pixel (squeeze-excite gates, pooled heads), whose batch statistics would come
       from a handful of numbers.
    """
    return [name_of(node.outputs[0]) for node in model.graph if _is_bare(node)]


def _is_bare(node: ir.Node) -> bool:
    output = node.outputs[0]
    if node.op_type != "Conv" or node.domain or output.is_graph_output():
        return False
    pixels = dims(output)[2:] if has_rank(output) else ()
    users = _readers(output)
    before = _computed_from(node.inputs[0])
    return not (
        (pixels and all(size == 1 for size in pixels))
        or users <= MOVES
        or users & NORMS
        or {"ReduceMean", "Sub"} <= users  # LayerNormalization before opset 17
        or (before is not None and before.op_type in NORMS - {"BatchNormalization"})
    )


def _readers(value: ir.Value) -> set[str]:
    """Return the operators that read ``value``, seen through Concat, but for Shape."""
    found: set[str] = set()
    for user in value.consumers():
        joins = user.op_type == "Concat"
        found |= {u.op_type for u in user.outputs[0].consumers()} if joins else {user.op_type}
    return found - {"Shape"}


def _computed_from(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computed ``value``, whatever axes were moved since."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def reinsert(
    model: ir.Model, statistics: Statistics, running: Statistics | None = None
) -> list[str]:
    """Put a BatchNormalization behind every convolution that has none, in place.

    gamma and beta are the deviation and mean that the *original* net's convolution had, so that
    normalising by what the present, perhaps pruned net has restores the original's distribution.
    With both alike nothing changes.

    Args:
        model: The model to change.
        statistics: Of the original's convolution outputs; those not in it are left alone.
        running: Of the present model's; None for the same as ``statistics``.

    Returns:
        The convolution outputs that are normalised now.

    Raises:
        UserError: A statistic has another number of channels than the convolution.
    """
    done = []
    for name in bare_convolutions(model):
        if name in statistics:
            now = statistics if running is None else running
            if name not in now:
                raise UserError(f"running statistics of {name} are missing; measure them as well")
            _insert(model, name, statistics[name], now[name])
            done.append(name)
    return done


def _insert(
    model: ir.Model, name: str, wanted: tuple[Array, Array], now: tuple[Array, Array]
) -> None:
    node = next(n for n in model.graph if n.outputs and n.outputs[0].name == name)
    value = node.outputs[0]
    weight = node.inputs[1]
    channels = dims(weight)[0]
    for array in (*wanted, *now):
        if np.shape(array) != (channels,):
            raise UserError(
                f"statistics of {name} are for {len(array)} channels, the model has {channels};"
                f" take the rows that the plan keeps"
            )
    # epsilon stands on both sides, so that equal statistics give exactly the identity
    arrays = {
        "scale": np.sqrt(np.square(wanted[1]) + EPSILON),
        "bias": wanted[0],
        "mean": now[0],
        "var": np.square(now[1]),
    }
    dtype = weight.dtype.numpy() if weight is not None and weight.dtype is not None else np.float32
    inputs = [
        new_initializer(model.graph, f"{name}.bn_{key}", np.asarray(array, dtype))
        for key, array in arrays.items()
    ]
    users = tuple(value.uses())
    norm = ir.node(
        "BatchNormalization", [value, *inputs], attributes={"epsilon": EPSILON}, name=f"{name}.bn"
    )
    output = norm.outputs[0]
    output.name, output.shape, output.type = f"{name}.normalised", value.shape, value.type
    model.graph.insert_after(node, norm)
    for user, index in users:
        user.replace_input_with(index, output)


def channel_statistics(
    model: ir.Model, values: Sequence[str], batches: Iterable[Mapping[str, Array]]
) -> dict[str, tuple[Array, Array]]:
    """Measure the mean and deviation of every channel (axis 1) of ``values`` over ``batches``.

    The sums are taken inside the graph, so that no activation leaves the runtime.

    Raises:
        UserError: There is no batch, or a value is not in the graph.
    """
    probe = model.clone()
    known = {name_of(v): v for node in probe.graph for v in node.outputs if v.name}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise UserError(f"{unknown[0]} is not a value of this model")
    outputs = {name: _probe(probe.graph, known[name]) for name in values}
    session = Session(probe)
    wanted = [out for three in outputs.values() for out in three]
    totals: dict[str, tuple[float, Array, Array]] = {}
    for batch in batches:
        got = session.run(batch, wanted)
        for name, (count, mean, variance) in outputs.items():
            part = (float(got[count]), got[mean].astype(float), got[variance].astype(float))
            totals[name] = _joined(totals[name], part) if name in totals else part
    if values and not totals:
        raise UserError("statistics need at least one batch, got none")
    return {name: (mean, np.sqrt(variance)) for name, (_, mean, variance) in totals.items()}


def _probe(graph: ir.Graph, value: ir.Value) -> tuple[str, str, str]:
    """Add count, mean and variance of each channel as outputs; return their names."""
    axes = [axis for axis in range(len(dims(value))) if axis != 1]
    name = name_of(value)

    def add(op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{name}.{op}.{len(graph)}")
        graph.append(node)
        node.outputs[0].name = f"{name}.{op}.{len(graph)}"
        return node.outputs[0]

    def mean(of: ir.Value, keepdims: int) -> ir.Value:
        if graph.opset_imports.get("", 0) < 18:
            return add("ReduceMean", [of], axes=axes, keepdims=keepdims)
        where = new_initializer(graph, f"{name}.axes", np.array(axes, np.int64))
        return add("ReduceMean", [of, where], keepdims=keepdims)

    centred = add("Sub", [value, mean(value, 1)])
    found = add("Size", [value]), mean(value, 0), mean(add("Mul", [centred, centred]), 0)
    for out, dtype in zip(found, (ir.DataType.INT64, value.dtype, value.dtype), strict=True):
        out.type = ir.TensorType(dtype or ir.DataType.FLOAT)
        graph.outputs.append(out)
    return name_of(found[0]), name_of(found[1]), name_of(found[2])


def _joined(
    one: tuple[float, Array, Array], two: tuple[float, Array, Array]
) -> tuple[float, Array, Array]:
    """Count, mean and variance of two samples together (Chan et al., 1979)."""
    count = one[0] + two[0]
    share = two[0] / count
    apart = two[1] - one[1]
    variance = one[2] * (1 - share) + two[2] * share + np.square(apart) * share * (1 - share)
    return count, one[1] + apart * share, variance


MOVES = frozenset(("Flatten", "Reshape", "Squeeze", "Transpose"))
NORMS = frozenset(
    (
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "MeanVarianceNormalization",
        "RMSNormalization",
    )
)
