"""Bring every model into one form, so that passes need no special cases.

1. Initializers are no graph inputs (IR 3 files list them; it also stops runtime fusions).
2. Weights are initializers (Paddle exports every one as a Constant node).
3. Functions are inlined, the opset is at least 17, the IR version is one that runtimes load.
4. Conv-like nodes have explicit pads where shapes allow.
5. Shapes are inferred on a copy without weights.
"""

import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd.access import dims, graphs, has_rank
from onnxslim_kd.inference import infer_shapes, without_weights
from onnxslim_kd.raising import OPSET, raise_message

IR_VERSIONS = (8, 13)
"""The IR versions written: 8 is opset 17's own, 13 the newest that ONNX Runtime 1.31 loads."""


def normalised(model: ir.Model, *, typed: bool = False) -> None:
    """Bring ``model`` into the one form that passes expect, in place.

    Args:
        model: Any model.
        typed: Whether shapes were inferred already.
    """
    if model.functions:
        common.InlinePass()(model)
    for value in model.graph.inputs:
        if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
            free = [None if isinstance(d, int) and d < 0 else d for d in value.shape]
            value.shape = ir.Shape(free)  # some exporters write -1 for a dynamic dimension
    inside = graphs(model)
    for graph in inside:
        graph.name = graph.name or "graph"  # ONNX wants one
    if any(value.name in graph.initializers for graph in inside for value in graph.inputs):
        common.RemoveInitializersFromInputsPass()(model)
    if any(node.op_type == "Constant" for graph in inside for node in graph):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.ir_version = written_version(model.ir_version)
    raise_opset(model)
    _name_nodes(model)
    if not typed:
        infer_shapes(model)
    _explicit_pads(model)


def written_version(given: int | None) -> int:
    """Return the IR version to write for a file of another one."""
    low, high = IR_VERSIONS
    return min(max(given or low, low), high)


def raise_opset(model: ir.Model, lowest: int = OPSET) -> None:
    """Convert ``model`` to opset ``lowest``, in place, unless it has that or a newer one.

    Raises:
        ModelError: An operator has no newer form.
    """
    if model.graph.opset_imports.get("", lowest) < lowest:
        with without_weights(model) as proto:
            raise_message(proto, lowest)
        adopt(model, ir.serde.deserialize_model(proto))


def adopt(model: ir.Model, other: ir.Model) -> None:
    """Give ``model`` the graph of ``other``, and that graph the weights of ``model``."""
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    graph = other.graph
    for value in [v for v in graph.inputs if v.name in weights]:
        graph.inputs.remove(value)
    values = ir.convenience.create_value_mapping(graph)
    for name, tensor in weights.items():
        if name in values and values[name].producer() is None:
            values[name].const_value = tensor
            graph.register_initializer(values[name])
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(other)
    graph.metadata_props.update(model.graph.metadata_props)
    model.graph = graph


def _name_nodes(model: ir.Model) -> None:
    """Give every node a unique name: plans, reports and merges refer to nodes by name."""
    nodes = [node for graph in graphs(model) for node in graph]
    taken = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    for index, node in enumerate(nodes):
        if not node.name or node.name in seen:
            base = node.name or f"{node.op_type}_{index}"
            name, extra = base, 0
            while name in taken or name in seen:
                extra += 1
                name = f"{base}_{extra}"
            node.name = name
        seen.add(node.name)


def _explicit_pads(model: ir.Model) -> None:
    """Turn auto_pad into pads where the spatial shape is known (ONNX Conv, MaxPool, ... docs)."""
    for node in model.graph:
        if node.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool"):
            continue
        mode = node.attributes.get_string("auto_pad", "NOTSET")
        if mode == "NOTSET":
            continue
        if mode == "VALID":
            node.attributes.pop("auto_pad")
            continue
        kernel = node.attributes.get_ints("kernel_shape") or dims(node.inputs[1])[2:]
        size = dims(node.inputs[0])[2:] if has_rank(node.inputs[0]) else (None,)
        if None in size or None in kernel:
            continue
        strides = node.attributes.get_ints("strides") or [1] * len(size)
        dilations = node.attributes.get_ints("dilations") or [1] * len(size)
        if node.op_type != "Conv" and max(dilations) > 1:
            continue  # ONNX Runtime pads poolings as if they had none
        begin, end = [], []
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
            assert n is not None and k is not None
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            small, large = total // 2, total - total // 2
            begin.append(small if mode == "SAME_UPPER" else large)
            end.append(large if mode == "SAME_UPPER" else small)
        node.attributes.pop("auto_pad")
        node.attributes["pads"] = ir.AttrInt64s("pads", begin + end)
