"""The published notebook runs, recorded once, beside what is measured."""

import mlflow
import pytest

from har.jobs.import_notebooks import import_notebooks
from har.notebooks import NOTEBOOKS
from har.recipe import VARIANTS
from tests.fixtures import tracking_to


def test_five_finished_runs_once(store: str, cli) -> None:
    before = cli("import-notebooks", "--experiment", "published")
    again = cli("import-notebooks", "--experiment", "published")
    assert before.exit_code == 0 and before.output == again.output
    experiment = mlflow.get_experiment_by_name("published")
    assert experiment is not None and "mlflow.note.content" in experiment.tags
    runs = mlflow.search_runs([experiment.experiment_id], output_format="list")
    assert {run.data.tags["variant"] for run in runs} == set(NOTEBOOKS) and len(runs) == 5
    assert all(run.info.status == "FINISHED" for run in runs)
    found = mlflow.search_runs(
        [experiment.experiment_id], "tags.source = 'notebook'", output_format="list"
    )
    assert len(found) == 5


@pytest.mark.parametrize("variant", NOTEBOOKS)
def test_what_was_published_is_recorded(variant: str, store: str) -> None:
    notebook, run = NOTEBOOKS[variant], mlflow.get_run(import_notebooks("published")[variant])
    params, metrics = run.data.params, run.data.metrics
    assert run.info.run_name == f"{variant} · b7 · {notebook.hardware}"
    assert metrics["wall_time_s"] == 60 * notebook.minutes
    assert run.info.end_time - run.info.start_time == 60_000 * notebook.minutes
    assert "accuracy" not in metrics
    assert metrics.get("train_accuracy") == notebook.train_accuracy
    assert f"{params['num_gpus']}x{params['gpu_type']}" == notebook.hardware
    for name in ("precision", "strategy", "backbone"):
        assert params[name] == getattr(VARIANTS[variant], name)
    assert notebook.file in run.data.tags["mlflow.note.content"]


def test_an_interrupted_import_is_completed(store: str) -> None:
    first = import_notebooks("half")
    client = mlflow.MlflowClient()
    client.delete_run(first["v1"])
    client.update_run(first["v2"], status="RUNNING")
    again = import_notebooks("half")
    assert again["v1"] != first["v1"] and again["v2"] != first["v2"]
    assert {**again, "v1": "", "v2": ""} == {**first, "v1": "", "v2": ""}


def test_a_store_that_cannot_be_used(store: str, cli) -> None:
    with tracking_to("sqlite:////proc/no/such/place.db"):
        result = cli("import-notebooks")
    assert result.exit_code == 2 and "cannot be used" in result.output
