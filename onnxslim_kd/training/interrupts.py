"""Ctrl-C while training: the step ends, a checkpoint is written, then the run stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that the step ends and a checkpoint is written."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, frame: object) -> None:
        flag.set()
        # A second one ends at once.
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
