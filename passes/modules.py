"""The module paths that exporters leave in a graph, such as ``layer1``, ``layer1.0``.

torch's exporter records them as node metadata; the older one, and others, write them into the
names of nodes (``/layer1/layer1.0/conv1/Conv``). Graphs of other origin may have none.
"""

import ast
from functools import cache

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata of torch's exporter: the module paths of a node, outermost first, as a list."""


def scopes_of(node: ir.Node) -> list[str]:
    """Return the modules that ``node`` belongs to, outermost first; often there are none."""
    found = recorded(node)
    if found:  # the first is the whole model, the last the operator itself
        return [scope for scope in found[:-1] if scope]
    parts = (node.name or "").split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts)) if parts[i]]


def add_prefix(node: ir.Node, prefix: str) -> None:
    """Put ``prefix`` before every module path recorded at ``node``."""
    found = recorded(node)
    if found:
        node.metadata_props[SCOPES] = repr([prefix + scope for scope in found])


def recorded(node: ir.Node) -> tuple[str, ...]:
    """Return the module paths in a node's metadata: the whole model's "", ..., the operator's."""
    return _parsed(node.metadata_props.get(SCOPES) or "[]")


@cache
def _parsed(text: str) -> tuple[str, ...]:
    """The list in ``text``, nothing if it is none; the nodes of a module have the same one."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ()
    return tuple(map(str, scopes)) if isinstance(scopes, list | tuple) else ()
