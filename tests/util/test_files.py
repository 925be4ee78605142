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
