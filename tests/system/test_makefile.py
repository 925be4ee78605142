"""The Makefile refuses what it would else ignore. No target runs here: `-n`, or one that fails."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ready(tmp_path: Path) -> str:
    """An environment that counts as set up."""
    (tmp_path / ".ready").touch()
    (tmp_path / "bin").symlink_to(Path(sys.executable).parent)
    return f"VENV={tmp_path}"


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["EPOCHS=3"], "-P epochs=3"),
        (["BATCH_SIZE=8", "VARIANT=v5"], "-P batch-size=8"),
        (["ARGS=--epochs 3"], "-P epochs=3"),
        (["ARGS=-P seed=1 --epochs=3"], "-P seed=1 -P epochs=3"),
    ],
)
def test_what_make_does_not_know_is_refused(arguments: list[str], suggested: str) -> None:
    done = make("run", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert f'make run ARGS="{suggested}"' in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_make_knows_is_passed_on(ready: str) -> None:
    options = "-P epochs=3 --run-name=mine --experiment-name other"
    done = make("-n", "run", "VARIANT=v5", "DATA=/my data", f"ARGS={options}", ready, EPOCHS="7")
    assert done.returncode == 0, done.stderr
    assert f"-P variant=v5 -P data='/my data' {options}" in done.stdout
    assert "--port 5055" in make("-n", "ui", "PORT=5055", ready, PORT="80").stdout
    # a variable of the environment is none of make's
    assert "--port 5000" in make("-n", "ui", ready, PORT="80").stdout


def test_a_port_in_use_is_named(ready: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = make("ui", f"PORT={port}", ready)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        f"error: cannot use port {port}; give a free one: make ui PORT=5055"
    )


def test_setting_up_says_how_long_it_takes(tmp_path: Path) -> None:
    done = make("-n", "run", f"VENV={tmp_path}/none")
    assert "about two minutes" in done.stdout
