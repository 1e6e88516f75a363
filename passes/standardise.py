"""Weights standardised in the graph, which exporters write as BatchNormalization in training.

`torch.nn.functional.batch_norm(weight.reshape(1, channels, -1), training=True)`, as in BiT's
convolutions, takes its statistics from the weight and not from data; in inference mode it would
take those of nobody. Of a single row the same is InstanceNormalization, which has no modes.
"""

import onnx_ir as ir

from onnxslim_kd.model import dims, has_rank


def standardise(graph: ir.Graph) -> int:
    """Write such nodes as InstanceNormalization, in place; return how many there were."""
    done = 0
    fed = reached(graph)
    for node in graph:
        if is_training(node) and node.inputs[0] not in fed and _has_one_row(node):
            node.op_type = "InstanceNormalization"
            node.resize_inputs(3)
            node.resize_outputs(1)
            for name in ("momentum", "training_mode"):
                node.attributes.pop(name, None)
            done += 1
    return done


def is_training(node: ir.Node) -> bool:
    """Tell whether ``node`` is a BatchNormalization that takes statistics of what it is given."""
    return node.op_type == "BatchNormalization" and bool(
        node.attributes.get_int("training_mode", 0)
    )


def reached(graph: ir.Graph) -> set[ir.Value | None]:
    """Return the values that an input of ``graph`` leads to; the others are known beforehand."""
    found: set[ir.Value | None] = set(graph.inputs)
    for node in graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _has_one_row(node: ir.Node) -> bool:
    value = node.inputs[0]
    kept = any(out.uses() or out.is_graph_output() for out in node.outputs[1:])
    return has_rank(value) and len(dims(value)) > 2 and dims(value)[0] == 1 and not kept
