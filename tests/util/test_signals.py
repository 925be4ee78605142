"""Ctrl-C waits for a checkpoint; a second one does not."""

import abc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from har.util.signals import (
    STOPPING_SIGNALS,
    defer_interrupts,
    insist_on_signals,
    stop_on_signals,
)


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(each) for each in STOPPING_SIGNALS]
    yield
    assert [signal.getsignal(each) for each in STOPPING_SIGNALS] == before


@pytest.fixture
def stopping(handlers_are_put_back: None) -> Iterator[None]:
    """As while a command runs."""
    before = {each: signal.getsignal(each) for each in STOPPING_SIGNALS}
    stop_on_signals()
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("which", STOPPING_SIGNALS)
def test_first_signal_waits_for_the_checkpoint(which: signal.Signals) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as checkpoint:
        checkpoint()
        os.kill(os.getpid(), which)
        reached.append("the rest of the step")
        checkpoint()
        reached.append("the next step")
    assert reached == ["the rest of the step"]


def test_second_signal_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the first")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]


def test_mlflow_runs_sigterm_after_ctrl_c_does_not_hurry() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as checkpoint:
        for each in STOPPING_SIGNALS:
            os.kill(os.getpid(), each)
        reached.append("the rest of the step")
        checkpoint()
    assert reached == ["the rest of the step"]


def test_a_signal_after_the_last_checkpoint_is_not_lost() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with defer_interrupts() as checkpoint:
            checkpoint()
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the end of the block")
        reached.append("what comes after it")
    assert reached == ["the end of the block"]


def test_cleaning_up_after_an_error_is_not_cut_short_by_the_signal() -> None:
    reached = []
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            with defer_interrupts():
                os.kill(os.getpid(), signal.SIGINT)
            reached.append("the rest of the cleaning up")
    assert reached


def test_the_block_within_leaves_the_signal_to_the_block_around_it() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as checkpoint:
        with defer_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
        reached.append("the rest of the step")
        checkpoint()
    assert reached == ["the rest of the step"]


class Forgotten:
    """Python only prints what `__del__` raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("insists", [True, False])
def test_a_swallowed_signal_is_sent_again(
    insists: bool,
    stopping: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # pytest's own keeps the exception
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    ends = pytest.raises(KeyboardInterrupt) if insists else nullcontext()
    with ends, insist_on_signals() if insists else nullcontext():
        Forgotten()
        time.sleep(0.5)
    assert ("Exception ignored" in capsys.readouterr().err) is not insists


def test_a_signal_while_types_are_asked_for_waits(stopping: None) -> None:
    """TensorFlow asks from C++, prints what is raised there, and goes on."""
    reached = []

    class Asked(abc.ABC):  # noqa: B024
        @classmethod
        def __subclasshook__(cls, other: type) -> bool:
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the rest of the question")
            return True

    with pytest.raises(KeyboardInterrupt):
        assert isinstance("", Asked)
        reached.append("the answer")
        time.sleep(1)
    assert reached == ["the rest of the question", "the answer"]


def test_a_signal_that_ended_the_work_is_not_sent_again(stopping: None) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, insist_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
    del caught
    time.sleep(0.2)


def test_other_threads_leave_signals_alone() -> None:
    worked = []

    def work() -> None:
        with defer_interrupts() as checkpoint:
            checkpoint()
            worked.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert worked


def test_a_signal_that_is_ignored_stays_so(stopping: None) -> None:
    """As `nohup` sets SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_on_signals()
    with defer_interrupts() as checkpoint:
        os.kill(os.getpid(), signal.SIGHUP)
        checkpoint()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
