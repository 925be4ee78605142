"""One process at a time, and the others are told that they wait."""

import subprocess
import sys
from pathlib import Path

import pytest

from har.util.locks import acquire_lock

HOLD = """
import sys
from har.util.locks import acquire_lock
from pathlib import Path
lock = acquire_lock(Path(sys.argv[1]), "waiting")
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
        waiter = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert waiter.stderr is not None and waiter.stderr.readline() == b"waiting\n"
        holder.kill()
    with waiter:
        assert waiter.stdout is not None and waiter.stdout.readline() == b"held\n"
        waiter.kill()
    acquire_lock(file, "not said").release()
    assert capsys.readouterr().err == ""
