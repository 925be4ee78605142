"""Progress is for people: a bar on a terminal, plain lines elsewhere, results untouched."""

import os
import pty
import subprocess
import sys

import pytest

from har.util import progress as progresses
from har.util.progress import progress, say, show, warn

SCRIPT = """
from har.util import progress as progresses
from har.util.progress import progress
with progress("working", 3) as advance:
    for _ in range(3):
        advance(1)
"""


def test_plain_lines_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progresses, "PLAIN_LINE_EVERY_S", 0.0)
    with progress("working", 3) as advance:
        for _ in range(3):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["working: 1 of 3", "working: 2 of 3", "working: 3 of 3"]


def test_brief_leaves_the_last_line_to_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working", 3, brief=True) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs)
    assert process.wait(timeout=60) == 0
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    assert "####" in shown and "3/3" in shown


def test_only_our_own_line_breaks_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb\x1b", "c\x07")
    warn("d\ne\u202e")
    show("f\ng\x9b31m")
    with progress("h\ni", 1) as advance:
        advance(1)
    out, err = capsys.readouterr()
    assert out == "f\ng\\x9b31m\n"
    assert err.splitlines() == ["a\\nb\\x1b", "c\\x07", "warning: d\\ne\\u202e", "h\\ni: 1 of 1"]


LOADING = """
import os
from har.util.progress import quiet_loading
with quiet_loading():
    os.write(2, b"chatter")
    {}
os.write(2, b"after")
"""


def test_loading_is_quiet_unless_it_fails() -> None:
    def stderr_of(action: str) -> str:
        command = [sys.executable, "-c", LOADING.format(action)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert stderr_of("pass") == "after"
    assert "chatter" in stderr_of("import no_such_module")
    assert "No module named 'no_such_module'" in stderr_of("import no_such_module")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_progress_that_nobody_can_read_ends_nothing() -> None:
    script = f"{SCRIPT}\nfrom har.util.progress import warn\nwarn('full')\nprint('done')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=full, check=False
        )
    # 120: Python itself, at its end, when it could not flush what it held back
    assert done.stdout == b"done\n" and done.returncode in (0, 120)
