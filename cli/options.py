"""What several commands share: parsing of small option languages, tables, JSON."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import BaseModel
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeRemainingColumn
from rich.table import Table

from onnxslim_kd.errors import UserError

Value = TypeVar("Value")
FILE = click.Path(path_type=Path)
"""A file or folder; whether it must be there is for the command to say."""

# Options that mean the same in every command that has them.
untrusted = click.option(
    "--untrusted",
    is_flag=True,
    help="First try the file in a child process with limits on memory and time.",
)
force = click.option("--force", is_flag=True, help="Replace the output if it exists.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
inputs = click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=1x3x224x224",
    help="Shape of an input; repeatable.",
)
preprocess = click.option("--preprocess", default="", help="The same line as in training.")
provider = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where to run; running elsewhere is an error.",
)
threads = click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Threads inside an operator; 0 for the cores there are.",
)


def of(settings: type[BaseModel], spelled: Mapping[str, str]) -> Callable[[Any], Any]:
    """Declare an option for every field of ``settings``, with its type, default and help.

    Args:
        settings: What the command takes.
        spelled: The options that are not called like their field.
    """

    def declare(command: Any) -> Any:
        for name, field in reversed(settings.model_fields.items()):
            flag = "--" + spelled.get(name, name).replace("_", "-")
            if field.annotation is bool:
                flag += f"/--no-{flag[2:]}"
            how = _read_as(field.annotation, field.default)
            command = click.option(flag, name, help=field.description, **how)(command)
        return command

    return declare


def _read_as(annotation: Any, default: object) -> dict[str, Any]:
    """How click reads a field; what holds several values comes as text, or repeated."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    kind = kinds[0] if NoneType in get_args(annotation) else annotation
    if get_origin(kind) is dict and default is None:
        return {}
    if get_origin(kind) in (dict, tuple):
        return {"multiple": True}
    if get_origin(kind) is Literal:
        kind = click.Choice(get_args(kind))
    elif kind is Path:
        kind = FILE
    return {"type": kind, "default": default, "show_default": default != ""}


def check_untrusted(wanted: bool, *paths: str | os.PathLike[str]) -> None:
    """Try each file in a child process, if ``--untrusted`` asks for it.

    Raises:
        ModelError: A file is not fit for use.
    """
    if wanted:
        from onnxslim_kd import sandbox

        for path in paths:
            sandbox.check(path)


def shapes(values: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Parse ``name=1x3x224x224`` options.

    Raises:
        UserError: One is not of this form, or an input is named twice.
    """
    found = []
    for text in values:
        name, equals, numbers = text.rpartition("=")
        parts = numbers.split("x")
        if not equals or not all(p.isdecimal() and int(p) > 0 for p in parts):
            raise UserError(f"--input {text!r}: expected a form such as image=1x3x224x224")
        found.append((name, tuple(int(p) for p in parts)))
    return _by_name("--input", found)


def ratios(text: str) -> dict[str, float]:
    """Parse ``name=0.2,name2=0.4``.

    Raises:
        UserError: An entry is not of this form, or a parameter is named twice.
    """
    found = []
    for entry in text.split(","):
        name, equals, number = entry.rpartition("=")
        if not equals or not name:
            raise UserError(f"--ratios {entry!r}: expected a form such as conv1_weights=0.3")
        found.append((name.strip(), _number("--ratios", number)))
    return _by_name("--ratios", found)


def paired_ratios(names: str, numbers: str) -> dict[str, float]:
    """Pair the tutorials' two comma lists.

    Raises:
        UserError: The lists differ in length, an entry is no number, or a name comes twice.
    """
    keys, values = names.split(","), numbers.split(",")
    if len(keys) != len(values):
        raise UserError(
            f"--pruned-params has {len(keys)} names and --pruned-ratios {len(values)} ratios;"
            f" give one ratio for every name"
        )
    pairs = zip(keys, values, strict=True)
    return _by_name(
        "--pruned-params", [(key.strip(), _number("--pruned-ratios", v)) for key, v in pairs]
    )


def _by_name(option: str, entries: Sequence[tuple[str, Value]]) -> dict[str, Value]:
    found = dict(entries)
    if len(found) < len(entries):
        twice = next(name for name, n in Counter(name for name, _ in entries).items() if n > 1)
        raise UserError(f"{option}: {twice} is named twice; name it once")
    return found


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a number") from None


def print_table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Print a table that a person can read at 80 columns; all but the first column to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console().print(table)


def console() -> Console:
    """A console on standard output, at least 80 columns wide where it is no terminal."""
    return Console(highlight=False, markup=False)


def tell(sentence: str) -> None:
    """Print a sentence, broken where the terminal ends, at 80 columns where there is none."""
    console().print(sentence)


def follow(what: str, steps: Iterable[tuple[int, int]]) -> None:
    """Show a progress bar on standard error while ``steps`` tell how many are done, of how many."""
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:3], TimeRemainingColumn())
    with Progress(*columns, MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        for done, total in steps:
            bar.update(task, completed=done, total=total)


def print_json(data: Mapping[str, Any]) -> None:
    """Print JSON, and nothing else."""
    click.echo(json.dumps(data, indent=1, default=str))


def print_line(event: Mapping[str, Any]) -> None:
    """Print an event as one line of JSON."""
    click.echo(json.dumps(event, default=str))


def count(number: float) -> str:
    """Write a large number for people: 313.6M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g}{letter}"
    return f"{number:g}"
