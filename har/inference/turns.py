"""Threads that work for many callers in turns."""

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass
class Caller:
    """Whose work it is: one request, or one command."""

    # where its last piece of work ends, if all callers get equal shares
    end: float = 0.0
    waiting: int = 0


class Turns:
    """Threads that share their time equally among the callers, by the cost of their work.

    The next piece of work is the one that would end first if every caller had an equal share of
    the threads (weighted fair queueing). A cheap request passes in front of many costly ones, and
    a costly one waits no longer than its share takes.
    """

    def __init__(self, threads: int, name: str) -> None:
        """Start no thread yet."""
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting: list[Any] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        # the share, as a cost, that each caller could have had so far
        self._now = 0.0
        self._callers = 0

    def submit(self, caller: Caller, cost: float, work: Callable[[], Any]) -> Future[Any]:
        """Queue a piece of work; `cost` is in any unit, the same for all callers."""
        future: Future[Any] = Future()
        with self._lock:
            caller.end = max(self._now, caller.end) + cost
            self._callers += not caller.waiting
            caller.waiting += 1
            item = (caller.end, next(self._numbers), caller, cost, work, future)
            heapq.heappush(self._waiting, item)
        self._threads.submit(self._work)
        return future

    def _work(self) -> None:
        with self._lock:
            *_, caller, cost, work, future = heapq.heappop(self._waiting)
            self._now += cost / self._callers
            caller.waiting -= 1
            self._callers -= not caller.waiting
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
