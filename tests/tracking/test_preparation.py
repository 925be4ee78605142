"""The prepared data that a run records: the very images, in either file, read back as they were."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from har.data import table_files
from har.data.manifest import Manifest
from har.tracking.preparation import log_manifest
from har.tracking.query import load_image_table
from har.tracking.records import load_recorded_manifest
from har.util.errors import UserError

FILES = {"manifest.csv": 100_000, "manifest.parquet": 0}


@pytest.fixture(params=FILES)
def run_id(
    request: pytest.FixtureRequest,
    manifest: Manifest,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A run that holds its manifest in the file of that name."""
    monkeypatch.setattr(table_files, "MAX_CSV_ROWS", FILES[request.param])
    mlflow.set_experiment("preparation")
    with mlflow.start_run() as run:
        log_manifest(manifest)
    found = {each.path for each in MlflowClient().list_artifacts(run.info.run_id)}
    assert found == {"dataset.json", request.param}
    return str(run.info.run_id)


def test_the_very_images_are_read_back(run_id: str, manifest: Manifest) -> None:
    found = load_recorded_manifest(run_id, None)
    assert found.table.equals(manifest.table) and found.root == manifest.root
    assert found.dataset_digest == manifest.dataset_digest
    columns = ["path", "sha256", "split"]
    assert load_image_table(run_id, columns).equals(manifest.table[columns])


def test_a_replaced_table_is_refused(run_id: str, manifest: Manifest) -> None:
    with mlflow.start_run(run_id):
        dataset = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/dataset.json"))
        log_manifest(replace(manifest, table=manifest.table.assign(split="train")))
        mlflow.log_dict(dataset, "dataset.json")
    with pytest.raises(UserError, match="was changed after it was prepared"):
        load_recorded_manifest(run_id, None)


def test_a_run_without_a_table(store: str) -> None:
    mlflow.set_experiment("preparation")
    with mlflow.start_run() as run:
        pass
    with pytest.raises(UserError, match=r"there is no manifest.csv or manifest.parquet\): give"):
        load_recorded_manifest(run.info.run_id, Path())
