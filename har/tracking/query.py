"""Finds runs, models and experiments in the MLflow store."""

import os
from io import StringIO
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException

from har.tracking.store import explain_store_errors
from har.util.errors import UserError, first_line


def find_runs(condition: str, experiment_ids: list[str] | None = None) -> list[Any]:
    """Runs that were not deleted, the newest first; of all experiments unless some are named."""
    with explain_store_errors():
        return mlflow.search_runs(
            experiment_ids,
            filter_string=condition,
            search_all_experiments=experiment_ids is None,
            output_format="list",
        )


def find_models(experiment_id: str) -> dict[str, str]:
    """The URI of each run's model, the newest where it has several, by run id.

    A run itself lists what it logged in no order, and with what was deleted since.
    """
    with explain_store_errors():
        found = mlflow.search_logged_models([experiment_id], output_format="list")
    by_age = sorted(found, key=lambda model: model.creation_timestamp)
    return {model.source_run_id: model.model_uri for model in by_age}


def find_experiment(name: str) -> str:
    """An experiment's id.

    Raises:
        UserError: the store cannot be used, or there is no such experiment.
    """
    with explain_store_errors():
        known = {each.name: each.experiment_id for each in mlflow.search_experiments()}
    if name not in known:
        raise UserError(f"no such experiment: {name}; there are: {', '.join(known)}")
    return str(known[name])


def find_training(run_id: str) -> Any:
    """A finished training, measured or published.

    Raises:
        UserError: there is no such run, or it is something else.
    """
    try:
        run = mlflow.get_run(run_id)
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id} cannot be read: {first_line(error)}") from error
    if run.info.lifecycle_stage != "active":
        raise UserError(f"run {run_id} was deleted")
    if run.info.status != "FINISHED" or run.data.tags.get("job") != "train":
        job = run.data.tags.get("job", "none of this project's")
        raise UserError(
            f"run {run_id} is no finished training: its job is {job}, its status {run.info.status}"
        )
    return run


def has_finished(run_id: str) -> bool:
    """Whether a run ended well.

    Raises:
        UserError: there is no such run, or it was deleted.
    """
    try:
        run = mlflow.get_run(run_id)
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id} cannot be read: {first_line(error)}") from error
    if run.info.lifecycle_stage != "active":
        raise UserError(f"cannot resume run {run_id}: it is deleted")
    return str(run.info.status) == "FINISHED"


def delete_models(run_id: str) -> None:
    """Delete the models that a run has logged: it is going to log another."""
    client, run = mlflow.MlflowClient(), mlflow.get_run(run_id)
    found = mlflow.search_logged_models(
        [run.info.experiment_id],
        filter_string=f"source_run_id = '{run_id}'",
        output_format="list",
    )
    for each in found:
        client.delete_logged_model(each.model_id)


def find_current_experiment() -> str | None:
    """The experiment of the run that `mlflow run` opened, if it did."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None:
        return None
    with explain_store_errors():
        return str(mlflow.get_experiment(mlflow.get_run(run_id).info.experiment_id).name)


def load_predictions(run_id: str) -> pd.DataFrame:
    """Columns path, label and predicted of a run's test images.

    Raises:
        UserError: the run has no such table.
    """
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/evaluation/predictions.csv")
        # a label or a file may be called "NA"
        table = pd.read_csv(StringIO(text), dtype=str, keep_default_na=False)
        return table[["path", "label", "predicted"]]
    except (MlflowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"run {run_id} has no readable predictions: {first_line(error)}") from error
