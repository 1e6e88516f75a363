"""The clean-up tools that strip.py compares, and processes that may crash or hang.

worker = Worker("onnxsim", limit=60)
worker.run(source, target)        # seconds, or a sentence that says how it failed
"""

import logging
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnx

OURS = "onnxslim-kd"
PEERS = ("onnxslim", "onnxsim", "onnxscript", "ort basic")
LONG = 2.0
"""Seconds after which a tool is not run again."""
RUNS = 5
"""The first one imports what the tool needs; of the others the fastest is what the tool takes."""


def ours(source: Path, target: Path) -> None:
    from onnxslim_kd.model import save
    from onnxslim_kd.passes.strip import infer_prune

    save(infer_prune(source).model, target)


def ours_unproven(source: Path, target: Path) -> None:
    from onnxslim_kd.model import save
    from onnxslim_kd.passes.strip import infer_prune

    save(infer_prune(source, verify=False).model, target)


def onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), target)


def onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def onnxscript(source: Path, target: Path) -> None:
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(source)), target)


def ort_basic(source: Path, target: Path) -> None:
    from onnxslim_kd.runtime import write_optimised

    write_optimised(source, target)


def load_and_save(source: Path, target: Path) -> None:
    onnx.save(onnx.load(source), target)


def session(source: Path, target: Path) -> None:
    from onnxslim_kd.runtime import Session

    Session(source)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    OURS: ours,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "onnxscript": onnxscript,
    "ort basic": ort_basic,
    "unproven": ours_unproven,
    "load and save": load_and_save,
    "session": session,
}


class Worker:
    """One tool in a process of its own, which is replaced when it crashes or takes too long."""

    def __init__(self, name: str, limit: float) -> None:
        self.name, self.limit = name, limit
        self._process: Any = None
        self._pipe: Connection | None = None

    def run(self, source: Path, target: Path) -> float | str:
        """Return the processor's seconds of the tool's fastest run, or how it failed."""
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self.name, theirs), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((source, target))
            if not self._pipe.poll(self.limit):
                self.stop()
                return f"takes more than {self.limit:g} s"
            answer: float | str = self._pipe.recv()
        except (EOFError, OSError):
            self.stop()
            return "crashes"
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _serve(name: str, pipe: Connection) -> None:
    logging.disable(logging.WARNING)  # the peers' remarks on every initializer
    while True:
        source, target = pipe.recv()
        try:
            pipe.send(_fastest(TOOLS[name], source, target))
        except Exception as error:  # whatever a tool raises is its result
            pipe.send(f"fails: {type(error).__name__}: {' '.join(str(error).split())}"[:200])


def _fastest(tool: Callable[[Path, Path], None], source: Path, target: Path) -> float:
    """Run a tool a few times: the first one imports.

    It is the processor's time that counts, on one core what a clock would show if nothing else ran.
    """
    best, spent = float("inf"), 0.0
    for _ in range(RUNS):
        target.unlink(missing_ok=True)
        target.with_name(f"{target.name}.data").unlink(missing_ok=True)
        start = time.process_time()
        tool(source, target)
        taken = time.process_time() - start
        best, spent = min(best, taken), spent + taken
        if spent > LONG:
            break
    return best
