"""Ctrl-C while training: the step ends, a checkpoint is written, then the run stops."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts(numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that the step ends and a checkpoint is written."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, frame: object) -> None:
        flag.set()
        # A second one ends at once.
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in numbers}
    for number in previous:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
