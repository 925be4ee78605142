"""What a first look at the MLflow UI needs: a view with the right columns, and where it is.

MLflow keeps such things as tags of the experiment.
"""

import json
import os
import shlex
import sys

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from har.util.errors import without_password

VIEW = "results"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = (
    "metrics.`accuracy`",
    "metrics.`accuracy_low`",
    "metrics.`accuracy_high`",
    "metrics.`top_3_accuracy`",
    "metrics.`wall_time_s`",
    "tags.`features`",
    "tags.`source`",
    "tags.`hardware`",
    "tags.`changed`",
    "tags.`test_digest`",
)
NOTE = f"""Choose Views > {VIEW} (top right) for the columns to compare.

`accuracy` is of held-out test images, with its 95 % interval from `accuracy_low` to
`accuracy_high`; runs compare only where `test_digest` is equal. `changed` says what ran other than
in the notebook. `features` is warm where some were found on disk: that run's wall time is not the
whole job's. `source` is notebook where numbers were published, not measured here.
`tags.job = 'train'` finds the trainings (or `prepare`, `evaluate`, `compare`)."""


def set_up_experiment(experiment_id: str) -> None:
    """Mark an experiment as one of model training, describe it, and save the view of results;
    what is there already stays, it may be the user's.
    """
    state = {"selectedColumns": COLUMNS, "searchFilter": "tags.job = 'train'"}
    view = {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    wanted = {
        # else the UI takes it for one of language models, and shows traces and judges
        "mlflow.experimentKind": "custom_model_development",
        MLFLOW_RUN_NOTE: NOTE,
        VIEW_TAG: json.dumps(view),
    }
    client = mlflow.MlflowClient()
    there = client.get_experiment(experiment_id).tags
    for name, value in wanted.items():
        if name not in there:
            client.set_experiment_tag(experiment_id, name, value)


def describe_ui(tracking_uri: str, experiment_id: str) -> str:
    """How to open the MLflow UI on the store that holds the runs, and at which page."""
    page = f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}"
    if tracking_uri.startswith(("http://", "https://")):
        return tracking_uri.rstrip("/") + page
    # by the interpreter, since mlflow may not be on PATH; one worker needs a quarter of the memory
    python = os.path.relpath(sys.executable)
    program = shlex.quote(python if not python.startswith("..") else sys.executable)
    store = shlex.quote(tracking_uri)
    command = f"{program} -m mlflow server --backend-store-uri {store} --workers 1"
    return f"{command}\n    then open http://127.0.0.1:5000{page}"


def describe_run_page(run_id: str) -> str:
    """How to open the UI on this run's experiment."""
    uri = without_password(mlflow.get_tracking_uri())
    return describe_ui(uri, mlflow.get_run(run_id).info.experiment_id)
