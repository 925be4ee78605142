"""Ctrl-C, SIGTERM and SIGHUP, handled at a point where no work is lost."""

import math
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

# SIGHUP comes when the terminal is closed or an ssh connection is lost.
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# While code runs that must not be left in the middle, look again after this many seconds.
POLL_S = 0.05
# Left in the middle, a database stays locked for all that must still be written there; of what is
# raised while Python forgets an object, Python only prints that it happened; what is raised while
# TensorFlow asks for an object's type, it prints as another error and goes on (2.21).
NOT_IN_THE_MIDDLE = re.compile(
    r"(sqlalchemy|optuna\.storages|mlflow\..*sqlalchemy_store|weakref|abc|typing)\b"
)
# A database that does not answer may take minutes.
MOST_WAIT_S = 10.0
EXIT_STATUS = 130


@dataclass
class _State:
    """`terminal` is a second name of stderr, for what libraries print while they load is hidden
    (har.util.progress). `waiting_since` is when a signal last began to wait. `insist` is whether a
    signal is sent again whose exception was swallowed.
    """

    open_work: int = 0
    terminal: int = 2
    insist: bool = False
    waiting_since: float = -math.inf


_STATE = _State()


class _Interrupt(KeyboardInterrupt):
    """Unlike its base, it can be asked whether it still exists."""


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


@contextmanager
def insist_on_signals() -> Iterator[None]:
    """Send a signal again if its KeyboardInterrupt does not come to the end of the block.

    Python swallows what is raised while it forgets an object, and libraries in C what is raised
    while they ask for an attribute; the next time the work is somewhere else.
    """
    show = sys.unraisablehook
    sys.unraisablehook = lambda each: isinstance(each.exc_value, _Interrupt) or show(each)
    _STATE.insist = True
    try:
        yield
    finally:
        _STATE.insist = False
        sys.unraisablehook = show


def _stop(number: int, frame: FrameType | None) -> None:
    leave_terminal(number)
    modules = _list_modules(frame)
    # a library that is half imported may swallow the exception or turn it into another
    importing = any(each.startswith("importlib._bootstrap") for each in modules)
    if importing and not _STATE.open_work:
        with suppress(OSError):
            os.write(_STATE.terminal, b"\nstopped\n")
        os._exit(EXIT_STATUS)
    if importing or _must_wait(modules):
        _send_later(number)
        return
    interrupt = _Interrupt()
    weakref.finalize(interrupt, _notice_swallowed, number).atexit = False
    try:
        raise interrupt
    finally:
        # or this frame, which the exception refers to, would keep it
        del interrupt


def _notice_swallowed(number: int) -> None:
    if _STATE.insist:
        _send_later(number)


def _send_later(number: int) -> None:
    again = threading.Timer(POLL_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _list_modules(frame: FrameType | None) -> list[str]:
    """List the modules whose functions run in this thread."""
    modules = []
    while frame is not None:
        modules.append(str(frame.f_globals.get("__name__")))
        frame = frame.f_back
    return modules


def _must_wait(modules: Sequence[str]) -> bool:
    if not any(map(NOT_IN_THE_MIDDLE.match, modules)):
        return False
    now = time.monotonic()
    if now - _STATE.waiting_since > MOST_WAIT_S + 1:
        # that of an earlier signal
        _STATE.waiting_since = now
    return now - _STATE.waiting_since < MOST_WAIT_S


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
    calls `checkpoint` is for cleaning up. A Ctrl-C after the last checkpoint is handled when the
    block ends, but not while an exception is, which ends the work too.
    """
    received: set[int] = set()
    raised = False

    def receive(signal_number: int, _: Any) -> None:
        leave_terminal(signal_number)
        # a SIGTERM after a SIGINT is no second Ctrl-C: `mlflow run` sends both for one
        if signal_number in received:
            raise KeyboardInterrupt
        received.add(signal_number)

    def checkpoint() -> None:
        nonlocal raised
        if received:
            raised = True
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
    if received and not raised and sys.exc_info()[1] is None:
        signal.raise_signal(min(received))
