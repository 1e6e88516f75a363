"""Which parameters a pattern or a name means."""

import re
from dataclasses import replace

import onnx_ir as ir

from onnxslim_kd.errors import NotFoundError, UserError, near_misses
from onnxslim_kd.passes import ties
from onnxslim_kd.passes.groups import Analysis, Parameter


def match(analysis: Analysis, pattern: str, ignore: str | None = None) -> list[Parameter]:
    """Return the parameters whose name, node or scope begins with a match of ``pattern``.

    `re.match` as in the tutorials: ``conv1`` also chooses ``conv10_weights``.

    Raises:
        UserError: A regular expression is malformed.
        NotFoundError: Nothing matches; near misses are listed.
    """
    wanted, unwanted = compiled(pattern), compiled(ignore) if ignore else None
    if not analysis.parameters:
        raise NotFoundError(_why_empty(analysis.model))
    chosen = [
        p
        for p in analysis.parameters
        if _is_meant(p, wanted) and not (unwanted and _is_meant(p, unwanted))
    ]
    if not chosen:
        raise NotFoundError(
            f"pattern {pattern!r} matches no parameter, node or scope"
            f"{' that is not ignored' if ignore else ''}{misses(analysis, pattern)}"
        )
    return chosen


def keeping(analysis: Analysis, ignore: str) -> Analysis:
    """Pin the channels of the layers that ``ignore`` means, whoever shares them.

    Raises:
        UserError: The regular expression is malformed.
    """
    unwanted = compiled(ignore)
    pinned = dict(analysis.components.pinned)
    for p in analysis.parameters:
        if p.produces and _is_meant(p, unwanted):
            reason = f"--ignore keeps the channels of {p.name}"
            pinned = dict.fromkeys(analysis.labels(p.birth).tolist(), reason) | pinned
    return replace(analysis, components=replace(analysis.components, pinned=pinned))


def _is_meant(parameter: Parameter, pattern: re.Pattern[str]) -> bool:
    return any(pattern.match(alias) for alias in parameter.aliases)


def _why_empty(model: ir.Model) -> str:
    """Say why a model has no parameter at all."""
    bodies, unknown = set(), set()
    for node in model.graph:
        if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            bodies.add(node.op_type)
        if ties.rule_of(node) is None and any(v and v.is_initializer() for v in node.inputs):
            unknown.add(f"{node.domain}.{node.op_type}".lstrip("."))
    if bodies:
        return (
            f"nothing can be pruned: every layer with weights is in a body of"
            f" {' or '.join(sorted(bodies))}, and bodies are left whole"
        )
    if unknown:
        return f"nothing can be pruned: there is no rule for {', '.join(sorted(unknown))}"
    return "nothing can be pruned: no node of the model has a weight with channels"


def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        UserError: It is malformed; the message says where.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def find(analysis: Analysis, name: str) -> Parameter:
    """Return the parameter of exactly this name, or read by the node of this name.

    Raises:
        NotFoundError: There is none; near misses are listed.
    """
    named = [p for p in analysis.parameters if p.name == name]
    named += [p for p in analysis.parameters if p.node.name == name and p.produces]
    if not named:
        raise NotFoundError(f"no parameter or node is called {name!r}{misses(analysis, name)}")
    return next((p for p in named if p.produces), named[0])


def misses(analysis: Analysis, name: str) -> str:
    """Near misses of a name or pattern, or the first names there are."""
    plain = re.sub(r"[^\w/.:]+", "", name)
    names = list(dict.fromkeys(p.name for p in analysis.parameters if p.produces))
    return near_misses(plain, names) or f"; the parameters are {', '.join(names[:5])}, ..."
