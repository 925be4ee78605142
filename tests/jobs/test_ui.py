"""`har ui`: the real command, its server and the address that it prints."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import pytest

from tests.fixtures import free_port, new_store


def start(folder: Path, port: int) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    return subprocess.Popen(
        [sys.executable, "-m", "har", "ui", "--port", str(port)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_view_is_served_at_the_address_that_it_prints(tmp_path: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("har", (tmp_path / "files").as_uri())
    process = start(tmp_path, free_port())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"open (http://127\.0\.0\.1:\d+)/(#/\S+)\n", line)
        assert found, line
        assert found[2] == f"#/experiments/{experiment}/runs?viewStateShareKey=results"
        assert urllib.request.urlopen(found[1], timeout=60).status == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        without_store = start(tmp_path, port)
        assert "no runs are recorded here" in without_store.communicate()[1]
        assert without_store.returncode == 2
        client = mlflow.MlflowClient(new_store(tmp_path))
        client.create_experiment("har", (tmp_path / "files").as_uri())
        taken = start(tmp_path, port)
        _, errors = taken.communicate()
    assert taken.returncode == 2
    assert errors == f"error: cannot use port {port}: give a free one, such as --port 5055\n"
