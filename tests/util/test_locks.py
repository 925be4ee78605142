"""One process at a time holds a lock; the others wait, or are told that they cannot."""

import subprocess
import sys
from pathlib import Path

import pytest

from har.util.errors import UserError
from har.util.locks import file_lock

HOLD = """
import sys
from har.util.locks import file_lock
from pathlib import Path
with file_lock(Path(sys.argv[1]), waiting="waiting"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_waited_for_and_freed_however_its_process_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"^busy$"), file_lock(file, busy="busy"):
            pass
        waiter = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert waiter.stderr is not None and waiter.stderr.readline() == b"waiting\n"
        holder.kill()
    with waiter:
        assert waiter.stdout is not None and waiter.stdout.readline() == b"held\n"
        waiter.kill()
    with file_lock(file, waiting="not said"):
        pass
    assert capsys.readouterr().err == ""


def test_a_process_may_enter_a_reentrant_lock_again(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with file_lock(file, busy="busy", reentrant=True), file_lock(file, busy="busy", reentrant=True):
        pass
    with file_lock(file, busy="busy"), pytest.raises(UserError), file_lock(file, busy="busy"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    lock = tmp_path / "file" / "lock"
    message = f"cannot lock {lock}: .*; choose another"
    with pytest.raises(UserError, match=message), file_lock(lock, hint="choose another"):
        pass
