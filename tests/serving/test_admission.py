"""Requests that are refused while they are read, and clients that leave."""

import asyncio
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from starlette.requests import Request

from har.data.limits import SERVED_REQUEST
from har.serving import admission
from har.serving.admission import Admission, client_has_left
from har.serving.refusals import Busy, TooLarge, Unsupported

PART = b"A" * 1_000_000


def request_of(parts: Iterable[bytes], kind: str = "application/json", leaves: bool = False) -> Any:
    """A request whose client then waits for the answer, or leaves."""
    waiting = iter(parts)

    async def receive() -> dict[str, Any]:
        for part in waiting:
            return {"type": "http.request", "body": part, "more_body": True}
        if not ended and not leaves:
            ended.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        if not leaves:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    ended: list[bool] = []
    headers = [(b"content-type", kind.encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


async def read(request: Any) -> bytes:
    body: bytes = await request.body()
    return body


def test_a_body_comes_through_whole() -> None:
    handler = Admission(SERVED_REQUEST).wrap(read)
    parts = [bytes([i]) * 300_000 for i in range(20)]
    assert asyncio.run(handler(request=request_of(parts))) == b"".join(parts)
    assert asyncio.run(handler(request=request_of([]))) == b""


@pytest.mark.parametrize(
    ("count", "kind", "error"),
    [
        (37, "application/json", TooLarge),
        (1000, "application/vnd.apache.parquet", TooLarge),
        (1, "text/csv", Unsupported),
        (1, "text/csv; charset=utf-8", Unsupported),
    ],
)
def test_a_body_is_refused_before_it_is_whole(count: int, kind: str, error: type) -> None:
    read_parts = []

    def parts() -> Iterable[bytes]:
        for i in range(count):
            read_parts.append(i)
            yield PART

    door = Admission(SERVED_REQUEST)
    with pytest.raises(error):
        asyncio.run(door.wrap(read)(request=request_of(parts(), kind)))
    # what a client sends beyond that is not even read
    assert len(read_parts) <= 101
    assert door._bytes == door._requests == 0


def test_a_client_that_leaves_while_it_sends() -> None:
    handler = Admission(SERVED_REQUEST).wrap(read)
    with pytest.raises(MlflowException, match="left"):
        asyncio.run(handler(request=request_of([PART], leaves=True)))


def test_work_is_told_that_the_client_has_left() -> None:
    left = threading.Event()

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def work(request: Any) -> None:
        has_left = client_has_left()
        assert not has_left()
        for _ in range(100):
            if has_left():
                left.set()
                return
            await asyncio.sleep(0.05)

    sent: list[bool] = []
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    asyncio.run(Admission(SERVED_REQUEST).wrap(work)(request=request))
    assert left.is_set()


def test_slow_clients_keep_no_place_and_many_bytes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "PLACE_S", 0.1)
    monkeypatch.setattr(admission, "MAX_BYTES", 30_000_000)

    async def attack() -> bytes:
        door = Admission(SERVED_REQUEST)

        async def slow() -> dict[str, Any]:
            await asyncio.sleep(0 if door._bytes < 20_000_000 else 60)
            return {"type": "http.request", "body": PART, "more_body": True}

        scope = {"type": "http", "method": "POST", "headers": []}
        clients = [
            asyncio.create_task(door.wrap(read)(request=Request(scope, slow))) for _ in range(20)
        ]
        await asyncio.sleep(0.5)
        with pytest.raises(Busy):
            await door.wrap(read)(request=request_of([PART] * 30))
        body = await asyncio.wait_for(door.wrap(read)(request=request_of([PART, PART])), 20)
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        assert door._bytes == 0
        return body

    assert len(asyncio.run(attack())) == 2_000_000
