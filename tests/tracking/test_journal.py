"""Entries arrive in order and once, whatever the store does meanwhile."""

import threading
import time

import pytest

from har.tracking import journal
from har.tracking.journal import Journal, open_journal
from har.util.errors import UserError


def test_in_order_when_all_is_well() -> None:
    got: list[int] = []
    with open_journal(got.append) as add:
        for entry in range(100):
            add(entry)
    assert got == list(range(100))


def test_nobody_waits_and_everything_arrives_later(capsys: pytest.CaptureFixture[str]) -> None:
    got: list[int] = []
    away, tried = threading.Event(), threading.Event()
    away.set()

    def send(entry: int) -> None:
        tried.set()
        if away.is_set():
            raise ConnectionError("refused")
        got.append(entry)

    with open_journal(send) as add:
        for entry in range(5):
            add(entry)
        assert tried.wait(60) and got == []
        away.clear()
        add(5)
    assert got == list(range(6))
    assert capsys.readouterr().err.count("training continues") == 1


def test_what_never_arrives_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "END_WAIT_S", 1.0)

    def send(entry: int) -> None:
        if entry == 3:
            raise ConnectionError("refused")

    with (
        pytest.raises(UserError, match=r"7 epochs could not be recorded.*refused"),
        open_journal(send) as add,
    ):
        for entry in range(10):
            add(entry)


def test_a_store_that_hangs_holds_nobody_up() -> None:
    free = threading.Event()
    waiting: Journal[int] = Journal(lambda entry: free.wait(60) and None)
    for entry in range(10):
        waiting.add(entry)
    assert len(waiting.unsent) == 10
    free.set()
    waiting.flush()
    assert waiting.unsent == []


def test_what_came_while_the_store_hung_is_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each of forty quick epochs would wait for it once more at the end."""
    monkeypatch.setattr(journal, "END_WAIT_S", 0.0)
    hanging, attempts = threading.Event(), []

    def send(entry: int) -> None:
        attempts.append(entry)
        hanging.wait(60)
        raise ConnectionError("timed out")

    waiting: Journal[int] = Journal(send)
    for entry in range(40):
        waiting.add(entry)
    hanging.set()
    with pytest.raises(UserError, match="40 epochs could not be recorded"):
        waiting.flush()
    # the one that hung, one for all that came meanwhile, one at the end
    assert attempts == [0] * len(attempts) and len(attempts) <= 3


def test_an_error_of_the_training_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "ERROR_WAIT_S", 0.1)
    blocked, started = threading.Event(), time.monotonic()
    with pytest.raises(KeyError), open_journal(lambda entry: blocked.wait(60) and None) as add:
        add(1)
        raise KeyError
    assert time.monotonic() - started < 10
    blocked.set()
