"""The job `prepare`: a run with its report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from tests.fixtures import read_csv, write_csv


def test_preparation_is_a_run_with_its_report(raw: Path, store: str, cli) -> None:
    shutil.copy(raw / "train" / "Image_1.jpg", raw / "train" / "copy.jpg")
    write_csv(raw, [*read_csv(raw), ("copy.jpg", "sitting")])
    result = cli("prepare", "--data", raw, "--out", "out", "--experiment", "har-prepare")
    assert result.exit_code == 0, result.output
    (run,) = mlflow.search_runs(experiment_names=["har-prepare"], output_format="list")
    assert run.info.run_name == "prepare · raw" and run.data.tags["job"] == "prepare"
    counts = {name: run.data.params[name] for name in ("images", "duplicate_groups", "leaks")}
    assert counts == {"images": "43", "duplicate_groups": "1", "leaks": "0"}
    assert run.data.params["duplicates"] == "near"
    assert len(run.inputs.dataset_inputs) == 1
    report = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report.html")
    assert report == Path("out/report.html").read_text() and "copy.jpg" in report
    copies = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/duplicates.csv")
    assert len(copies.splitlines()) == 3
    figures = MlflowClient().list_artifacts(run.info.run_id, "figures")
    assert {each.path for each in figures} == {"figures/class_balance.png", "figures/samples.png"}


def test_moved_images_are_prepared_anew_by_option(raw: Path, store: str, cli) -> None:
    assert cli("prepare", "--data", raw, "--out", "out").exit_code == 0
    moved = raw.rename(raw.parent / "moved")
    failed = cli("prepare", "--data", "out", "--out", "again")
    assert failed.exit_code == 2 and "--image-root" in failed.output
    result = cli("prepare", "--data", "out", "--image-root", moved, "--out", "again")
    assert result.exit_code == 0, result.output
    described = json.loads(Path("again/dataset.json").read_text())
    assert described["root"] == str(moved)


def test_bad_data_leaves_no_run_behind(raw: Path, store: str, cli) -> None:
    write_csv(raw, [(name, "calling") for name, _ in read_csv(raw)])
    result = cli("prepare", "--data", raw, "--out", "out", "--experiment", "har-none")
    assert result.exit_code == 2 and "every row has the label 'calling'" in result.output
    found = mlflow.get_experiment_by_name("har-none")
    assert mlflow.search_runs([found.experiment_id], output_format="list") == []


WITHOUT_TENSORFLOW = """
import sys
from har.cli.main import main
try:
    main(sys.argv[1:])
finally:
    sys.exit("TensorFlow is loaded" if "tensorflow" in sys.modules else None)
"""


def test_preparing_needs_no_tensorflow(tiny_raw: Path, tmp_path: Path, store: str) -> None:
    """It takes ten seconds to load and 500 MB."""
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, "prepare", "--data", str(tiny_raw)]
    command += ["--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "out" / "report.html").is_file(), done.stderr
