"""A run's life: how it opens, joins `mlflow run`, ends, and what a store that fails does to it."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from har.tracking.store import check_store, open_experiment, open_run
from har.util.errors import UserError
from har.util.signals import STOPPING_SIGNALS, stop_on_signals
from tests.fixtures import tracking_to


def test_system_metrics_never_stop_a_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics import system_metrics_monitor

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such sensor")

    monkeypatch.setattr(system_metrics_monitor, "CPUMonitor", fail)
    with open_run("har-tests", {}) as run:
        mlflow.log_metric("accuracy", 0.5)
    assert mlflow.get_run(run.id).info.status == "FINISHED"


def test_joins_the_run_that_mlflow_run_opened(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    experiment = mlflow.set_experiment("har-tests")
    outside = client.create_run(experiment.experiment_id)
    client.log_param(outside.info.run_id, "precision", "Float32")
    monkeypatch.setenv("MLFLOW_RUN_ID", outside.info.run_id)
    with open_run("ignored", {"variant": "v3"}) as run:
        run.log_params({"precision": "float32", "strategy": "mirrored"})
    assert run.id == outside.info.run_id
    params = client.get_run(run.id).data.params
    assert params == {"precision": "Float32", "strategy": "mirrored"}


def test_what_is_logged_already_stays(store: str) -> None:
    """A resumed training computes it again, in other times."""
    with open_run("har-tests", {}) as run:
        run.log_metrics({"accuracy": 0.5, "train_time_s": 10.0})
        run.log_metrics({"accuracy": 0.5, "train_time_s": 0.1, "wall_time_s": 20.0})
        run.log_params({"backbone": "efficientnet-lite0"})
        run.log_params({"backbone": "another", "strategy": "mirrored"})
    found = mlflow.get_run(run.id).data
    wanted = {"accuracy": 0.5, "train_time_s": 10.0, "wall_time_s": 20.0}
    assert {name: found.metrics[name] for name in wanted} == wanted
    assert found.params == {"backbone": "efficientnet-lite0", "strategy": "mirrored"}
    assert len(MlflowClient().get_metric_history(run.id, "accuracy")) == 1


def test_a_run_that_was_finished_stays_finished(store: str) -> None:
    with pytest.raises(RuntimeError), open_run("har-tests", {}) as run:
        run.finish()
        assert mlflow.get_run(run.id).info.status == "FINISHED"
        raise RuntimeError("afterwards")
    assert mlflow.get_run(run.id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my run", "my run"), ("my-run-1", "my-run-1"), *[("", "v3 · lite0")] * 5],
)
def test_a_name_given_to_mlflow_run_stays(
    given: str, kept: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = mlflow.set_experiment("har-tests")
    outside = MlflowClient().create_run(experiment.experiment_id, run_name=given or None)
    monkeypatch.setenv("MLFLOW_RUN_ID", outside.info.run_id)
    with open_run("ignored", {"mlflow.runName": "v3 · lite0"}) as run:
        pass
    assert mlflow.get_run(run.id).info.run_name == kept


@pytest.mark.parametrize("kind", ["folder", "text"])
def test_what_is_no_database_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.mkdir() if kind == "folder" else file.write_text("a text that is no database")
    before, began = mlflow.get_tracking_uri(), time.monotonic()
    mlflow.set_tracking_uri(f"sqlite:///{file}")
    try:
        for use in (check_store, lambda: open_experiment("har")):
            with pytest.raises(UserError, match=f"{file} is not an MLflow database"):
                use()
    finally:
        mlflow.set_tracking_uri(before)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "uri", [None, "file:./mlruns", "./mlruns", "mlruns", "file://{here}/mlruns", "{here}/my runs"]
)
@pytest.mark.parametrize("words", [["run", "--data", "images"], ["compare"], ["champion"]])
def test_an_old_store_of_files_is_refused_with_the_way_out(
    words: list[str], uri: str | None, tiny_raw: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("images").symlink_to(tiny_raw)
    folder = Path("my runs" if uri and " " in uri else "mlruns").absolute()
    (folder / "0").mkdir(parents=True)
    (folder / "0/meta.yaml").write_text("name: Default")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracking_to(None):
        if uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(here=Path.cwd()))
        result = cli(*words)
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error"))
    assert f"the tracking store {folder} is a folder of files" in line and "--offline" in line
    command = f"migrate-filestore --source {shlex.quote(str(folder))} --target sqlite:///mlflow.db"
    assert line.endswith(command)
    assert not Path("mlflow.db").exists()


@pytest.mark.slow
def test_the_way_out_of_an_old_store_works(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient("file:./mlruns")
        client.create_run(client.create_experiment("old"))
    with tracking_to(None):
        message = cli("champion").stderr
        command = re.search(r"into it: (.+)", message)
        assert command, message
        subprocess.run(shlex.split(command[1]), check=True, capture_output=True)
        # a second copy would replace the first
        assert "--target sqlite:///migrated.db, and set" in cli("champion").stderr
    with tracking_to(f"sqlite:///{Path.cwd()}/mlflow.db"):
        assert "there are: old, Default" in cli("compare", "--experiment", "none").stderr


def test_a_store_of_files_that_is_not_there_cannot_be_copied() -> None:
    with tracking_to("./nothing"), pytest.raises(UserError, match="--offline") as error:
        check_store()
    assert "migrate-filestore" not in str(error.value)


def test_checking_a_store_changes_nothing(tmp_path: Path) -> None:
    with tracking_to(f"sqlite:///{tmp_path}/mlflow.db"):
        check_store()
        assert [each.name for each in mlflow.search_experiments()] == ["Default"]
        (default,) = mlflow.search_experiments()
        assert not [name for name in default.tags if name.startswith("har")]
        experiment_id = open_experiment("mine")
        assert mlflow.get_experiment_by_name("mine").experiment_id == experiment_id


def test_a_store_that_cannot_be_used_is_named() -> None:
    with (
        tracking_to("sqlite:////dev/null/mlflow.db"),
        pytest.raises(UserError, match=r"sqlite:////dev/null/mlflow.db cannot be used"),
        open_run("har-tests", {}),
    ):
        pass


@pytest.mark.parametrize("server", ["none", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_server_that_does_not_answer_is_said_before_any_work(
    server: str, tiny_raw: Path, cli
) -> None:
    """Nobody listens, or somebody who never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "silent":
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with tracking_to(f"http://ana:confidential@{address}"):
            result = cli("run", "--data", tiny_raw)
    assert result.exit_code == 2
    assert f"the tracking store http://{address} cannot be used" in result.stderr
    assert "confidential" not in result.output
    assert "--offline or MLFLOW_TRACKING_URI=sqlite:///mlflow.db records" in result.stderr
    assert "checking images" not in result.output and "Traceback" not in result.output
    assert time.monotonic() - began < 30


def test_offline_records_here(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking_to(None):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        done = cli("import-notebooks", "--offline")
    assert done.exit_code == 0, done.output
    runs = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db").search_runs(["1"])
    assert {run.info.run_id for run in runs} == set(done.stdout.split()[1::2]) and len(runs) == 5
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    refused = cli("import-notebooks", "--offline")
    assert refused.exit_code == 2
    assert "--offline does not work through `mlflow run`" in refused.stderr


@pytest.fixture
def as_in_a_command() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in STOPPING_SIGNALS}
    stop_on_signals()
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def press_ctrl_c(call: Callable[..., Any], line: int) -> tuple[Callable[..., Any], list[int]]:
    """`call`, with Ctrl-C before one of its lines, and a list that will say how many it has."""
    lines = [0]

    def watch(frame: FrameType, event: str, _: object) -> Any:
        lines[0] += event == "line"
        if event == "line" and lines[0] == line:
            os.kill(os.getpid(), signal.SIGINT)
        return watch

    def watched(*arguments: Any, **options: Any) -> Any:
        sys.settrace(watch)
        try:
            return call(*arguments, **options)
        finally:
            sys.settrace(None)

    return watched, lines


@pytest.mark.parametrize("name", ["start_run", "set_tags"])
def test_ctrl_c_while_the_store_is_written_ends_the_run(
    name: str, store: str, as_in_a_command: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left in the middle, the database would be locked for what ends the run."""
    call, experiment = getattr(mlflow, name), f"interrupted in {name}"
    with open_run(experiment, {"job": "test"}):
        pass  # the first creates the experiment
    watched, lines = press_ctrl_c(call, 0)
    monkeypatch.setattr(mlflow, name, watched)
    with open_run(experiment, {"job": "test"}):
        pass
    for part in range(1, 13):
        watched, _ = press_ctrl_c(call, lines[0] * part // 13)
        monkeypatch.setattr(mlflow, name, watched)
        with pytest.raises(KeyboardInterrupt), open_run(experiment, {"job": "test"}):
            time.sleep(10)
    runs = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    ends = [run.info.status for run in runs if run.info.status != "FINISHED"]
    assert ends == ["KILLED"] * 12
