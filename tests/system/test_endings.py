"""Every ending closes its run: signals at any moment, options that cannot work, data of a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

COMMAND = [
    sys.executable,
    "-m",
    "har",
    "run",
    "--variant",
    "v5",
    "--epochs",
    "400",
    "--batch-size",
    "4",
]


def start(store: str, data: Path, *before: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*before, *COMMAND, "--data", str(data), "--experiment", "endings"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": store},
        start_new_session=True,
    )


# While click and pandas are imported; while MLflow and TensorFlow are.
@pytest.mark.parametrize("after_s", [0.3, 5.0])
def test_ctrl_c_at_any_moment_is_one_line(raw: Path, store: str, after_s: float) -> None:
    process = start(store, raw)
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said and said.rstrip().endswith("stopped")
    assert running_runs() == []


def running_runs() -> list[str]:
    found = mlflow.get_experiment_by_name("endings")
    if found is None:
        return []
    runs = mlflow.search_runs([found.experiment_id], output_format="list")
    return [run.info.run_id for run in runs if run.info.status == "RUNNING"]


def wait_for_epoch(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            return
    raise AssertionError("no epoch ended")


@pytest.mark.slow
def test_a_closed_terminal_ends_a_training_like_ctrl_c(raw: Path, store: str) -> None:
    process = start(store, raw)
    wait_for_epoch(process)
    os.killpg(process.pid, signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert "to resume this training" in said and running_runs() == []


@pytest.mark.slow
def test_nohup_keeps_a_training_alive(raw: Path, store: str) -> None:
    process = start(store, raw, "nohup")
    wait_for_epoch(process)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130 and running_runs() == []


@pytest.mark.slow
def test_a_new_store_is_created_whole_or_not_at_all(tmp_path: Path) -> None:
    """A half created sqlite database can never be used again."""
    file = tmp_path / "new.db"
    opens = "from har.tracking.store import open_experiment; open_experiment('x')"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{file}"}
    process = subprocess.Popen([sys.executable, "-c", opens], env=environment)
    # killed while it creates the tables
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".new.db.*")) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(".new.db.*")) and not file.exists()
    subprocess.run([sys.executable, "-c", opens], env=environment, check=True)
    assert file.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 400], "batch_size 400 is more than"),
        (["--validation-fraction", 0.01], "validation fraction of 0.01"),
        (["--fine-tune", "last_blocks", "--cut", "nothing"], "no block 'nothing'"),
    ],
)
def test_options_that_cannot_work_leave_no_run(
    raw: Path, store: str, cli, options: list[object], message: str
) -> None:
    result = cli("run", "--data", raw, "--experiment", "impossible", "--variant", "v3", *options)
    assert result.exit_code == 2 and message in result.output
    found = mlflow.get_experiment_by_name("impossible")
    assert mlflow.search_runs([found.experiment_id], output_format="list") == []
