"""Write docs/api.md from the docstrings: python docs/make_api.py."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxslim_kd

PAGE = Path(__file__).parent / "api.md"
HEAD = """# API

Written by `python docs/make_api.py` from the docstrings. A `ModelLike` is a path, an
`onnx.ModelProto`, an `onnx_ir.Model` or a graphsurgeon graph; none of them is changed unless said.
All errors are subclasses of `onnxslim_kd.errors.OnnxSlimError`.
"""


def page() -> str:
    """Return the text of docs/api.md."""
    parts = [HEAD]
    for module, names in MODULES.items():
        parts.append(f"## {module}\n")
        home = import_module(module)
        for name in names:
            parts.append(_entry(name, getattr(home, name)))
    return "\n".join(parts)


def _entry(name: str, thing: Any) -> str:
    lines = [f"### {name}", "```text", _signature(name, thing), "```", *_prose(thing)]
    return "\n".join(lines) + "\n"


def _signature(name: str, thing: Any) -> str:
    """The call, on one line or with one argument on each."""
    found = inspect.signature(thing)
    arguments = [_argument(p) for p in _separated(list(found.parameters.values()))]
    result = found.return_annotation
    ending = "" if inspect.isclass(thing) or result is found.empty else f" -> {_text(result)}"
    line = f"{name}({', '.join(arguments)}){ending}"
    if len(line) <= 96:
        return line
    return "\n".join([f"{name}(", *(f"    {a}," for a in arguments), f"){ending}"])


def _separated(parameters: list[inspect.Parameter]) -> Iterator[inspect.Parameter | None]:
    """The parameters, with None before the first that needs its name."""
    keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for parameter in parameters:
        if keywords and parameter is keywords[0]:
            yield None
        yield parameter


def _argument(parameter: inspect.Parameter | None) -> str:
    if parameter is None:
        return "*"
    text = parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_text(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    if "factory" in repr(parameter.default) or inspect.isfunction(parameter.default):
        return f"{text} = ..."
    default = parameter.default
    return f"{text} = {type(default).__name__ + '()' if _is_default(default) else repr(default)}"


def _is_default(value: object) -> bool:
    """Whether ``value`` is what its class makes of no arguments, and long to write out."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _text(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    short = re.sub(r"(?:\w+\.)+(?=[A-Z])", "", text)
    return short.replace("str | PathLike[str] | ModelProto | Model | Graph", "ModelLike")


def _prose(thing: Any) -> Iterator[str]:
    """The docstring as Markdown: its sections' titles bold, their entries a list."""
    section = ""
    for line in (inspect.getdoc(thing) or "").replace("``", "`").splitlines():
        if line in ("Args:", "Raises:", "Attributes:", "Returns:"):
            section = line
            yield f"**{line[:-1]}**\n"
        elif section and re.match(r" {4}\*{0,2}\w+: ", line):
            name, _, rest = line.strip().partition(": ")
            yield f"- `{name}`: {rest}"
        elif section and line:
            yield f"  {line.strip()}"
        else:
            yield line


# module -> the names that are shown
MODULES = {
    "onnxslim_kd": tuple(onnxslim_kd.__all__),
    "onnxslim_kd.verify_merge": ("verify_merge",),
    "onnxslim_kd.training.engine": ("train", "Outcome"),
    "onnxslim_kd.training.config": ("parse", "read"),
    "onnxslim_kd.bench": ("bench", "Setting", "Report", "Case", "Row"),
    "onnxslim_kd.sandbox": ("check",),
}

if __name__ == "__main__":
    PAGE.write_text(page())
