"""Ctrl-C, SIGTERM and SIGHUP, handled at a point where no work is lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

# SIGHUP comes when the terminal is closed or an ssh connection is lost.
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# While an import runs, look again after this many seconds whether it has ended.
IMPORT_POLL_S = 0.05
EXIT_STATUS = 130


@dataclass
class _State:
    """`terminal` is a second name of stderr, for what libraries print while they load is hidden
    (har.util.progress).
    """

    open_work: int = 0
    terminal: int = 2


_STATE = _State()


def stop_on_signals() -> None:
    """End a command on SIGTERM and SIGHUP as on Ctrl-C; `nohup` sets SIGHUP to be ignored."""
    with suppress(OSError):  # stderr may be closed
        _STATE.terminal = os.dup(2)
    for each in STOPPING_SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _stop)


@contextmanager
def open_work() -> Iterator[None]:
    """Mark a block that must clean up before the process ends, such as an open MLflow run."""
    _STATE.open_work += 1
    try:
        yield
    finally:
        _STATE.open_work -= 1


def _stop(number: int, frame: FrameType | None) -> None:
    leave_terminal(number)
    if not _is_importing(frame):
        raise KeyboardInterrupt
    # a library that is half imported may swallow the exception or turn it into another
    if _STATE.open_work:
        again = threading.Timer(IMPORT_POLL_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    else:
        with suppress(OSError):
            os.write(_STATE.terminal, b"\nstopped\n")
        os._exit(EXIT_STATUS)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def leave_terminal(number: int) -> None:
    """After SIGHUP, write to nowhere: printing to a closed terminal is an error."""
    if number != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for each in (0, 1, 2, _STATE.terminal):
        with suppress(OSError):
            if os.isatty(each) or each == 0:
                os.dup2(nowhere, each)
    os.close(nowhere)


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
        leave_terminal(signal_number)
        # a SIGTERM after a SIGINT is no second Ctrl-C: `mlflow run` sends both for one
        if signal_number in received:
            raise KeyboardInterrupt
        received.add(signal_number)

    def checkpoint() -> None:
        if received:
            raise KeyboardInterrupt

    # only the main thread may set signal handlers, and only it receives signals
    is_main = threading.current_thread() is threading.main_thread()
    handled = [
        each
        for each in STOPPING_SIGNALS
        if is_main and signal.getsignal(each) is not signal.SIG_IGN
    ]
    previous = [(each, signal.signal(each, receive)) for each in handled]
    try:
        yield checkpoint
    finally:
        for each, handler in previous:
            signal.signal(each, handler)
