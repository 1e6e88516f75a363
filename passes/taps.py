"""Find the values that a loss names: exactly, or by a regular expression.

A name is a value's name in its own file. A name that begins with ``~`` is a regular expression,
matched with `re.match` (so a prefix is enough) against the names of values and against the module
paths that exporters leave in the graph; a module stands for its last output. Several matches
are several values, in the order of the graph.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import onnx_ir as ir

from onnxslim_kd.errors import NotFoundError, UserError, near_misses
from onnxslim_kd.model import name_of
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.modules import scopes_of

PATTERN = "~"


@dataclass(frozen=True)
class Branch:
    """The values of one of the merged models, by their names in its own file."""

    title: str
    """For messages: ``student`` or ``teacher``."""
    values: Mapping[str, ir.Value]
    modules: Mapping[str, ir.Value] = field(default_factory=dict)
    """The last output of every module that the exporter recorded."""
    inner: Mapping[str, str] = field(default_factory=dict)
    """Values inside of If, Loop and Scan bodies, with the name of the node that holds them."""

    @classmethod
    def of(cls, title: str, model: ir.Model) -> "Branch":
        """Index ``model``, to be called before its names get a prefix."""
        values = {name_of(v): v for v in model.graph.inputs}
        modules: dict[str, ir.Value] = {}
        inner: dict[str, str] = {}
        for node in model.graph:
            outputs = [v for v in node.outputs if v.name]
            values.update((name_of(v), v) for v in outputs)
            for scope in scopes_of(node):
                if scope and outputs:
                    modules[scope] = outputs[0]  # later nodes of the module win
            for body in _bodies(node):
                inner.update({name: node.name or "" for name in _names_within(body)})
        return cls(title, values, modules, inner)

    def find(self, wanted: str, others: Iterable["Branch"] = ()) -> list[ir.Value]:
        """Return the values that ``wanted`` names: one, or several for a pattern.

        Raises:
            NotFoundError: There is none; the message says where the name is, or what is near.
        """
        if wanted.startswith(PATTERN):
            return self._match(wanted[len(PATTERN) :])
        if wanted in self.values:
            return [self.values[wanted]]
        raise NotFoundError(self._missing(wanted, others))

    def _match(self, pattern: str) -> list[ir.Value]:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"{PATTERN}{pattern} is no regular expression: {error}") from error
        for index in (self.values, self.modules):
            found = [value for name, value in index.items() if compiled.match(name)]
            if found:
                return list(dict.fromkeys(found))
        raise NotFoundError(
            f"no value and no module of the {self.title} matches {pattern!r}"
            f"{near_misses(pattern, [*self.values, *self.modules])}"
        )

    def _missing(self, wanted: str, others: Iterable["Branch"]) -> str:
        if wanted in self.inner:
            return (
                f"value {wanted!r} of the {self.title} is inside of node {self.inner[wanted]!r}"
                f" and exists only while that runs; name a value of the main graph"
            )
        where = [other.title for other in others if wanted in other.values]
        hint = f"; the {where[0]} has one" if where else ""
        near = [
            f"{name} {dims.text(self.values[name])}"
            for name in get_close_matches(wanted, self.values, n=5, cutoff=0.5)
        ]
        misses = f"; near misses: {', '.join(near)}" if near else ""
        return f"the {self.title} has no value {wanted!r}{hint}{misses}"


def _bodies(node: ir.Node) -> Sequence[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def _names_within(graph: ir.Graph) -> Iterable[str]:
    yield from (name_of(v) for v in graph.inputs)
    for node in graph:
        yield from (v.name for v in node.outputs if v.name)
        for body in _bodies(node):
            yield from _names_within(body)
