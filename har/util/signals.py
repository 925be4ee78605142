"""Ctrl-C and SIGTERM, handled at a point where no work is lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handle_sigterm_as_ctrl_c() -> None:
    """End a command on SIGTERM, which `mlflow run` and job schedulers send, as on Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def ignore_ctrl_c() -> Iterator[None]:
    """Ignore Ctrl-C during the block; a process started in it ignores it for good."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def defer_interrupts() -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C until the block calls the yielded function `checkpoint()`.

    `checkpoint` raises KeyboardInterrupt if Ctrl-C was pressed. In the middle of a step a
    library could swallow that exception. A second Ctrl-C raises at once. A block that never
    calls `checkpoint` ignores the first Ctrl-C: use that for cleaning up after an interrupt.
    """
    received: set[int] = set()

    def receive(signal_number: int, _: Any) -> None:
        # a SIGTERM after a SIGINT is no second Ctrl-C: `mlflow run` sends both for one
        if signal_number in received:
            raise KeyboardInterrupt
        received.add(signal_number)

    def checkpoint() -> None:
        if received:
            raise KeyboardInterrupt

    # only the main thread may set signal handlers, and only it receives signals
    handled = STOPPING_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    previous = [(each, signal.signal(each, receive)) for each in handled]
    try:
        yield checkpoint
    finally:
        for each, handler in previous:
            signal.signal(each, handler)
