"""`har train --resume` after kill -9, Ctrl-C and an error: one run, nothing lost, nothing twice."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from har.training import backup
from har.training.backup import STATE_FILE, load_job, open_backup
from har.training.backup_folders import JOB_FILE, backup_folder, list_backups
from har.util.locks import file_lock
from tests.fixtures import CLASSES, write_images

# A backup after each epoch, however short it is; all else is the real command.
COMMAND = (
    "import har.training.backup as b; b.MAX_TIME_SHARE = 1e9;"
    " from har.cli.main import main; main(prog_name='har')"
)


EPOCHS = 12


def arguments(data: Path, experiment: str) -> list[str]:
    return [
        "train", "--variant", "v3", "--data", str(data), "--backbone", "efficientnet-lite0",
        "--image-size", "32", "--batch-size", "4", "--epochs", str(EPOCHS), "--patience", "0",
        "--experiment", experiment, "--test-fraction", "0.25", "--strategy", "one_device",
    ]  # fmt: skip


def har(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=check
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # so many that an epoch takes a moment, in which it can be interrupted
    return write_images(tmp_path_factory.mktemp("resume") / "images", per_class=60)


@pytest.fixture(scope="module")
def whole(
    data: Path, store_uri: str, cli, tmp_path_factory: pytest.TempPathFactory
) -> mlflow.entities.Run:
    """A training that nothing happened to, in this process."""
    mlflow.set_tracking_uri(store_uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store_uri)
        patch.setenv("HAR_CACHE", str(tmp_path_factory.mktemp("whole")))
        assert cli(*arguments(data, "whole")).exit_code == 0
        return only_run("whole")


@pytest.fixture
def always_backed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup after each epoch, also in this process."""
    monkeypatch.setattr(backup, "MAX_TIME_SHARE", 1e9)
    monkeypatch.setattr(backup, "FIRST_AFTER_S", 0.0)


def only_run(experiment: str) -> mlflow.entities.Run:
    found = mlflow.get_experiment_by_name(experiment)
    (run,) = mlflow.search_runs([found.experiment_id], output_format="list")
    return run


def history(run: mlflow.entities.Run, name: str) -> list[tuple[int, float]]:
    found = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
    return [(each.step, each.value) for each in found]


def predictions(run: mlflow.entities.Run) -> pd.DataFrame:
    uri = f"runs:/{run.info.run_id}/evaluation/predictions.csv"
    return pd.read_csv(mlflow.artifacts.download_artifacts(uri))


def start_and_stop(words: list[str], stop: int, epochs: int, later_s: float) -> tuple[int, str]:
    """Start the command and send it a signal, `later_s` after the end of epoch `epochs`.

    Returns its exit status, and what it said after that epoch.
    """
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"epoch {epochs}/{EPOCHS}  loss"):
                time.sleep(later_s)
                process.send_signal(stop)
                break
        rest = process.stderr.read()
    assert process.returncode != 0
    return process.returncode, rest


def first_epoch(said: str) -> int:
    """The number of the first epoch that was trained."""
    found = re.search(rf"^epoch (\d+)/{EPOCHS}  loss", said, re.MULTILINE)
    assert found, said
    return int(found[1])


def assert_as_if_nothing_had_happened(run: mlflow.entities.Run, whole: mlflow.entities.Run) -> None:
    assert run.info.status == "FINISHED"
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert history(run, name) == history(whole, name)
        assert [step for step, _ in history(run, name)] == list(range(1, EPOCHS + 1))
    for name in ("accuracy", "top_3_accuracy", "log_loss"):
        assert history(run, name) == [(0, whole.data.metrics[name])]
    columns = [f"p_{name}" for name in CLASSES]
    np.testing.assert_array_equal(predictions(run)[columns], predictions(whole)[columns])
    models = mlflow.search_logged_models(
        [run.info.experiment_id],
        output_format="list",
        filter_string=f"source_run_id='{run.info.run_id}'",
    )
    assert len(models) == 1
    assert not backup_folder(run.info.run_id).exists()


@pytest.mark.slow
def test_stopped_and_killed_it_goes_on_in_the_same_run(
    whole: mlflow.entities.Run, data: Path, store: str, cli
) -> None:
    words, began = arguments(data, "killed"), time.time()
    code, rest = start_and_stop(words, signal.SIGINT, epochs=4, later_s=0.1)
    run = only_run("killed")
    assert (code, run.info.status) == (130, "KILLED")
    assert f"har train --resume {run.info.run_id}" in rest
    assert rest.splitlines()[-1] == "stopped" and "Traceback" not in rest
    # it may be killed while it goes on, too
    resume = ["train", "--resume", run.info.run_id]
    code, rest = start_and_stop(resume, signal.SIGKILL, epochs=7, later_s=0.0)
    assert code == -signal.SIGKILL
    assert only_run("killed").info.status == "RUNNING"
    assert (backup_folder(run.info.run_id) / STATE_FILE).is_file()
    assert f"interrupted; to resume: har train --resume {run.info.run_id}" in cli("cache").output
    assert first_epoch(har(*resume).stderr) > 7
    run = only_run("killed")
    assert_as_if_nothing_had_happened(run, whole)
    # what is counted was spent, and was spent once
    assert run.data.metrics["train_time_s"] < run.data.metrics["wall_time_s"] < time.time() - began
    again = cli(*resume)
    assert again.exit_code == 2 and "is finished: there is nothing to resume" in again.output


@pytest.mark.slow
def test_an_end_that_was_not_recorded_is_recorded_once(
    whole: mlflow.entities.Run, data: Path, store: str, cli
) -> None:
    """All is done and logged but for the run's end: nothing is trained or logged again."""
    end = mlflow.MlflowClient.set_terminated

    def away(client: Any, run_id: str, status: str | None = None, end_time: Any = None) -> None:
        if status == "FINISHED":
            raise mlflow.exceptions.MlflowException("away")
        end(client, run_id, status, end_time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_terminated", away)
        done = cli(*arguments(data, "end"))
    assert done.exit_code == 2 and "cannot be used: away" in done.stderr, done.output
    assert "to resume this training" in done.stderr
    run_id = only_run("end").info.run_id
    job = load_job(run_id)
    resumed = cli("train", "--resume", run_id)
    assert resumed.exit_code == 0, resumed.output
    assert "  loss " not in resumed.stderr
    run = only_run("end")
    assert_as_if_nothing_had_happened(run, whole)
    for name in ("train_time_s", "wall_time_s", "latency_ms", "best_epoch"):
        assert len(history(run, name)) == 1
    # killed before it could delete its backup
    with pytest.raises(KeyboardInterrupt), open_backup(run_id, job, 0.0):
        raise KeyboardInterrupt
    assert cli("sync").exit_code == 0
    assert not backup_folder(run_id).exists()


@pytest.mark.slow
def test_a_solved_head_is_recorded_later_too(data: Path, store: str, cli) -> None:
    """It has no epochs to resume, and must not be lost with the store."""
    end = mlflow.MlflowClient.set_terminated

    def away(client: Any, run_id: str, status: str | None = None, end_time: Any = None) -> None:
        if status == "FINISHED":
            raise mlflow.exceptions.MlflowException("away")
        end(client, run_id, status, end_time)

    options = ("--variant", "v6", "--image-size", "32", "--backbone", "efficientnet-lite0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_terminated", away)
        done = cli("run", "--data", data, "--experiment", "solved", *options)
    assert done.exit_code == 2 and "cannot be used: away" in done.stderr, done.output
    assert "to resume this training" in done.stderr
    before = only_run("solved")
    assert cli("sync").exit_code == 0
    run = only_run("solved")
    assert (run.info.run_id, run.info.status) == (before.info.run_id, "FINISHED")
    for name in ("val_accuracy", "train_loss", "train_time_s", "temperature", "probe_c"):
        assert len(history(run, name)) == 1
        assert run.data.metrics[name] == before.data.metrics[name]
    assert not backup_folder(run.info.run_id).exists()


def interrupt(epoch: int) -> None:
    raise KeyboardInterrupt


def test_other_weights_are_not_gone_on_with(
    data: Path, store: str, cli, always_backed_up: None, after_each_epoch
) -> None:
    after_each_epoch(interrupt)
    assert cli(*arguments(data, "weights")).exit_code == 130
    run_id = only_run("weights").info.run_id
    job = backup_folder(run_id) / JOB_FILE
    digest = json.loads(job.read_text())["recipe_digest"]
    job.write_text(job.read_text().replace(digest, "0" * len(digest)))
    result = cli("train", "--resume", run_id)
    assert result.exit_code == 2 and "holds other weights now" in result.output
    job.write_text(job.read_text().replace("0" * len(digest), digest))
    # another process' lock, or one that is taken another time: the same to the system
    with file_lock(Path(f"{backup_folder(run_id)}.lock")):
        said = cli("sync").stderr
    assert f"run {run_id} is being trained by another process" in said
    assert f"run {run_id} has epochs left: har train --resume {run_id}" in cli("sync").stderr


def test_a_mistake_leaves_no_run_and_no_backup(data: Path, store: str, cli) -> None:
    before = list_backups()
    result = cli(*arguments(data, "mistake"), "--batch-size", 500)
    assert result.exit_code == 2 and "batch_size 500 is more than" in result.output
    assert "--resume" not in result.output
    found = mlflow.get_experiment_by_name("mistake")
    assert mlflow.search_runs([found.experiment_id], output_format="list") == []
    assert list_backups() == before


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(whole: mlflow.entities.Run, data: Path, store: str) -> None:
    _, rest = start_and_stop(arguments(data, "stopped"), signal.SIGINT, epochs=2, later_s=0.0)
    run = only_run("stopped")
    assert run.info.status == "KILLED"
    assert f"har train --resume {run.info.run_id}" in rest
    wrong = har("train", "--resume", run.info.run_id, "--epochs", "99", check=False)
    assert wrong.returncode == 2 and "keeps its recipe; received epochs=99" in wrong.stderr
    assert only_run("stopped").info.status == "KILLED"
    har("train", "--resume", run.info.run_id, "--epochs", str(EPOCHS))
    assert_as_if_nothing_had_happened(only_run("stopped"), whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", "0" * 32], "no backup"),
        (["--resume", "0" * 32, "--variant", "v3"], "leave out --variant"),
        (["--resume", "0" * 32, "--reproduce", "1"], "leave out --reproduce"),
        (["--resume", "../../etc"], "no backup"),
    ],
)
def test_what_cannot_be_gone_on_with(words: list[str], said: str, store: str, cli) -> None:
    result = cli("train", *words)
    assert result.exit_code == 2 and said in result.output


def test_mlflow_run_has_a_run_of_its_own(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "1" * 32)
    # as its entry point types it
    result = cli("train", "--variant", "v3", "--data", "auto", "--resume", "2" * 32)
    assert result.exit_code == 2
    assert f"through `mlflow run`, which has opened another run: har train --resume {'2' * 32}" in (
        result.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(
    seed: int, whole: mlflow.entities.Run, data: Path, store: str
) -> None:
    rng = np.random.default_rng(seed)
    name = f"killed {seed}"
    epochs, later_s = int(rng.integers(1, EPOCHS)), float(rng.uniform(0, 0.3))
    start_and_stop(arguments(data, name), signal.SIGKILL, epochs, later_s)
    went_on = har("train", "--resume", only_run(name).info.run_id)
    # it may have been killed after the last one
    if "\nepoch " in went_on.stderr:
        assert first_epoch(went_on.stderr) > epochs
    assert_as_if_nothing_had_happened(only_run(name), whole)
