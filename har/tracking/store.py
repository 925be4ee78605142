"""The MLflow store: runs that always end, parameters logged once, quiet loggers.

Works inside `mlflow run`, which opens the run and logs the typed parameters before our code
starts, and without it; on the default sqlite store and on an http server.
"""

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import mlflow
import requests
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from har.tracking.ui import set_up_experiment
from har.util.errors import UserError, without_password
from har.util.files import cache_folder
from har.util.signals import defer_interrupts

# Of an experiment: when something last began that is recorded there, in seconds since the epoch.
BEGUN_TAG = "har.begun"
RETRY_WITHIN_S = 2.0
# One more attempt, and no long wait for an answer.
SHORT_TIMEOUTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "7",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


@contextmanager
def open_run(experiment: str, tags: Mapping[str, str], run_id: str | None = None) -> Iterator[str]:
    """Yield the id of a run that ends FINISHED, FAILED on an error, KILLED on Ctrl-C.

    Joins the run that `mlflow run` opened, or resumes `run_id`; else opens one in
    `experiment`.

    Raises:
        UserError: the tracking store cannot be used.
    """
    quiet_mlflow()
    with explain_store_errors(), _store_lock(), short_timeouts():
        # under `mlflow run` the experiment is chosen already, and choosing again is an error
        if "MLFLOW_RUN_ID" not in os.environ and run_id is None:
            mlflow.set_experiment(experiment)
        run = mlflow.start_run(run_id, log_system_metrics=True)
    try:
        with short_timeouts(), _store_lock():
            mlflow.set_tags(dict(tags))
            _prepare_experiment(run.info.experiment_id)
        yield run.info.run_id
    except BaseException as error:
        # whatever the store says now, that error is what the user must see
        with suppress(UserError), short_timeouts():
            _end_run("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        if isinstance(error, MlflowException | requests.RequestException):
            with explain_store_errors():
                raise
        raise
    _end_run("FINISHED")


def check_store(experiment: str | None = None) -> None:
    """Raise a UserError within 20 seconds unless the tracking store answers: before long work.

    And unless it can write, where the experiment is given that will be recorded in.
    """
    quiet_mlflow()
    with explain_store_errors(), _store_lock(), short_timeouts():
        if experiment is None:
            mlflow.search_experiments(max_results=1)
            return
        if run_id := os.environ.get("MLFLOW_RUN_ID"):
            experiment_id = mlflow.get_run(run_id).info.experiment_id
        else:
            experiment_id = mlflow.set_experiment(experiment).experiment_id
        now = str(int(time.time()))
        _retry_once(lambda: mlflow.MlflowClient().set_experiment_tag(experiment_id, BEGUN_TAG, now))


@contextmanager
def _store_lock() -> Iterator[None]:
    """One process of this machine at a time: two that make a new sqlite store or experiment at once
    leave one that neither can use (mlflow 3.17). A server does that by itself.
    """
    if mlflow.get_tracking_uri().startswith("http"):
        yield
        return
    lock = FileLock(cache_folder() / "store.lock", is_singleton=True)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"the cache {cache_folder()} cannot be written: {error.strerror}; set HAR_CACHE to"
            " another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _prepare_experiment(experiment_id: str) -> None:
    """Describe it, as every process does that records there."""
    _retry_once(lambda: set_up_experiment(experiment_id))


def log_dataset(dataset: Any, context: str) -> None:
    """The images of the active run, which others may be of too."""
    _retry_once(lambda: mlflow.log_input(dataset, context))


def _retry_once(write: Callable[[], None]) -> None:
    """Write; again, if it failed: MLflow looks whether a thing is there and then makes it, so where
    two processes do so at once, even on a server, one of them fails (mlflow 3.17).
    """
    began = time.monotonic()
    try:
        write()
    except MlflowException:
        # one that did not answer at all will not now
        if time.monotonic() - began > RETRY_WITHIN_S:
            raise
        write()


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Meanwhile MLflow soon gives up on a server that does not answer; else it takes minutes."""
    before = {name: os.environ.get(name) for name in SHORT_TIMEOUTS}
    os.environ.update(SHORT_TIMEOUTS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def explain_store_errors() -> Iterator[None]:
    """Meanwhile what MLflow cannot do is a UserError that names the store."""
    try:
        yield
    except (MlflowException, OSError) as error:
        uri = mlflow.get_tracking_uri()
        hint = ""
        if uri.startswith("http"):
            hint = "; --offline or MLFLOW_TRACKING_URI=sqlite:///mlflow.db records on this machine"
        raise UserError(f"the tracking store {uri} cannot be used: {error}{hint}") from error


def _end_run(status: str) -> None:
    """End the active run; a Ctrl-C meanwhile cannot leave it RUNNING for ever."""
    with defer_interrupts(), explain_store_errors():
        mlflow.end_run(status)


class HidePasswords(logging.Filter):
    """What MLflow warns of may hold the server's address as it was given."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the message; every one is shown."""
        record.msg, record.args = without_password(record.getMessage()), ()
        return True


HIDE_PASSWORDS = HidePasswords()


def quiet_mlflow() -> None:
    """MLflow's news off; its warnings stay, but for those about what is meant as it is."""
    # an address with its password, on stdout, where results go
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for handler in logging.getLogger("mlflow").handlers:
        # a handler's filter sees what the loggers below say too; the same one is added once
        handler.addFilter(HIDE_PASSWORDS)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # our models hold none, and others' would run what its maker likes
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    for message in (
        "The specified dataset source can be interpreted in multiple ways",  # all the same
        "Hint: Inferred schema contains integer column",  # a manifest's ids are never missing
        "An input example was not provided",  # the signature says it, and pictures are large
        "Add type hints to the `predict` method",  # likewise
    ):
        warnings.filterwarnings("ignore", rf"(?s).*{re.escape(message)}")


def log_missing_params(params: Mapping[str, Any]) -> None:
    """Log what is not there yet: `mlflow run` logged what was typed, as it was typed, and a
    parameter cannot be logged again with another text.
    """
    run = mlflow.active_run()
    assert run is not None
    there = mlflow.get_run(run.info.run_id).data.params
    mlflow.log_params({name: value for name, value in params.items() if name not in there})


def log_metrics_once(metrics: Mapping[str, float], **links: Any) -> None:
    """Log metrics that a resumed run computes again, but not the values that it has already.
    `links` are those of `mlflow.log_metrics`.
    """
    run = mlflow.active_run()
    assert run is not None
    there = mlflow.get_run(run.info.run_id).data.metrics
    new = {name: value for name, value in metrics.items() if there.get(name) != value}
    mlflow.log_metrics(new, **links)


def log_missing_metrics(metrics: Mapping[str, float], **links: Any) -> None:
    """Log metrics of what is done once, such as times: what is there already stays."""
    run = mlflow.active_run()
    assert run is not None
    there = mlflow.get_run(run.info.run_id).data.metrics
    missing = {name: value for name, value in metrics.items() if name not in there}
    mlflow.log_metrics(missing, **links)


def log_table_file(table: Any, artifact: str) -> None:
    """A table as a CSV artifact."""
    mlflow.log_text(table.to_csv(index=False), artifact)


def set_description(text: str) -> None:
    """Shown above the run in the MLflow UI, as Markdown."""
    mlflow.set_tag(MLFLOW_RUN_NOTE, text)


def choose_experiment(name: str) -> str:
    """The id of the experiment, which is made and described if there is none.

    Raises:
        UserError: the store cannot be used.
    """
    with explain_store_errors(), _store_lock():
        experiment_id = str(mlflow.set_experiment(name).experiment_id)
        _prepare_experiment(experiment_id)
    return experiment_id


DEFAULT_EXPERIMENT = "har"
