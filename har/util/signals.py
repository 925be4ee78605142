"""Ctrl-C at a place where nothing is lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handle_sigterm_as_ctrl_c() -> None:
    """What `mlflow run` and job schedulers send ends a command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def defer_interrupts() -> Iterator[Callable[[], None]]:
    """Yield `checkpoint()`: Ctrl-C raises KeyboardInterrupt there, not in the middle of a step,
    where a library could swallow it. A second Ctrl-C raises at once.

    Without a checkpoint in the block, one Ctrl-C is held off until its end and then forgotten:
    for what must be finished because of an earlier one.
    """
    asked: set[int] = set()

    def ask(signal_number: int, _: Any) -> None:
        # by kind: on Ctrl-C `mlflow run` sends a SIGTERM after the terminal's SIGINT
        if signal_number in asked:
            raise KeyboardInterrupt
        asked.add(signal_number)

    def checkpoint() -> None:
        if asked:
            raise KeyboardInterrupt

    # Python takes signals in the main thread alone, and lets only it say how
    mine = STOPPING_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = [(each, signal.signal(each, ask)) for each in mine]
    try:
        yield checkpoint
    finally:
        for each, handler in before:
            signal.signal(each, handler)
