"""The five published notebook runs in the MLflow store, beside what is measured."""

import time
from typing import Any

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from har.notebooks import NOTEBOOKS, Notebook
from har.recipe import VARIANTS
from har.tracking.query import find_runs
from har.tracking.store import explain_store_errors, open_experiment
from har.tracking.tags import NOTEBOOK, SOURCE_TAG, name_run, recipe_params


def import_notebooks(experiment: str) -> dict[str, str]:
    """Variant to run id of each published run in `experiment`, recorded now if it is not there."""
    experiment_id = open_experiment(experiment)
    there = {
        run.data.tags["variant"]: run.info.run_id
        for run in find_runs(f"tags.{SOURCE_TAG} = '{NOTEBOOK}'", [experiment_id])
        # one that an interrupted import left half made is made again
        if run.info.status == "FINISHED"
    }
    with explain_store_errors():
        return {
            variant: there.get(variant) or _record_notebook(notebook, experiment_id)
            for variant, notebook in NOTEBOOKS.items()
        }


def _record_notebook(notebook: Notebook, experiment_id: str) -> str:
    """One finished run that lasted as long as was published, and ended now: the notebooks do not
    say when they ran.
    """
    client, ended = mlflow.MlflowClient(), round(1000 * time.time())
    started = ended - 60_000 * notebook.minutes
    run = client.create_run(experiment_id, start_time=started, tags=_notebook_tags(notebook))
    run_id = str(run.info.run_id)
    for name, value in _notebook_params(notebook).items():
        client.log_param(run_id, name, value)
    client.log_metric(run_id, "wall_time_s", 60 * notebook.minutes)
    if notebook.train_accuracy is not None:
        client.log_metric(run_id, "train_accuracy", notebook.train_accuracy)
    client.set_terminated(run_id, "FINISHED", end_time=ended)
    return run_id


def _notebook_tags(notebook: Notebook) -> dict[str, str]:
    """What it is found by; no digest, since nobody knows which images it saw."""
    known = (
        f"accuracy {notebook.train_accuracy:.1%}, of its TRAINING images"
        if notebook.train_accuracy is not None
        else "no accuracy"
    )
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
            f" {notebook.hardware} and says {known}."
        ),
    }


def _notebook_params(notebook: Notebook) -> dict[str, Any]:
    """Those that a training run has, as far as they are known."""
    count, gpu_type = notebook.hardware.split("x", 1)
    return {
        "variant": notebook.variant,
        **recipe_params(VARIANTS[notebook.variant]),
        "gpu_type": gpu_type,
        "num_gpus": int(count),
    }
