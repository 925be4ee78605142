"""The client and servers of every sort: large requests, no answer, answers that are none."""

import base64
import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from har.cli.main import main
from har.serving import client
from har.serving.client import MAX_BATCH_BYTES, ask_server, read_address
from har.util.errors import UserError
from tests.fixtures import answering

GUESS = {"label": "running", "probability": 0.5}
ROW: dict[str, Any] = {**GUESS, "top_3": [GUESS], "error": None}
BAD = {"label": None, "probability": None, "top_3": [], "error": "no image"}


class Fake(BaseHTTPRequestHandler):
    """Answers with what the test set; counts the images of each request."""

    protocol_version = "HTTP/1.1"
    answer: Any = None
    most_bytes: float = math.inf
    asked: list[int]

    def do_POST(self) -> None:
        # the client may have hung up
        with suppress(ConnectionError):
            self.read_and_reply()

    def read_and_reply(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        rows = json.loads(body)["dataframe_split"]["data"]
        type(self).asked.append(len(rows))
        if len(body) > self.most_bytes:
            self.reply(413, b"{}")
        elif callable(self.answer):
            self.answer()
        elif self.answer is None:
            self.reply(200, json.dumps({"predictions": [ROW] * len(rows)}).encode())
        else:
            self.reply(200, self.answer)

    def reply(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: the client may have hung up."""


@pytest.fixture
def fake() -> Iterator[tuple[type[Fake], str]]:
    kind = type("OneFake", (Fake,), {"asked": []})
    server = QuietServer(("127.0.0.1", 0), kind)
    with answering(server):
        yield kind, f"127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost:5101", "http://localhost:5101/invocations"),
        ("localhost", "http://localhost/invocations"),
        ("127.0.0.1:8080/", "http://127.0.0.1:8080/invocations"),
        (" http://h:1/invocations ", "http://h:1/invocations"),
        ("https://h/a/b", "https://h/a/b/invocations"),
        ("h:1/a?token=x#y", "http://h:1/a/invocations?token=x"),
        ("[::1]:80", "http://[::1]:80/invocations"),
    ],
)
def test_an_address_is_completed(given: str, address: str) -> None:
    assert read_address(given) == address


@pytest.mark.parametrize(
    "given",
    ["", "http://", "ftp://h", "file:///etc/passwd", "http://h:x", "h:99999", "[::1", "h:0"],
)
def test_an_address_that_is_none_is_one_line(given: str) -> None:
    with pytest.raises(UserError, match="--url must be a server's address"):
        read_address(given)


@pytest.mark.parametrize(
    ("sizes", "asked"),
    [
        ([10] * 70, [32, 32, 6]),
        ([2_800_000] * 20, [8, 8, 4]),
        ([25_000_000, 10, 25_000_000], [1, 1, 1]),
        ([0], [1]),
        ([], []),
    ],
)
def test_batches_are_counted_in_bytes(
    fake: tuple[type[Fake], str], sizes: list[int], asked: list[int]
) -> None:
    kind, address = fake
    kind.most_bytes = 36_000_000
    assert len(list(ask_server(address, [bytes(size) for size in sizes]))) == len(sizes)
    assert kind.asked == asked
    assert 4 * 25_000_000 / 3 < 36_000_000 and MAX_BATCH_BYTES < 36_000_000


def test_what_is_too_large_is_split_again(fake: tuple[type[Fake], str]) -> None:
    kind, address = fake
    kind.most_bytes = 10_000
    files = [bytes(3_000)] * 5 + [bytes(30_000)] + [bytes(3_000)] * 2
    rows = list(ask_server(address, files))
    assert [row["error"] is None for row in rows] == [True] * 5 + [False] + [True] * 2
    assert rows[5]["error"] == "30,000 bytes, more than the server takes in a request"


def as_answer(rows: Any) -> bytes:
    return json.dumps({"predictions": rows}).encode()


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "HTML": b"<html>",
    "a number": b"3",
    "null": b"null",
    "a list": b"[]",
    "no predictions": b"{}",
    "predictions of null": as_answer(None),
    "a text": as_answer("x"),
    "no rows": as_answer([]),
    "too many rows": as_answer([ROW, ROW]),
    "a row of null": as_answer([None]),
    "a row of numbers": as_answer([[1, 2]]),
    "a row without a label": as_answer([{"probability": 1}]),
    "a label of numbers": as_answer([{**ROW, "label": 3}]),
    "a label of null": as_answer([{**ROW, "label": None}]),
    "a label that is nested": as_answer([{**ROW, "label": {"a": [1]}}]),
    "a probability of text": as_answer([{**ROW, "probability": "0.5"}]),
    "a probability of true": as_answer([{**ROW, "probability": True}]),
    "a probability of 2": as_answer([{**ROW, "probability": 2}]),
    "a probability of NaN": b'{"predictions": [{"label": "a", "probability": NaN}]}',
    "Infinity": b'{"predictions": [{"label": "a", "probability": -Infinity}]}',
    "1e999": as_answer([ROW]).replace(b"0.5", b"1e999"),
    "10,000 digits": as_answer([ROW]).replace(b"0.5", b"1" * 10_000),
    "top_3 of text": as_answer([{**ROW, "top_3": "abc"}]),
    "top_3 of many": as_answer([{**ROW, "top_3": [GUESS] * 1000}]),
    "top_3 of null": as_answer([{**ROW, "top_3": [None]}]),
    "an error of numbers": as_answer([{**BAD, "error": 3}]),
    "an error of nothing": as_answer([{**BAD, "error": ""}]),
    "deep": b'{"predictions": ' + b"[" * 100_000,
    "not UTF-8": b'{"predictions": ["\xff"]}',
    "2 MB": as_answer([{**BAD, "error": "x" * 2_000_000}]),
}


def run(address: str, *files: Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["classify", *map(str, files), "--url", address])
    return result.exit_code, result.stdout, result.stderr


def assert_one_line(text: str) -> None:
    assert text.startswith("error: ") and len(text.splitlines()) == 1 and len(text) < 300, text
    assert "Traceback" not in text


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"the server decides")
    return file


@pytest.mark.parametrize("name", MALFORMED)
def test_an_answer_that_is_none_is_one_line(
    fake: tuple[type[Fake], str], photo: Path, name: str
) -> None:
    kind, address = fake
    kind.answer = MALFORMED[name]
    status, _, shown = run(address, photo)
    assert status == 2
    assert_one_line(shown)


def endless(self: Fake) -> None:
    self.send_response(200)
    self.end_headers()
    while True:
        self.wfile.write(b"x" * 65_536)


def endless_zip(self: Fake) -> None:
    import zlib

    body = zlib.compress(b" " * 2_000_000_000, 9)
    self.reply(200, body, ("Content-Encoding", "deflate"))


def trickling(self: Fake) -> None:
    self.send_response(200)
    self.send_header("Content-Length", "1000")
    self.end_headers()
    for _ in range(100):
        self.wfile.write(b" ")
        time.sleep(0.1)


def redirecting(self: Fake) -> None:
    self.reply(307, b"", ("Location", "http://192.0.2.1/"))


def cut(self: Fake) -> None:
    self.send_response(200)
    self.send_header("Content-Length", "1000")
    self.end_headers()
    self.close_connection = True


def no_http(self: Fake) -> None:
    self.wfile.write(b"\0\1\2\r\n\r\n")
    self.close_connection = True


def bad_zip(self: Fake) -> None:
    self.reply(200, b"no zip", ("Content-Encoding", "gzip"))


def failing(self: Fake) -> None:
    self.reply(500, b'{"message": "first\\u001b[31m\\nsecond"}')


@pytest.mark.parametrize(
    "answer", [endless, endless_zip, trickling, redirecting, cut, no_http, bad_zip, failing]
)
def test_an_answer_is_bounded(
    fake: tuple[type[Fake], str], photo: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT_S", 1)
    kind, address = fake
    kind.answer = answer
    status, _, shown = run(address, photo)
    assert status == 2
    assert_one_line(shown)
    assert "\x1b" not in shown
    # a redirect is not followed
    assert kind.asked == [1]


def test_what_was_answered_before_a_failure_is_printed(
    fake: tuple[type[Fake], str], tmp_path: Path
) -> None:
    kind, address = fake

    def once(self: Fake) -> None:
        if len(kind.asked) > 1:
            return self.reply(500, b"{}")
        return self.reply(200, as_answer([ROW] * 32))

    kind.answer = once
    for i in range(40):
        (tmp_path / f"{i:02}.jpg").write_bytes(b"\xff\xd8\xff")
    status, shown, error = run(address, *sorted(tmp_path.iterdir()))
    assert status == 2 and len(shown.splitlines()) == 32
    assert_one_line(error)


def test_no_label_at_all_is_1(fake: tuple[type[Fake], str], photo: Path) -> None:
    kind, address = fake
    kind.answer = as_answer([BAD])
    status, shown, error = run(address, photo)
    assert status == 1 and "no image" in shown
    assert error == "error: none of 1 images has a label; the first: no image\n"
    kind.answer = as_answer([ROW])
    assert run(address, photo)[0] == 0


@pytest.mark.parametrize(
    "url",
    ["http://u:p/q@{}", "http://secret:x@{}/a", "http://{}/?token=secret", "u:secret@{}"],
)
def test_no_message_shows_a_password(fake: tuple[type[Fake], str], photo: Path, url: str) -> None:
    kind, address = fake
    kind.answer = b"no JSON"
    status, _, error = run(url.format(address), photo)
    assert status == 2
    assert_one_line(error)
    assert "secret" not in error and "p/q" not in error


def test_base64_is_standard(fake: tuple[type[Fake], str]) -> None:
    kind, address = fake
    list(ask_server(address, [base64.b64decode("-_8=", altchars=b"-_")]))
    assert kind.asked == [1]
