"""Threads that work for many callers in turns."""

import threading
from concurrent.futures import wait
from typing import Any

import pytest

from har.inference.turns import Caller, Turns


def order_of(work: list[tuple[str, float]]) -> list[str]:
    """The order in which one thread does the work of callers: (name, cost)."""
    turns, done = Turns(1, "test"), []
    callers: dict[str, Caller] = {}
    free, started = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        free.wait(30)

    blocked = turns.submit(Caller(), 0, block)
    assert started.wait(30)
    futures = [
        turns.submit(callers.setdefault(name, Caller()), cost, lambda name=name: done.append(name))
        for name, cost in work
    ]
    free.set()
    wait([blocked, *futures], timeout=30)
    return done


@pytest.mark.parametrize(
    ("work", "order"),
    [
        ([("a", 1)] * 3, "aaa"),
        # one after the other, although one came first with all of its work
        ([("a", 1)] * 3 + [("b", 1)] * 3, "ababab"),
        # the cheap one passes
        ([("a", 25), ("b", 25), ("c", 25), ("d", 1)], "dabc"),
        # equal shares of the cost, not of the number
        ([("a", 3)] * 2 + [("b", 1)] * 6, "bbabbbab"),
    ],
)
def test_callers_take_turns_by_cost(work: list[tuple[str, float]], order: str) -> None:
    found = "".join(order_of(work))
    assert sorted(found) == sorted(order)
    assert found == order


def test_many_cheap_callers_do_not_starve_a_costly_one() -> None:
    """Cheap callers come without an end: the costly one has its turn all the same."""
    turns, done, free = Turns(1, "test"), [], threading.Event()
    turns.submit(Caller(), 0, lambda: free.wait(30))
    turns.submit(Caller(), 20, lambda: done.append("costly"))

    def cheap() -> None:
        done.append("cheap")
        if len(done) < 500:
            turns.submit(Caller(), 1, cheap)

    turns.submit(Caller(), 1, cheap)
    last = turns.submit(Caller(), 1, cheap)
    free.set()
    last.result(30)
    for _ in range(300):
        if len(done) >= 500:
            break
        threading.Event().wait(0.1)
    assert done.index("costly") < 100


def test_an_error_reaches_its_caller_alone() -> None:
    turns = Turns(2, "test")

    def fail() -> Any:
        raise OSError("mine")

    failed, fine = turns.submit(Caller(), 1, fail), turns.submit(Caller(), 1, lambda: 3)
    assert fine.result(30) == 3
    with pytest.raises(OSError, match="mine"):
        failed.result(30)
