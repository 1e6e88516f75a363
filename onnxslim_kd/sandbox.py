"""Try a file of unknown origin in a process that may die, before this one reads it.

The readers are C++: a crafted file can abort ONNX Runtime or keep shape inference busy for hours.
So a child process reads it first, under limits on memory, processor time and time, and answers
with one line of JSON::

    python -m onnxslim_kd.sandbox FILE SECONDS BYTES
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim_kd.errors import ModelError, OnnxSlimError, OperationError, UserError

if TYPE_CHECKING:
    import onnx_ir as ir

PATIENCE = 5
"""Of the clock's time, as a multiple of the processor's: other programs may hold the machine."""
LEAST_MEMORY = 4 * 2**30
"""Bytes of address space that are always granted: the libraries alone take a part of it."""


def check(path: str | os.PathLike[str], *, seconds: float = 60, memory: int | None = None) -> None:
    """Load, check, infer the shapes of, open and run ``path`` once, in a child process.

    Args:
        path: The file; it must not change between this call and its use.
        seconds: The processor time that the child may take, and of the clock's `PATIENCE` times.
        memory: Bytes of address space it may take; by default half of this machine's memory, and
            no less than `LEAST_MEMORY`.

    Raises:
        ModelError: The file is refused, crashes its reader, or takes more than it may.
        UserError: This system cannot limit processes.
    """
    if sys.platform == "win32":
        raise UserError("untrusted files need a system that limits processes; use Linux or macOS")
    if memory is None:
        memory = max(LEAST_MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    limits = f"{seconds:g} s and {memory / 2**30:.3g} GiB"
    command = [sys.executable, "-m", "onnxslim_kd.sandbox", os.fspath(path), f"{seconds}"]
    try:
        wait = PATIENCE * seconds
        done = subprocess.run([*command, f"{memory}"], capture_output=True, timeout=wait)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path}: reading it took more than {wait:g} s; not used") from None
    answer = _answer(done.stdout)
    if answer is None and -done.returncode == signal.SIGXCPU:
        raise ModelError(f"{path}: reading it took more than {seconds:g} s; not used")
    if answer is None:
        how = _ending(done.returncode)
        raise ModelError(f"{path}: its reader {how} under limits of {limits}; not used")
    if answer:
        raise ModelError(answer)


def _answer(output: bytes) -> str | None:
    """The child's error, "" if it has none, or None if it did not get to its answer."""
    lines = output.decode(errors="replace").splitlines()
    try:
        return str(json.loads(lines[-1])["error"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    return f"crashed ({signal.Signals(-code).name})"


# ------------------------------------------------------------------------- in the child


def _limit(seconds: float, memory: int) -> None:
    import resource

    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (soft, hard))


def _try(path: Path) -> str:
    """Read ``path`` in every way that the commands do; return what is wrong with it, or ""."""
    import onnx

    from onnxslim_kd import model

    try:
        loaded = model.load(path)
        onnx.checker.check_model(path, full_check=True)
        _run_once(loaded)
    except OnnxSlimError as error:
        return " ".join(str(error).split())
    except MemoryError:
        return f"{path}: reading it takes more memory than it may; not used"
    except Exception as error:  # whatever a reader raises, the file is not fit for use
        return f"{path}: {' '.join(str(error).split())}"
    return ""


def _run_once(model: "ir.Model") -> None:
    from onnxslim_kd import runtime, shapes

    session = runtime.Session(model, threads=1)
    try:
        feeds = runtime.random_feeds(model, shapes.choose_inputs(model, {}, 0))
        session.run(feeds)
    except (UserError, OperationError) as error:
        if "alloc" in str(error):
            raise MemoryError from error
        # A refusal is harmless: the sizes chosen here need not suit the model.


def main() -> None:
    """Read the file named on the command line and print one line of JSON."""
    path, seconds, memory = sys.argv[1:]
    _limit(float(seconds), int(memory))
    sys.stdout.write(json.dumps({"error": _try(Path(path))}) + "\n")


if __name__ == "__main__":
    main()
