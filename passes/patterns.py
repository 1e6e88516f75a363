"""What small rewrites share: to look back from a node, and to put one node in place of several."""

from collections.abc import Sequence

import onnx_ir as ir


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that makes ``value``, if it is one of ONNX's ``operators``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators and not node.domain else None


def is_private(value: ir.Value | None) -> bool:
    """Tell whether one input of one node is all that reads ``value``."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def before(node: ir.Node, index: int, *operators: str) -> ir.Node | None:
    """Return what makes an input of ``node``, if it is one of ``operators`` and feeds only it.

    It stands in the same graph, and has no other output.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    first = made_by(value, *operators)
    if first is None or not is_private(value):
        return None
    return first if first.graph is node.graph and len(first.outputs) == 1 else None


def skip(node: ir.Node, first: ir.Node) -> bool:
    """Let ``node`` read what ``first`` reads, and remove ``first``."""
    node.replace_input_with(0, first.inputs[0])
    assert first.graph is not None
    first.graph.remove(first, safe=True)
    return True


def replace(chain: Sequence[ir.Node], new: ir.Node) -> bool:
    """Put ``new`` in the place of ``chain``, whose first node gives the result.

    Returns:
        False, and changes nothing, where something else reads a value inside of the chain, or a
        part of it stands in another graph.
    """
    inside, last = set(chain), chain[0]
    for node in chain[1:]:
        value = node.outputs[0]
        alone = inside.issuperset(value.consumers()) and not value.is_graph_output()
        if not alone or node.graph is not last.graph:
            for index in range(len(new.inputs)):
                new.replace_input_with(index, None)
            return False
    old, output, graph = last.outputs[0], new.outputs[0], last.graph
    assert graph is not None
    output.shape, output.type = old.shape, old.type
    graph.insert_before(last, new)
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(list(dict.fromkeys(chain)), safe=True)
    output.name = old.name
    return True
