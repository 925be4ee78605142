"""A tracking server that goes away while a training runs: the training goes on, and all arrives."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
import pytest

from har.training.backup_folders import backup_folder
from tests.fixtures import PATH, free_port, write_images
from tests.system.test_resume import COMMAND, EPOCHS, arguments

AWAY = "the tracking store does not answer"


class Server:
    """A real MLflow server that can be killed, started again, and put to sleep."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": PATH, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail((self.folder / "log").read_text())

    def fill_disk(self, full: bool) -> None:
        """No file of the server may grow, as on a full disk; or all may again."""
        main = psutil.Process(self.process.pid)
        for each in (main, *main.children(recursive=True)):
            _, hard = each.rlimit(psutil.RLIMIT_FSIZE)
            each.rlimit(psutil.RLIMIT_FSIZE, (0 if full else hard, hard))

    def send(self, signal_number: int) -> None:
        os.killpg(self.process.pid, signal_number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests here: each leaves it as it was."""
    found = Server(tmp_path_factory.mktemp("server"))
    found.start()
    yield found
    found.kill()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, at an address with a password that no message may show."""
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", "5"), ("BACKOFF_FACTOR", "1")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    with_password = running.uri.replace("//", "//ana:confidential@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(with_password)
    yield running
    mlflow.set_tracking_uri(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def start(words: list[str], first: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", first + COMMAND, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_to(process: subprocess.Popen[str], epoch: int) -> str:
    """What it says up to the end of an epoch."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(f"epoch {epoch}/{EPOCHS}  loss"):
            return said
    pytest.fail(said)


def read_until_away(process: subprocess.Popen[str], said: str) -> str:
    """What it says from here until it has noticed that the store does not take what it sends."""
    assert process.stdout is not None
    more = ""
    while AWAY not in said + more:
        more += (line := process.stdout.readline())
        assert line, said + more
    return more


def only_run(server: Server, experiment: str) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def assert_whole(server: Server, run: mlflow.entities.Run) -> None:
    """Finished, each epoch once and in order, one model, the tables of its evaluation."""
    client = mlflow.MlflowClient(server.uri)
    assert run.info.status == "FINISHED"
    for name in ("train_loss", "val_accuracy", "epoch_time_s"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [each.step for each in history] == list(range(1, EPOCHS + 1))
    assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 1
    models = client.search_logged_models([run.info.experiment_id])
    assert [each.source_run_id for each in models] == [run.info.run_id]
    found = {each.path for each in client.list_artifacts(run.info.run_id, "evaluation")}
    assert "evaluation/predictions.csv" in found
    assert not backup_folder(run.info.run_id).exists()


TROUBLES: dict[str, tuple[Callable[[Server], None], Callable[[Server], None]]] = {
    "killed": (Server.kill, Server.start),
    "asleep": (
        lambda server: server.send(signal.SIGSTOP),
        lambda server: server.send(signal.SIGCONT),
    ),
    # it answers with errors then
    "full disk": (
        lambda server: server.fill_disk(True),
        lambda server: server.fill_disk(False),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_away_for_a_few_epochs(trouble: str, server: Server, data: Path) -> None:
    if trouble == "full disk" and sys.platform != "linux":
        pytest.skip("limits the server's disk as Linux can")
    begin, end = TROUBLES[trouble]
    process = start(arguments(data, trouble))
    read_to(process, 3)
    begin(server)
    # training goes on meanwhile
    said = read_to(process, EPOCHS - 2)
    if trouble == "full disk":
        said += read_until_away(process, said)
    end(server)
    said += process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    if trouble == "full disk":
        assert "error responses" in said, said
    assert_whole(server, only_run(server, trouble))


@pytest.mark.parametrize("command", ["train", "prepare"])
@pytest.mark.skipif(sys.platform != "linux", reason="limits the server's disk as Linux can")
def test_a_store_that_cannot_write_is_said_before_the_work(
    command: str, server: Server, data: Path, tmp_path: Path, cli
) -> None:
    prepare = ["prepare", "--data", str(data), "--out", str(tmp_path / "out")]
    words = {"train": arguments(data, "full"), "prepare": prepare}
    server.fill_disk(True)
    try:
        result = cli(*words[command])
    finally:
        server.fill_disk(False)
    assert result.exit_code == 2, result.output
    assert "cannot be used" in result.output and "--offline" in result.output
    for too_much in ("checking images", "Traceback", "confidential"):
        assert too_much not in result.output


@pytest.mark.slow
def test_away_to_the_end_then_sync(server: Server, data: Path, cli) -> None:
    process = start(
        arguments(data, "late"), "import har.tracking.journal as j; j.END_WAIT_S = 2.0; "
    )
    said = read_to(process, 3)
    server.kill()
    said += process.communicate(timeout=300)[0]
    assert process.returncode == 2
    assert said.count(f"{AWAY}; training continues") == 1
    assert f"epoch {EPOCHS}/{EPOCHS}  loss" in said
    assert "could not be recorded" in said and "Traceback" not in said
    assert "confidential" not in said
    server.start()
    run_id = only_run(server, "late").info.run_id
    assert f"har train --resume {run_id}" in said
    done = cli("sync")
    assert done.exit_code == 0 and run_id in done.stdout, done.output
    assert "confidential" not in done.output
    # recorded, not trained again
    assert "  loss " not in done.output
    assert_whole(server, only_run(server, "late"))
    assert cli("sync").output.strip() == "nothing to record"


def test_sync_goes_on_past_a_backup_that_cannot_be_read(store: str, cli) -> None:
    for _ in range(2):
        backup = backup_folder(mlflow.MlflowClient().create_run("0").info.run_id)
        backup.mkdir(parents=True)
        (backup / "job.json").write_text("no json")
    result = cli("sync")
    assert result.exit_code == 2
    assert "2 trainings could not be recorded" in result.output
    assert result.output.count("job.json cannot be read") == 2
