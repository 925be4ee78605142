"""Ctrl-C waits for a checkpoint; a second one does not."""

import os
import signal
import threading

import pytest

from har.util.signals import STOPPING_SIGNALS, defer_interrupts, stop_on_signals


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(each) for each in STOPPING_SIGNALS]
    yield
    assert [signal.getsignal(each) for each in STOPPING_SIGNALS] == before


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


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As `nohup` sets SIGHUP."""
    before = {each: signal.getsignal(each) for each in STOPPING_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop_on_signals()
        with defer_interrupts() as checkpoint:
            os.kill(os.getpid(), signal.SIGHUP)
            checkpoint()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
