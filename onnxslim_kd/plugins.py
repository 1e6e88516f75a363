"""Users' own code, named as ``package.module:function`` on the command line or in a config."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from onnxslim_kd.errors import (
    NotFoundError,
    OnnxSlimError,
    OperationError,
    UserError,
    near_misses,
)


def find(spec: str) -> Callable[..., Any]:
    """Import what ``spec`` names; modules of the working directory are found, too.

    Raises:
        UserError: The spec is not of the form ``package.module:function``.
        NotFoundError: There is no such module or function.
        OperationError: The module is there, but importing it fails.
    """
    module_name, colon, path = spec.partition(":")
    if not (colon and module_name and path):
        raise UserError(f"{spec!r} is not of the form package.module:function")
    with _working_directory_importable():
        module = _import(module_name, spec)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise NotFoundError(f"{spec}: no {part!r} in there{near_misses(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{spec} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]  # callable() does not narrow Any


def call(spec: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a user's function, named in messages as ``spec``.

    Raises:
        OperationError: It fails.
    """
    try:
        return function(*args, **options)
    except OnnxSlimError:
        raise
    except Exception as error:  # it is the user's, and may raise anything
        raise OperationError(f"{spec} failed: {type(error).__name__}: {error}") from error


def _import(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise NotFoundError(
                f"{spec}: no module {error.name!r} on the path or in {os.getcwd()}"
            ) from error
        raise OperationError(f"{spec}: importing {name} fails: {error}") from error
    except Exception as error:  # a user's module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise OperationError(f"{spec}: importing {name} fails: {reason}") from error


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)  # a console script, unlike `python -m`, does not have it
    try:
        yield
    finally:
        sys.path.remove(here)
