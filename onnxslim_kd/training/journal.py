"""Where a run's events go besides the terminal: a file of JSON lines, TensorBoard."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from onnxslim_kd.errors import OperationError, UserError

Event = Mapping[str, Any]
Listener = Callable[[Event], None]


@contextmanager
def journal(
    terminal: Listener, log: Path | None = None, tensorboard: Path | None = None
) -> Iterator[Listener]:
    """Give one listener that passes events to the terminal, a log and TensorBoard.

    Raises:
        UserError: The log cannot be opened, or tensorboard is not installed.
    """
    with ExitStack() as stack:
        listeners = [terminal]
        if log is not None:
            listeners.append(stack.enter_context(_lines(log)))
        if tensorboard is not None:
            listeners.append(stack.enter_context(_board(tensorboard)))

        def listen(event: Event) -> None:
            for listener in listeners:
                listener(event)

        yield listen


@contextmanager
def _lines(path: Path) -> Iterator[Listener]:
    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(f"log {path}: cannot be written: {error.strerror}") from error
    with file:

        def listen(event: Event) -> None:
            if event["event"] != "tick":  # which only moves the progress bar
                try:
                    file.write(json.dumps(event) + "\n")
                    file.flush()
                except OSError as error:
                    raise OperationError(f"log {path}: {error.strerror}") from error

        yield listen


@contextmanager
def _board(folder: Path) -> Iterator[Listener]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard is not installed: pip install 'onnxslim-kd[tensorboard]'"
        ) from error
    try:
        writer: Any = SummaryWriter(str(folder))
    except OSError as error:
        raise UserError(f"tensorboard {folder}: cannot be written: {error.strerror}") from error

    def listen(event: Event) -> None:
        kind = event["event"]
        if kind not in ("step", "epoch"):
            return
        place = (
            event["epoch"] * event["steps"] + event["step"] if kind == "step" else event["epoch"]
        )
        for name, value in event.items():
            if isinstance(value, float):
                writer.add_scalar(f"{kind}/{name}", value, place)

    try:
        yield listen
    finally:
        writer.close()
