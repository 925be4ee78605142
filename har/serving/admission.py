"""Admits requests to MLflow's model server: bounded before they are read, counted while they are
worked on, and stopped when their client leaves.

uvicorn and MLflow read bodies of any size, and go on for clients that have left.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from types import SimpleNamespace
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from har.data.limits import RequestLimits
from har.inference.classifier import STOPPED
from har.inference.turns import Caller, Turns
from har.serving.refusals import Busy, TooLarge, Unsupported, refuse

# Requests that the server works on at a time, a thread for each; most wait for their turn. MLflow's
# four and one for each CPU would let a few costly requests keep all others waiting.
MAX_REQUESTS = 256
# What all bodies beyond SMALL_BODY may have together: 48 of the largest. In memory they take twice
# that. Small bodies need no place among them.
MAX_BYTES = 48 * 36_000_000
SMALL_BODY = 1_000_000
# Bodies that arrive at a time, beyond the first bytes of each, and the seconds for which a body has
# such a place; the others wait in the network. Each piece that arrives waits for Python's lock, and
# all requests wait for it.
MAX_ARRIVING = 8
FIRST_BYTES = 100_000
PLACE_S = 1.0
# A client reads its refusal only after it has sent its body, so the rest is read and dropped.
MAX_DROPPED = 100_000_000
_CSV = "text/csv"

T = TypeVar("T")
Handler = Callable[..., Coroutine[Any, Any, Any]]
_never = threading.Event()
_left: contextvars.ContextVar[threading.Event] = contextvars.ContextVar("left", default=_never)


def client_has_left() -> Callable[[], bool]:
    """Return a function that says, in any thread, whether this request's client has left."""
    return _left.get().is_set


@cache
def _parsers() -> Turns:
    # parsing keeps Python's lock, and takes several times the body's memory
    return Turns(1, "parse")


def parse_in_turn(parse: Callable[[], T], size: int) -> T:
    """Parse a body of `size` bytes while no other is parsed; small ones go first."""
    run = contextvars.copy_context().run

    def parse_if_wanted() -> T:
        _check_wanted()
        return parse()

    result: T = _parsers().submit(Caller(), size, lambda: run(parse_if_wanted)).result()
    return result


def _check_wanted() -> None:
    if _left.get().is_set():
        raise refuse(STOPPED)


@dataclass
class _Body:
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    # of these bytes, those that count for MAX_BYTES
    counted: int = 0
    has_place: bool = False


class Admission:
    """The requests of a server and the bytes of their large bodies. Only its event loop calls."""

    def __init__(self, limits: RequestLimits) -> None:
        """Start with no request."""
        self._limits = limits
        self._requests = 0
        self._bytes = 0
        self._places = asyncio.Semaphore(MAX_ARRIVING)

    def wrap(self, handler: Handler) -> Handler:
        """Put the bounds around a handler that reads `request.body()` and answers."""

        @wraps(handler)
        async def answer(request: Any) -> Any:
            body = _Body()
            try:
                await self._receive(request, body)
                if self._requests >= MAX_REQUESTS:
                    raise Busy(f"the server works on {MAX_REQUESTS} requests: try again later")
                self._requests += 1
                try:
                    return await _work(handler, request, body.parts)
                finally:
                    self._requests -= 1
            finally:
                self._release(body)

        return answer

    def _release(self, body: "_Body") -> None:
        self._bytes -= body.counted
        body.counted = 0

    async def _receive(self, request: Any, body: "_Body") -> None:
        refusal = self._check_head(request)
        try:
            async for part in request.stream():
                body.size += len(part)
                refusal = refusal or self._check_size(body)
                if not refusal:
                    self._keep(body, part)
                elif body.size > MAX_DROPPED:
                    break
                else:
                    body.parts.clear()
                    self._release(body)
                if body.size > FIRST_BYTES and not body.has_place:
                    await self._take_place(body)
        except Exception as error:
            # of Starlette; uvicorn would log it with a stack trace
            if type(error).__name__ != "ClientDisconnect":
                raise
            refusal = refuse("the client left before its body had arrived")
        finally:
            self._give_place_back(body)
        if refusal:
            raise refusal

    async def _take_place(self, body: "_Body") -> None:
        await self._places.acquire()
        body.has_place = True
        # a slow client must queue again
        asyncio.get_running_loop().call_later(PLACE_S, self._give_place_back, body)

    def _give_place_back(self, body: "_Body") -> None:
        if body.has_place:
            body.has_place = False
            self._places.release()

    def _keep(self, body: "_Body", part: bytes) -> None:
        body.parts.append(part)
        if body.size > SMALL_BODY:
            self._bytes += body.size - body.counted
            body.counted = body.size

    def _check_head(self, request: Any) -> MlflowException | None:
        if request.headers.get("content-type", "").partition(";")[0].strip() == _CSV:
            return Unsupported("CSV holds no images: send JSON, or a parquet file")
        return None

    def _check_size(self, body: "_Body") -> MlflowException | None:
        if body.size > self._limits.bytes:
            return TooLarge(f"a body of more than {self._limits.bytes:,} bytes")
        if body.size > SMALL_BODY and self._bytes + body.size - body.counted > MAX_BYTES:
            return Busy("the server holds too many large requests: try again later")
        return None


async def _work(handler: Handler, request: Any, parts: list[bytes]) -> Any:
    """Let a handler answer, and tell its thread if the client leaves meanwhile."""
    left = threading.Event()
    _left.set(left)
    # each task has a copy of the context
    work = asyncio.ensure_future(handler(request=_replay(request, parts)))
    leaves = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({work, leaves}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            left.set()
        return await work
    finally:
        # also when MLflow's time limit ends this task
        left.set()
        leaves.cancel()


def _replay(request: Any, parts: list[bytes]) -> Any:
    """Build a request whose body is `parts`, which are handed over."""

    async def receive() -> dict[str, Any]:
        part = parts.pop(0) if parts else b""
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    return type(request)(request.scope, receive)


def admit_requests(limits: RequestLimits) -> None:
    """Put the bounds around what MLflow's server, which this process is, does for a request."""
    threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="request")

    def work_if_wanted(work: Callable[..., Any], *arguments: Any) -> Any:
        _check_wanted()
        return work(*arguments)

    async def to_thread(*work: Any) -> Any:
        run = partial(contextvars.copy_context().run, work_if_wanted, *work)
        return await asyncio.get_running_loop().run_in_executor(threads, run)

    # MLflow calls asyncio.to_thread, whose threads cannot be set before its event loop runs
    scoring_server.asyncio = SimpleNamespace(**{**vars(asyncio), "to_thread": to_thread})
    # a private name: without it, bodies are read whole and clients that leave are not noticed
    original = getattr(scoring_server, "_async_catch_mlflow_exception", None)
    if original is None:
        return
    admission = Admission(limits)
    scoring_server._async_catch_mlflow_exception = lambda handler: original(admission.wrap(handler))
