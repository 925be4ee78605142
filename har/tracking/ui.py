"""The MLflow UI: a saved view with the columns to compare, and how to open it.

MLflow keeps the note and the view of an experiment as tags.
"""

import json
import shlex
from contextlib import suppress
from pathlib import Path

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from har.evaluation.metrics import TEST_METRICS
from har.util.errors import without_password
from har.util.files import digest_bytes
from har.util.process import format_program

VIEW = "results"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
VIEW_TAGS = ("feature_cache", "source", "test_digest")
# Runs of one recipe stand together, whatever their hardware.
GROUP_TAGS = ("variant", "differs_from_variant")
NOTE = f"""Choose Views > {VIEW} (top right) for the columns to compare.

`accuracy` is measured on the test split; its 95 % interval is from `accuracy_low` to
`accuracy_high`. Compare only runs with the same `test_digest`. `overrides` are the settings that
the user changed, `differs_from_variant` all that really ran other than in the variant.
`feature_cache` = hit: features were found on disk, so the wall time is not that of the whole job.
`source` = notebook: published numbers, not measured here. `tags.job = 'train'` finds the trainings
(or `prepare`, `evaluate`, `compare`)."""
# An experiment's tag: digests of the note and the view as this project last wrote them.
DEFAULTS_TAG = "har.defaults"
# The digests of the first version, which did not record them.
FIRST_DEFAULTS = {MLFLOW_RUN_NOTE: "c135ba89005198c4", VIEW_TAG: "b9f46c9bf2768ace"}


def set_up_experiment(experiment_id: str) -> None:
    """Mark an experiment as one of model training, describe it, and save the view of results.

    Replaces a note and a view that an older version of this project wrote; keeps those that the
    user changed.
    """
    shown = [name for name, each in TEST_METRICS.items() if each.in_view]
    columns = ["tags.`hardware`", *(f"metrics.`{name}`" for name in ("wall_time_s", *shown))]
    columns += [f"tags.`{name}`" for name in VIEW_TAGS]
    groups = [{"mode": "tag", "groupByData": name} for name in GROUP_TAGS]
    state = {
        "selectedColumns": columns,
        "searchFilter": "tags.job = 'train'",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": groups},
    }
    view = {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    wanted = {
        # otherwise the UI shows pages for language models
        "mlflow.experimentKind": "custom_model_development",
        MLFLOW_RUN_NOTE: NOTE,
        VIEW_TAG: json.dumps(view),
    }
    client = mlflow.MlflowClient()
    there = client.get_experiment(experiment_id).tags
    ours = dict(FIRST_DEFAULTS)
    # somebody may have edited the tag
    with suppress(ValueError, TypeError):
        ours |= json.loads(there.get(DEFAULTS_TAG, "{}"))
    for name, value in wanted.items():
        if name not in there or (there[name] != value and digest(there[name]) == ours.get(name)):
            client.set_experiment_tag(experiment_id, name, value)
    written = json.dumps({name: digest(wanted[name]) for name in FIRST_DEFAULTS})
    if there.get(DEFAULTS_TAG) != written:
        client.set_experiment_tag(experiment_id, DEFAULTS_TAG, written)


def digest(text: str) -> str:
    """Return 16 hexadecimal digits of the text's SHA-256."""
    return digest_bytes(text.encode())[:16]


def find_sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the database in a `sqlite:///` URI; None for other stores."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def name_page(experiment_id: str) -> str:
    """Return the address, below the server's, of the saved view of an experiment."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}"


def describe_run_page(run_id: str) -> list[str]:
    """Describe, in lines, how to open the UI on this run's experiment."""
    uri = without_password(mlflow.get_tracking_uri())
    page = name_page(mlflow.get_run(run_id).info.experiment_id)
    if uri.startswith(("http://", "https://")):
        return [f"see it: {uri.rstrip('/')}{page}"]
    # absolute paths: `mlflow run` starts this process in another folder than the user's
    file = find_sqlite_file(uri)
    store = shlex.quote(f"sqlite:///{file}" if file else uri)
    # one worker needs a quarter of the memory
    command = f"{format_program('mlflow')} server --backend-store-uri {store} --workers 1"
    return [f"see it: {command}", f"    then open http://127.0.0.1:5000{page}"]
