"""A file is replaced whole or not at all, as it was written."""

from pathlib import Path

import pytest

from har.util import files
from har.util.files import replace_text


def test_every_character_stays_as_it_is(tmp_path: Path) -> None:
    text = "läufer\r\nline\rline\n跑步"
    replace_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_bytes() == text.encode()
    replace_text(tmp_path / "file", "shorter")
    assert (tmp_path / "file").read_text() == "shorter"


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_what_fails_leaves_what_was_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_text(tmp_path / "file", "before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, where, full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(tmp_path / "file", "after")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("HOME/photos/a b", "~/photos/a b"),
        ("HOME", "~"),
        ("HOMEsick/photos", "HOMEsick/photos"),
        ("/data/photos", "/data/photos"),
        ("imagenet", "imagenet"),
        ("none", "none"),
    ],
)
def test_the_home_folder_is_not_named(
    path: str, short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path, short = (each.replace("HOME", str(tmp_path)) for each in (path, short))
    assert files.shorten_home(path) == short
    assert files.expand_home(short) == path
    monkeypatch.setenv("HOME", "/")
    assert files.shorten_home("/data") == "/data"


@pytest.mark.parametrize("path", ["~root/x", "a~", "~x", "./~/x"])
def test_only_the_own_home_is_expanded(path: str) -> None:
    assert files.expand_home(path) == path
