"""A trial of a search as a run: a training on the validation images' word alone.

It is never evaluated on the test split, and logs no model: a search trains the best one again, as a
training like any other. The tag `job` is `trial`, and `trial_state` says how it ended.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from har.tracking.journal import open_journal
from har.tracking.query import find_runs
from har.tracking.store import explain_store_errors, neutral_tags, quiet_mlflow
from har.tracking.tags import job_tags, training_params, training_tags
from har.training.epoch_report import OnEpoch
from har.training.job import TrainingJob
from har.util.errors import first_line
from har.util.signals import defer_interrupts

STATE_TAG, SEARCH_TAG, ERROR_TAG = "trial_state", "search", "error"
COMPLETE, PRUNED, FAILED, INTERRUPTED = "complete", "pruned", "failed", "interrupted"
STATUS = {COMPLETE: "FINISHED", PRUNED: "FINISHED", FAILED: "FAILED", INTERRUPTED: "KILLED"}
MAX_PARAM, MAX_TAG = 6_000, 5_000


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """An open run of a trial."""

    id: str

    @contextmanager
    def open_epoch_log(self) -> Iterator[OnEpoch]:
        """Yield the function that logs an epoch, without waiting for the store."""
        client = mlflow.MlflowClient()
        with open_journal(lambda batch: client.log_batch(self.id, batch)) as add:

            def log(epoch: int, metrics: dict[str, float]) -> None:
                at_ms = int(1000 * time.time())
                add([Metric(name, value, at_ms, epoch) for name, value in metrics.items()])

            yield log

    def end(self, state: str, error: Exception | None = None) -> None:
        """End the run in one of the states above; `error` is why it failed."""
        client = mlflow.MlflowClient()
        # a Ctrl-C meanwhile must not leave the run RUNNING
        with defer_interrupts(), explain_store_errors():
            client.set_tag(self.id, STATE_TAG, state)
            if error is not None:
                client.set_tag(self.id, ERROR_TAG, first_line(error)[:MAX_TAG])
            client.set_terminated(self.id, STATUS[state])


def start_trial(
    parent: str, search: str, number: int, values: Mapping[str, Any], job: TrainingJob | None
) -> TrialRun:
    """Open the run of trial `number` under the run `parent`.

    `values` are what it tries; `job` is None where no recipe takes them.
    """
    quiet_mlflow()
    client, name = mlflow.MlflowClient(), f"trial {number}"
    tags = training_tags(job, parent, name) if job else job_tags("trial", name)
    params = training_params(job) if job else {f"recipe.{each}": v for each, v in values.items()}
    own = {
        MLFLOW_PARENT_RUN_ID: parent,
        MLFLOW_RUN_NAME: name,
        "job": "trial",
        "trial": str(number),
        SEARCH_TAG: search,
    }
    with explain_store_errors():
        experiment = client.get_run(parent).info.experiment_id
        run = client.create_run(experiment, run_name=name, tags=neutral_tags() | tags | own)
        logged = [Param(each, str(value)[:MAX_PARAM]) for each, value in params.items()]
        client.log_batch(run.info.run_id, params=logged)
    return TrialRun(id=run.info.run_id)


def load_epochs(run_id: str, names: tuple[str, ...]) -> list[dict[str, float]]:
    """Load these metrics of each epoch of a training or a trial, as its history has them."""
    client = mlflow.MlflowClient()
    epochs: dict[int, dict[str, float]] = {}
    with explain_store_errors():
        for name in names:
            for each in client.get_metric_history(run_id, name):
                epochs.setdefault(each.step, {})[name] = each.value
    return [epochs[step] for step in sorted(epochs)]


def find_search_run(search: str, experiment_id: str) -> str | None:
    """Find the newest parent run of a search."""
    condition = f"tags.job = 'sweep' and tags.{SEARCH_TAG} = '{search}'"
    runs = find_runs(condition, [experiment_id])
    return str(runs[0].info.run_id) if runs else None


def close_lost_trials(search: str, experiment_id: str) -> None:
    """End the runs of trials whose processes were killed; call it when no trial is at work."""
    condition = (
        f"tags.job = 'trial' and tags.{SEARCH_TAG} = '{search}' and attributes.status = 'RUNNING'"
    )
    for run in find_runs(condition, [experiment_id]):
        TrialRun(id=run.info.run_id).end(INTERRUPTED)
