"""Several commands in one folder, cache and store at the same time, and none in another's way."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlflow
import pandas as pd
import pytest
from mlflow.data.pandas_dataset import from_pandas

from har.data.manifest import read_manifest
from har.tracking.store import Run
from har.training.feature_cache import list_entries
from tests.fixtures import write_images

TINY = ["--backbone", "efficientnet-lite0", "--image-size", "32", "--batch-size", "4"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def at_once(count: int, *words: str) -> list[str]:
    """What each of so many equal commands says on stderr; all of them end well."""
    command = [sys.executable, "-m", "har", *words]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    said = [process.communicate(timeout=300)[1] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text
    return said


@pytest.mark.slow
def test_trainings_of_one_recipe(data: Path, store: str) -> None:
    """They prepare the same data, compute the same features, and each has its own run."""
    experiment = ["--experiment", "at once", "--data", str(data), "--test-fraction", "0.25"]
    at_once(
        2, "run", "--variant", "v5", "--epochs", "3", "--runtime", "tensorflow", *TINY, *experiment
    )
    found = mlflow.get_experiment_by_name("at once")
    runs = mlflow.search_runs([found.experiment_id], output_format="list")
    assert len(runs) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["dataset_digest"] for run in runs}) == 1
    assert len({run.data.metrics["accuracy"] for run in runs}) == 1
    # train with validation, and test: nobody computed anything a second time
    entries = list_entries()
    assert len(entries) == 2 and all(entry.num_rows == entry.shape[0] for entry in entries)


@pytest.mark.slow
def test_preparations_into_one_folder(data: Path, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    at_once(2, "prepare", "--data", str(data), "--out", str(out), "--test-fraction", "0.25")
    assert len(read_manifest(out).table) == 42
    assert {path.name for path in out.iterdir()} == {"manifest.csv", "dataset.json", "report.html"}


def test_one_data_set_is_recorded_by_two_at_once(tmp_path: Path, store: str) -> None:
    """MLflow looks for it and then makes it: ten times both look at the same moment."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/own.db")
    mlflow.set_experiment("data sets")
    names, together = [f"data {i}" for i in range(10)], Barrier(2)

    def record() -> str:
        with mlflow.start_run() as run:
            for name in names:
                dataset = from_pandas(pd.DataFrame({"path": [name]}), name=name, digest=name)
                together.wait(timeout=60)
                Run(run.info.run_id, run.info.experiment_id).log_dataset(dataset, "training")
        return run.info.run_id

    with ThreadPoolExecutor(2) as pool:
        ids = [each.result() for each in [pool.submit(record), pool.submit(record)]]
    for run_id in ids:
        recorded = mlflow.get_run(run_id).inputs.dataset_inputs
        assert sorted(each.dataset.name for each in recorded) == sorted(names)
