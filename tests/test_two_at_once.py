"""Several commands in one folder, cache and store at the same time, and none in another's way."""

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from conftest import write_images

from har import manifest as manifests
from har.feature_cache import list_entries

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


def test_trainings_of_one_recipe(data: Path, store: str) -> None:
    """They prepare the same data, compute the same features, and each has its own run."""
    experiment = ["--experiment", "at once", "--data", str(data), "--test-fraction", "0.25"]
    at_once(3, "run", "--variant", "v5", "--epochs", "3", *TINY, *experiment)
    found = mlflow.get_experiment_by_name("at once")
    runs = mlflow.search_runs([found.experiment_id], output_format="list")
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["dataset_digest"] for run in runs}) == 1
    assert len({run.data.metrics["accuracy"] for run in runs}) == 1
    # train with validation, and test: nobody computed anything a second time
    entries = list_entries()
    assert len(entries) == 2 and all(entry.complete for entry in entries)


def test_preparations_into_one_folder(data: Path, store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    at_once(3, "prepare", "--data", str(data), "--out", str(out), "--test-fraction", "0.25")
    assert len(manifests.read(out).table) == 42
    assert {path.name for path in out.iterdir()} == {"manifest.csv", "dataset.json", "report.html"}
