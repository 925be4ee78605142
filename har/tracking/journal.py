"""What goes to a tracking store while a training runs: in order, by a thread, and again if need be.

A training never waits for a store that is away. What could not be sent is kept in order, in memory,
and tried again with what comes next and at the end. The training's backup has it on disk; an epoch
that is in neither is trained again after a crash.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from mlflow.exceptions import MlflowException

from har.util.errors import UserError, first_line
from har.util.progress import say, warn

Entry = TypeVar("Entry")
# For what can still be sent when an error ends a training, and for a store that is being restarted
# when a training is done.
ERROR_WAIT_S, END_WAIT_S = 3.0, 30.0


class Journal(Generic[Entry]):
    """Entries on their way. `send` raises what MLflow raises when a store cannot be reached, and
    does nothing new when an entry arrives a second time.
    """

    def __init__(self, send: Callable[[Entry], None]) -> None:
        """The thread starts at once; it does not keep the process from ending."""
        self.send = send
        self.unsent: list[Entry] = []
        self.news, self.ended = threading.Event(), False
        self.away = ""
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def add(self, entry: Entry) -> None:
        """Send it when it can be; returns at once."""
        self.unsent.append(entry)
        self.news.set()

    def work(self) -> None:
        """One attempt for all that was added since the last one, and a last one at the end: a store
        that does not answer takes many seconds of each.
        """
        ended = False
        while not ended:
            self.news.wait()
            self.news.clear()
            ended = self.ended
            self.send_all()

    def end(self, timeout_s: float | None = None) -> None:
        """Let the thread make its last attempt, and wait for it."""
        self.ended = True
        self.news.set()
        self.thread.join(timeout_s)

    def send_all(self) -> None:
        """The entries in order, until one cannot be sent."""
        while self.unsent:
            try:
                self.send(self.unsent[0])
            except (MlflowException, OSError) as error:
                if not self.away:
                    warn(f"the tracking store is away, training goes on: {first_line(error)[:300]}")
                self.away = first_line(error)
                return
            del self.unsent[0]
            if self.away:
                say("the tracking store is back")
                self.away = ""

    def flush(self) -> None:
        """Raise a UserError unless everything can be sent, at the latest half a minute after the
        thread's last attempt.
        """
        self.end()
        if self.unsent:
            say(f"waiting {END_WAIT_S:.0f} s for the tracking store")
        deadline = time.monotonic() + END_WAIT_S
        while self.unsent and time.monotonic() < deadline:
            time.sleep(1)
            self.send_all()
        if self.unsent:
            raise UserError(
                f"{len(self.unsent)} epochs could not be recorded, the tracking store is away:"
                f" {self.away}"
            )


@contextmanager
def open_journal(send: Callable[[Entry], None]) -> Iterator[Callable[[Entry], None]]:
    """Yield what adds an entry; all are sent at the end of the block. If an error ends it, there is
    a moment for what can be sent at once.
    """
    journal = Journal(send)
    try:
        yield journal.add
    except BaseException:
        journal.end(ERROR_WAIT_S)
        raise
    journal.flush()
