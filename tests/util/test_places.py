"""Paths and URLs: what is taken for which, and what a file system elsewhere does to us."""

import gzip
import os
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from har.util import places
from har.util.errors import UserError
from har.util.places import (
    Url,
    decode_place,
    delete_names,
    encode_place,
    exists,
    list_below,
    list_names,
    parse_place,
    read_place,
    read_start,
    replace_place,
)
from tests.fixtures import answering

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory() -> Iterator[Url]:
    """An empty folder in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield Url("memory://bucket/folder")
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def write(place: Url, data: bytes) -> None:
    with replace_place(place) as file:
        file.write(data)


def test_a_path_stays_a_path() -> None:
    for text in ("photos", "/a/b.jpg", "s3:/b/c", "a:b", "C:\\photos", "://x"):
        assert parse_place(text) == Path(text)
    assert parse_place("file:///a/b%20c.jpg") == Path("/a/b c.jpg")
    assert parse_place("file://localhost/a") == Path("/a")
    assert parse_place(f"file://{os.fsdecode(b'/caf%E9')}") == Path(os.fsdecode(b"/caf\xe9"))
    with pytest.raises(UserError, match="file:///PATH; received file://host/a"):
        parse_place("file://host/a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("simplecache::s3://bucket/a", r"must not have '::' \(chained"),
        ("zip://a.jpg::s3://bucket/a.zip", "must not have '::'"),
        ("s3://bucket/a::zip://b", "must not have '::'"),
        ("filecache://a", "filecache:// is not read here, but s3://, gs://"),
        ("local:///etc/passwd", "local:// is not read here"),
        ("x://a", "x:// is not read here"),
    ],
)
def test_a_url_that_is_not_opened(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_place(text)
    with pytest.raises(UserError, match=said):
        read_start(Url(text), 10)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = places.importlib.util.find_spec
    hidden = {"s3fs", "adlfs"}
    monkeypatch.setattr(
        places.importlib.util, "find_spec", lambda name: None if name in hidden else found(name)
    )
    with pytest.raises(
        UserError, match=r"s3:// needs s3fs: pip install 's3fs.*' \(the extra s3fs\)"
    ):
        parse_place("s3://bucket/a")
    with pytest.raises(UserError, match=r"az:// needs adlfs: pip install 'adlfs[^']*'$"):
        parse_place("az://bucket/a")
    hidden.add("fsspec")
    with pytest.raises(UserError, match="https:// needs aiohttp: pip install"):
        parse_place("https://host/a")


def test_names_are_those_of_paths() -> None:
    url = Url("s3://bucket.name/a/b.c.csv")
    assert (url.protocol, url.name, url.suffix) == ("s3", "b.c.csv", ".csv")
    assert url.parent == Url("s3://bucket.name/a") and url.parent / "x" == url.with_name("x")
    for bucket in ("s3://bucket.csv", "s3://bucket.csv/"):
        assert (Url(bucket).name, Url(bucket).suffix) == ("", "")
    assert Url("s3://bucket/a.csv/").suffix == ""
    assert Url("s3://bucket/a.csv").parent == Url("s3://bucket")


def test_what_travels_as_bytes_comes_back() -> None:
    for place in (
        Path(os.fsdecode(b"caf\xe9/x")),
        Path("/a"),
        Url("s3://b/\n ?#%41"),
        Path("s3:/a"),
    ):
        assert decode_place(encode_place(place)) == place


def test_files_elsewhere(memory: Url) -> None:
    file = memory / "a" / "b.txt"
    assert not exists(file) and list_below(memory) == [] and list_names(memory) == set()
    write(file, b"0123456789")
    write(memory / "c", b"")
    assert exists(file) and list_below(memory) == ["a/b.txt", "c"]
    assert list_names(memory) == {"a", "c"} and list_below(file) == [""]
    assert read_start(file, 4) == b"0123" and read_place(file, 10) == b"0123456789"
    assert read_start(memory / "c", 4) == b""
    with pytest.raises(ValueError, match="more than 9 bytes"):
        read_place(file, 9)
    with pytest.raises(FileNotFoundError):
        read_place(memory / "gone", 9)
    with pytest.raises(OSError, match="it is a file"):
        list_names(file)
    delete_names(memory, ["c"])
    assert list_below(memory) == ["a/b.txt"]


def test_stars_in_names_are_letters(memory: Url) -> None:
    write(memory / "abc", b"mine")
    write(memory / "a*c", b"x")
    assert read_place(memory / "a*c", 9) == b"x"
    delete_names(memory, ["a*c"])
    assert list_below(memory) == ["abc"]


def test_an_interrupted_write_leaves_nothing(memory: Url) -> None:
    write(memory / "a", b"old")
    with pytest.raises(KeyboardInterrupt), replace_place(memory / "a") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert read_place(memory / "a", 9) == b"old" and list_below(memory) == ["a"]


def test_where_files_can_be_renamed_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over sftp; here on this machine, which fsspec calls `local`."""
    monkeypatch.setitem(places.PROTOCOLS, "local", ("fsspec", "fsspec"))
    folder = Url(f"local://{tmp_path}/new")
    write(folder / "a", b"old")
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a"]

    from fsspec.implementations.local import LocalFileSystem

    seen: list[Any] = []

    def fail(self: Any, source: str, target: str, **options: Any) -> None:
        seen.append((list_names(folder), read_place(folder / "a", 9)))
        raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "mv", fail)
        with pytest.raises(OSError, match="the network is gone"):
            write(folder / "a", b"new")
    ((names, content),) = seen
    assert len(names) == 2 and content == b"old"
    assert list_names(folder) == {"a"} and read_place(folder / "a", 9) == b"old"
    write(folder / "a", b"new")
    assert read_place(folder / "a", 9) == b"new"
    delete_names(folder, ["a"])
    assert not (tmp_path / "new").exists()


def test_errors_of_any_kind_are_those_of_a_file(
    memory: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore's have no base but Exception. A password in a message is removed."""

    class NoCredentialsError(Exception):
        pass

    def fail(*arguments: Any, **options: Any) -> None:
        raise NoCredentialsError("no keys for https://me:secret@host/x\nmore")

    for name, ask in (
        ("cat_file", lambda: read_start(memory / "a", 9)),
        ("find", lambda: list_below(memory)),
        ("ls", lambda: list_names(memory)),
        ("info", lambda: exists(memory / "a")),
        ("put_file", lambda: write(memory / "a", b"x")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(fsspec.filesystem("memory")), name, fail)
            with pytest.raises(OSError, match=r"^no keys for https://host/x$"):
                ask()


class _Web(BaseHTTPRequestHandler):
    """Serves /a, refuses what is not there, and never ends /endless, whatever is asked for."""

    def do_GET(self) -> None:
        if self.path not in ("/a", "/endless", "/packed"):
            self.send_error(403 if self.path == "/forbidden" else 404)
            return
        self.send_response(206 if "Range" in self.headers else 200)
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with suppress(OSError):
            if self.path == "/a":
                self.wfile.write(b"0123456789")
            elif self.path == "/packed":
                self.wfile.write(gzip.compress(bytes(50_000_000)))
            while self.path == "/endless":
                self.wfile.write(b"x" * 1000)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[Url]:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    with answering(server):
        yield Url(f"http://127.0.0.1:{server.server_port}")


def test_a_web_server_is_not_believed(web: Url) -> None:
    """It sends more than it is asked for, in pieces, and never ends."""
    assert read_start(web / "a", 4) == b"0123" and read_place(web / "a", 10) == b"0123456789"
    assert read_start(web / "endless", 1_000_000) == b"x" * 1_000_000
    assert read_start(web / "packed", 5) == bytes(5)
    with pytest.raises(FileNotFoundError):
        read_start(web / "gone", 4)
    with pytest.raises(OSError, match="403"):
        read_start(web / "forbidden", 4)
    with pytest.raises(OSError, match="Cannot connect"):
        read_start(Url("http://127.0.0.1:1/a"), 4)
