"""Record the five published notebook runs in the MLflow store, to compare with measured runs."""

import time

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from har.notebooks import NOTEBOOKS, Notebook
from har.recipe import VARIANTS
from har.tracking.query import find_runs
from har.tracking.store import explain_store_errors, open_experiment
from har.tracking.tags import NOTEBOOK, SOURCE_TAG, name_run, recipe_params


def import_notebooks(experiment: str) -> dict[str, str]:
    """Record each published run in `experiment` if it is missing; map variants to run ids."""
    experiment_id = open_experiment(experiment)
    recorded = {
        run.data.tags["variant"]: run.info.run_id
        for run in find_runs(f"tags.{SOURCE_TAG} = '{NOTEBOOK}'", [experiment_id])
        # an interrupted import leaves an unfinished run: record it again
        if run.info.status == "FINISHED"
    }
    with explain_store_errors():
        return {
            variant: recorded.get(variant) or _record_notebook(notebook, experiment_id)
            for variant, notebook in NOTEBOOKS.items()
        }


def _record_notebook(notebook: Notebook, experiment_id: str) -> str:
    """Record a finished run of the published duration that ends now: its date is not known."""
    client, ended = mlflow.MlflowClient(), round(1000 * time.time())
    started = ended - 60_000 * notebook.minutes
    run = client.create_run(experiment_id, start_time=started, tags=_notebook_tags(notebook))
    run_id = str(run.info.run_id)
    count, gpu_type = notebook.hardware.split("x", 1)
    found = {"variant": notebook.variant, "gpu_type": gpu_type, "num_gpus": int(count)}
    for name, value in (found | recipe_params(VARIANTS[notebook.variant])).items():
        client.log_param(run_id, name, value)
    client.log_metric(run_id, "wall_time_s", 60 * notebook.minutes)
    if notebook.train_accuracy is not None:
        client.log_metric(run_id, "train_accuracy", notebook.train_accuracy)
    client.set_terminated(run_id, "FINISHED", end_time=ended)
    return run_id


def _notebook_tags(notebook: Notebook) -> dict[str, str]:
    """The tags of a training run, except the digests: nobody knows which images it used."""
    accuracy = "no accuracy"
    if notebook.train_accuracy is not None:
        accuracy = f"accuracy {notebook.train_accuracy:.1%}, on its TRAINING images"
    return {
        MLFLOW_RUN_NAME: name_run(notebook.variant, VARIANTS[notebook.variant], notebook.hardware),
        SOURCE_TAG: NOTEBOOK,
        "job": "train",
        "variant": notebook.variant,
        "overrides": "none",
        "differs_from_variant": "none",
        "hardware": notebook.hardware,
        "notebook": notebook.file,
        MLFLOW_RUN_NOTE: (
            f"Published, not measured here: `{notebook.file}` took {notebook.minutes} min on"
            f" {notebook.hardware} and reports {accuracy}."
        ),
    }
