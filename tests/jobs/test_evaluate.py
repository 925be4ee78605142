"""The job `evaluate`: the numbers that training logged, and refusals."""

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from har.compare.pictures import find_recorded_images
from har.data import table_files
from har.data.manifest import Manifest, write_manifest
from har.data.prepare import load_manifest
from har.data.splits import Split
from har.jobs.evaluate import evaluate_logged_model, load_test_data
from har.serving.load import check_unseen, load_logged_model
from har.util.errors import UserError
from tests.fixtures import tiny_recipe, write_images
from tests.jobs.conftest import run_tiny
from tests.jobs.test_train import TEST_METRICS


def test_evaluate_gives_the_numbers_that_training_logged(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    uri = f"runs:/{run.info.run_id}/model"
    evaluation, robustness = evaluate_logged_model(load_logged_model(uri), manifest, "har-tests")
    logged = {name: run.data.metrics[name] for name in TEST_METRICS}
    assert evaluation.scores == logged
    assert robustness is not None and robustness["accuracy"][0] == logged["accuracy"]
    (latest,) = mlflow.search_runs(
        experiment_names=["har-tests"],
        filter_string=f"tags.evaluated_model = '{uri}'",
        output_format="list",
    )
    assert {k: latest.data.metrics[k] for k in TEST_METRICS} == logged
    assert latest.info.run_name == f"evaluate · {run.info.run_name}"
    assert latest.data.tags["trained_by"] == run.info.run_id
    uri = f"runs:/{latest.info.run_id}/evaluation/robustness.csv"
    assert mlflow.artifacts.load_text(uri) == robustness.to_csv(index=False)


def test_a_model_is_not_evaluated_on_what_it_was_trained_on(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    logged = load_logged_model(f"runs:/{run.info.run_id}/model")
    assert logged.split == Split(test_fraction=0.25, split_seed=0)
    table = manifest.table.copy()
    table.loc[table.index[table["split"] == "train"][:2], "split"] = "test"
    with pytest.raises(UserError, match=r"2 of the \d+ test images .*--test-fraction 0.25"):
        evaluate_logged_model(logged, replace(manifest, table=table), "har-tests")


def test_by_default_a_model_is_evaluated_on_the_data_of_its_training(
    run: mlflow.entities.Run, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = load_logged_model(f"runs:/{run.info.run_id}/model")
    found = load_test_data(logged, "auto", {}, None)
    assert found.test_digest == run.data.tags["test_digest"] == manifest.test_digest
    assert f"data: that of the training, {manifest.name}" in capsys.readouterr().err
    with pytest.raises(UserError, match="prepared with split_seed=0; received 9"):
        load_test_data(logged, "auto", {"split_seed": 9}, None)


def test_other_data_than_that_of_the_training_is_named(
    run: mlflow.entities.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = load_logged_model(f"runs:/{run.info.run_id}/model")
    load_test_data(logged, str(write_images(tmp_path / "other", seed=5)), {}, None)
    assert "these are other test images than those of the training" in capsys.readouterr().err


def test_data_that_is_gone_is_asked_for(
    run: mlflow.entities.Run, manifest: Manifest, tmp_path: Path
) -> None:
    logged = load_logged_model(f"runs:/{run.info.run_id}/model")
    with pytest.raises(UserError, match=r"there is no folder .*gone"):
        load_test_data(logged, "auto", {}, tmp_path / "gone")


@pytest.mark.usefixtures("tiny_backbone")
def test_a_run_that_holds_its_table_as_parquet(
    manifest: Manifest, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a table of many images: the same numbers, the same data and the same refusal."""
    recipe = tiny_recipe("v6")
    in_csv = run_tiny(recipe, manifest)
    monkeypatch.setattr(table_files, "MAX_CSV_ROWS", 0)
    write_manifest(manifest, tmp_path / "prepared")
    record = run_tiny(recipe, load_manifest(str(tmp_path / "prepared")))
    assert (record.digests, record.test_metrics) == (in_csv.digests, in_csv.test_metrics)
    files = {each.path for each in MlflowClient().list_artifacts(record.run_id)}
    assert "manifest.parquet" in files and "manifest.csv" not in files
    logged = load_logged_model(f"runs:/{record.run_id}/model")
    found = load_test_data(logged, "auto", {}, None)
    assert found.table.equals(manifest.table)
    check_unseen(logged, found)
    images = find_recorded_images(record.run_id)
    assert images.thumbnail_uri(manifest.table["path"][0])
    table = manifest.table.assign(split="test")
    with pytest.raises(UserError, match=r"test images are among those that .* was trained on"):
        check_unseen(logged, replace(manifest, table=table))
