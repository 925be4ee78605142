"""A journal sends entries to the tracking store from a thread, in order, while a training runs.

The training never waits for a store that does not answer. Entries that could not be sent stay in
memory, in order, and are sent with the next one or at the end. The training's backup has them on
disk; an epoch that is in neither is trained again after a crash.
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
# How long to wait for the store when an error ends a training, and when a training is done.
ERROR_WAIT_S, END_WAIT_S = 3.0, 30.0


class Journal(Generic[Entry]):
    """Sends entries from its own thread.

    `send` may raise MLflow's errors and OSError. Sending an entry twice must do no harm.
    """

    def __init__(self, send: Callable[[Entry], None]) -> None:
        """Start the thread, which does not keep the process from ending."""
        self.send = send
        self.unsent: list[Entry] = []
        self.news, self.ended = threading.Event(), False
        self.away = ""
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, entry: Entry) -> None:
        """Queue an entry; return at once."""
        self.unsent.append(entry)
        self.news.set()

    def _work(self) -> None:
        ended = False
        while not ended:
            self.news.wait()
            self.news.clear()
            ended = self.ended
            self._send_all()

    def end(self, timeout_s: float | None = None) -> None:
        """Wait for the thread's last attempt."""
        self.ended = True
        self.news.set()
        self.thread.join(timeout_s)

    def _send_all(self) -> None:
        while self.unsent:
            try:
                self.send(self.unsent[0])
            except (MlflowException, OSError) as error:
                if not self.away:
                    why = first_line(error)[:300]
                    warn(f"the tracking store does not answer; training continues: {why}")
                self.away = first_line(error)
                return
            del self.unsent[0]
            if self.away:
                say("the tracking store answers again")
                self.away = ""

    def flush(self) -> None:
        """Send everything, or raise a UserError half a minute after the thread's last attempt."""
        self.end()
        if self.unsent:
            say(f"waiting {END_WAIT_S:.0f} s for the tracking store")
        deadline = time.monotonic() + END_WAIT_S
        while self.unsent and time.monotonic() < deadline:
            time.sleep(1)
            self._send_all()
        if self.unsent:
            raise UserError(
                f"{len(self.unsent)} epochs could not be recorded, the tracking store does not"
                f" answer: {self.away}"
            )


@contextmanager
def open_journal(send: Callable[[Entry], None]) -> Iterator[Callable[[Entry], None]]:
    """Yield the function that adds an entry. All entries are sent at the end of the block; after
    an error, only those that can be sent within ERROR_WAIT_S.
    """
    journal = Journal(send)
    try:
        yield journal.add
    except BaseException:
        journal.end(ERROR_WAIT_S)
        raise
    journal.flush()
