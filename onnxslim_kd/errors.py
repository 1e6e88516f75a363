"""Everything the package raises on purpose.

The tree (exit code of the command line in brackets)::

    OnnxSlimError
    ├── UserError            [2]  bad usage or input; the message says what to do
    │   ├── ModelError       [2]  a model that cannot be read, or is not supported, by name
    │   └── NotFoundError    [2]  a name or pattern that matches nothing; near misses are listed
    └── OperationError       [1]  a sound request that failed
        ├── PassError        [1]  a pass broke its contract
        └── ProofError       [1]  the numbers after a pass are not what they must be

A message is one sentence: what, which name, the value got, what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class OnnxSlimError(Exception):
    """Base of all errors of this package."""

    exit_code: ClassVar[int] = 1


class UserError(OnnxSlimError):
    """Bad usage or input."""

    exit_code: ClassVar[int] = 2


class ModelError(UserError):
    """A model file or graph that cannot be read or is not supported."""


class NotFoundError(UserError):
    """A name or pattern that matches nothing."""


class OperationError(OnnxSlimError):
    """A sound request that could not be carried out."""


class PassError(OperationError):
    """A pass broke its contract: the graph is not valid, or its interface changed."""


class ProofError(OperationError):
    """The outputs after a pass are not what they must be."""


def near_misses(name: str, known: Iterable[str], *, most: int = 5) -> str:
    """Return ``"; near misses: a, b"`` for the names close to ``name``, or ``""``."""
    found = get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; near misses: {', '.join(found)}" if found else ""


def insist_on(option: str, given: object, known: Iterable[str]) -> None:
    """Refuse a word that is none of those an option knows.

    Raises:
        UserError: It is none of them.
    """
    words = list(known)
    if given not in words:
        raise UserError(f"{option} {given!r} is not one of {', '.join(words)}")
