"""Keep the process small and quick: mapped pages that are done with, and the collector's pauses."""

import gc
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def collection_paused() -> Iterator[None]:
    """Let Python's cyclic garbage collector rest while a graph is built or walked.

    It would look at every node and value again and again, and find that all are in use: a third
    of the time to load a large graph.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def release(array: np.ndarray[Any, Any]) -> None:
    """Give back the memory under a view of a mapped file: a later look reads the file again."""
    file = _mapped_file(array)
    if file is None or not hasattr(file, "madvise"):
        return
    start = array.__array_interface__["data"][0]
    base = np.frombuffer(file, np.uint8).__array_interface__["data"][0]
    first = (start - base) // mmap.PAGESIZE * mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, first, start - base + array.nbytes - first)


def _mapped_file(array: np.ndarray[Any, Any]) -> mmap.mmap | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None
