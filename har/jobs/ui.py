"""The job `ui`: MLflow's server for the present store, opened on the saved view."""

import os
import socket
import subprocess
import sys
import time
import webbrowser

import mlflow

from har.tracking import query
from har.tracking.ui import name_page
from har.util.errors import UserError, without_password
from har.util.progress import show

HOST, START_TIMEOUT_S = "127.0.0.1", 120


def show_runs(port: int, experiment: str | None) -> None:
    """Start the server of a local store and wait for its end; open the page if there is a desktop.

    Raises:
        UserError: the port is used, or there is no such experiment.
    """
    page = name_page(query.find_experiment(query.choose_experiment_to_read(experiment)))
    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http://", "https://")):
        _open(without_password(uri).rstrip("/") + page)
        return
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise UserError(f"cannot use port {port}: give a free one, such as --port 5055") from error
    # one worker needs a quarter of the memory, and nothing here needs the server's own jobs
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", HOST, "--port", str(port)]
    # others see a command line, and the address may hold a password
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # results alone go to stdout
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno())
    try:
        _wait(server, port)
        _open(f"http://{HOST}:{port}{page}")
        server.wait()
    finally:
        server.terminate()
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"the server ended at once, with exit status {server.returncode}")
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise UserError(f"the server does not answer within {START_TIMEOUT_S} s")


def _open(address: str) -> None:
    show(f"open {address}")
    if sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        webbrowser.open(address)
