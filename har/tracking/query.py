"""Find runs, models and experiments in the MLflow store."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException

from har.data.table_files import MAX_TABLE_BYTES, PARQUET_FILE, TABLE_FILES, decode_parquet
from har.tracking.artifacts import UNREADABLE, read_artifact
from har.tracking.store import DEFAULT_EXPERIMENT, check_store, explain_store_errors
from har.tracking.ui import find_sqlite_file
from har.util.errors import UserError, first_line
from har.util.escaping import from_csv
from har.util.progress import say

# What every training calls its logged model.
MODEL_NAME = "model"
PREDICTIONS_ARTIFACT = "evaluation/predictions.csv"
# Larger tables are not ours: 18,000 images of 15 classes have 4 MB.
MAX_CSV_BYTES = 500_000_000
MAX_TABLE_ROWS = 2_000_000
MAX_CELL = 5_000
WHOLE_RUN_ID = re.compile("[0-9a-f]{32}")
# Runs named in the message about an ambiguous prefix.
MAX_LISTED = 5


def check_readable_store() -> None:
    """Raise a UserError unless the tracking store exists and answers within 20 seconds.

    For commands that read: MLflow itself creates an empty store where it finds none.
    """
    file = find_sqlite_file(mlflow.get_tracking_uri())
    if file is not None and not file.exists():
        raise UserError(
            f"no runs are recorded here: there is no {file}; cd to the folder that holds your"
            " mlflow.db, or set MLFLOW_TRACKING_URI"
        )
    check_store()


def find_run_id(prefix: str) -> str:
    """Find the id of the only run that begins with `prefix`; return a whole id as it is."""
    if WHOLE_RUN_ID.fullmatch(prefix):
        return prefix
    if not re.fullmatch("[0-9a-f]+", prefix):
        raise UserError(f"{prefix!r} is no run id: give an id or its first characters (0-9, a-f)")
    found = find_runs(f"attributes.run_id LIKE '{prefix}%'")
    names = {str(run.info.run_id): f" ({run.info.run_name})" for run in found}
    if (run_id := pick_by_prefix(prefix, names)) is None:
        raise UserError(f"no run id in {mlflow.get_tracking_uri()} begins with {prefix}")
    return run_id


def pick_by_prefix(prefix: str, names: Mapping[str, str]) -> str | None:
    """Pick the only run id that begins with `prefix`, None if there is none. `names` maps run ids
    to what a message shows behind them.
    """
    found = [run_id for run_id in names if run_id.startswith(prefix)]
    if len(found) > 1:
        listed = ", ".join(f"{run_id}{names[run_id]}" for run_id in found[:MAX_LISTED])
        more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        raise UserError(f"{len(found)} run ids begin with {prefix}: {listed}{more}")
    return found[0] if found else None


def complete_model_uri(uri: str) -> str:
    """Replace the beginning of a run id in `runs:/ID/model` by the whole id, and an id alone by
    its run's model; check that the store that the URI needs exists.
    """
    if re.fullmatch("[0-9a-f]{4,32}", uri) and not Path(uri).exists():
        uri = f"runs:/{uri}/{MODEL_NAME}"
    if uri.startswith("models:/") and mlflow.get_registry_uri() == mlflow.get_tracking_uri():
        check_readable_store()
    if not uri.startswith("runs:/"):
        return uri
    check_readable_store()
    run_id, slash, path = uri.removeprefix("runs:/").partition("/")
    return f"runs:/{find_run_id(run_id)}{slash}{path}"


def choose_experiment_to_read(experiment: str | None) -> str:
    """Return the experiment whose trainings are read: by default the one of `mlflow run`, else har.

    By default, say which other experiments have finished trainings: those are left out.
    """
    if experiment is not None:
        return experiment
    name = find_current_experiment() or DEFAULT_EXPERIMENT
    if elsewhere := _count_trainings_elsewhere(name):
        counts = ", ".join(f"{count} in {other}" for other, count in elsewhere.items())
        first = shlex.quote(next(iter(elsewhere)))
        say(
            f"left out: finished trainings in other experiments ({counts}); --experiment {first}"
            " uses those"
        )
    return name


def _count_trainings_elsewhere(experiment: str) -> dict[str, int]:
    # published trainings have no digest and are not counted
    measured = "tags.job = 'train' and tags.recipe_digest != ''"
    runs = find_runs(f"{measured} and attributes.status = 'FINISHED'")
    names = {experiment_id: name for name, experiment_id in _list_experiments().items()}
    counts = Counter(names[run.info.experiment_id] for run in runs)
    del counts[experiment]
    return dict(counts.most_common())


def find_runs(condition: str, experiment_ids: list[str] | None = None) -> list[Any]:
    """Find runs that are not deleted, newest first; in all experiments unless some are named."""
    with explain_store_errors():
        return mlflow.search_runs(
            experiment_ids,
            filter_string=condition,
            search_all_experiments=experiment_ids is None,
            output_format="list",
        )


def find_models(experiment_id: str) -> dict[str, str]:
    """Map the runs of an experiment to the URIs of their newest models."""
    # a run's own list of models has no order and includes deleted ones
    with explain_store_errors():
        found = mlflow.search_logged_models([experiment_id], output_format="list")
    by_age = sorted(found, key=lambda model: model.creation_timestamp)
    return {model.source_run_id: model.model_uri for model in by_age}


def find_experiment(name: str) -> str:
    """Find an experiment's id by its name."""
    known = _list_experiments()
    if name not in known:
        there = f"{', '.join(known)} (in {mlflow.get_tracking_uri()})"
        raise UserError(f"no such experiment: {name}; there are: {there}")
    return known[name]


def _list_experiments() -> dict[str, str]:
    with explain_store_errors():
        return {each.name: str(each.experiment_id) for each in mlflow.search_experiments()}


def find_training(run_id: str) -> Any:
    """Load the MLflow run of a finished training."""
    run = load_run(run_id)
    if run.info.status != "FINISHED" or run.data.tags.get("job") != "train":
        job = run.data.tags.get("job", "none of this project")
        raise UserError(
            f"run {run_id} is no finished training: its job is {job}, its status {run.info.status}"
        )
    return run


def load_run(run_id: str) -> Any:
    """Load an MLflow run that was not deleted."""
    try:
        run = mlflow.get_run(run_id)
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id} cannot be read: {first_line(error)}") from error
    if run.info.lifecycle_stage != "active":
        raise UserError(
            f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` brings it back"
        )
    return run


def delete_models(run_id: str) -> None:
    """Delete the models that a run has logged, before it logs another."""
    ids, of_run = [mlflow.get_run(run_id).info.experiment_id], f"source_run_id = '{run_id}'"
    for each in mlflow.search_logged_models(ids, filter_string=of_run, output_format="list"):
        mlflow.MlflowClient().delete_logged_model(each.model_id)


def find_current_experiment() -> str | None:
    """Return the name of the experiment that `mlflow run` records in; None without it."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None:
        return None
    return str(mlflow.get_experiment(load_run(run_id).info.experiment_id).name)


def load_predictions(run_id: str) -> pd.DataFrame:
    """Load the columns path, label and predicted of a run's test images."""
    try:
        table = load_csv(run_id, PREDICTIONS_ARTIFACT, ["path", "label", "predicted"])
        if table["path"].duplicated().any():
            raise ValueError("it names an image twice")
        return table
    except UNREADABLE as error:
        raise UserError(f"run {run_id} has no readable predictions: {first_line(error)}") from error


def read_table_artifact(run_id: str) -> tuple[str, bytes]:
    """Read the table of images that a run holds; return the name of its file, and its content."""
    for name in TABLE_FILES:
        with suppress(FileNotFoundError):
            return name, read_artifact(run_id, name, MAX_TABLE_BYTES)
    raise FileNotFoundError(f"there is no {' or '.join(TABLE_FILES)}")


def load_image_table(run_id: str, columns: list[str]) -> pd.DataFrame:
    """Load text columns of the table of images that a run holds."""
    name, data = read_table_artifact(run_id)
    if name == PARQUET_FILE:
        return decode_parquet(data, columns)
    return _parse_csv(data, name, columns)


def load_csv(run_id: str, artifact: str, columns: list[str]) -> pd.DataFrame:
    """Load columns of a table that `Run.log_table` logged, as texts; see `har.tracking.artifacts`
    for what is checked.
    """
    return _parse_csv(read_artifact(run_id, artifact, MAX_CSV_BYTES), artifact, columns)


def _parse_csv(data: bytes, artifact: str, columns: list[str]) -> pd.DataFrame:
    table = pd.read_csv(
        BytesIO(data),
        usecols=columns,
        index_col=False,  # else a row that is too long moves its cells
        dtype=str,
        keep_default_na=False,  # a label or a file may be called "NA"
        nrows=MAX_TABLE_ROWS + 1,
    )
    if len(table) > MAX_TABLE_ROWS:
        raise ValueError(f"{artifact} has more than {MAX_TABLE_ROWS:,} rows")
    for name in columns:
        if (table[name].str.len() > MAX_CELL).any():
            raise ValueError(f"{artifact} has a {name} of more than {MAX_CELL:,} characters")
    return table[columns].map(from_csv)
