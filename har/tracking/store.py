"""The MLflow store: opens a run, logs into it, and ends it whatever happens.

Works inside `mlflow run`, which opens the run and logs the typed options as parameters before our
code starts, and without it; on the default sqlite store and on a server.
"""

import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_USER,
)
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES
from sqlalchemy.exc import SQLAlchemyError

from har.tracking.backends import OFFLINE_HINT, check_files, explain_s3_errors, is_database
from har.tracking.local_store import store_lock
from har.tracking.ui import set_up_experiment
from har.util.errors import UserError, first_line, without_password
from har.util.escaping import for_terminal, format_csv
from har.util.process import set_variables
from har.util.progress import warn
from har.util.signals import defer_interrupts, open_work

Built = TypeVar("Built")
DEFAULT_EXPERIMENT = "har"
# An experiment's tag: when a command last began to record there, in seconds since the epoch.
BEGUN_TAG = "har.begun"
RETRY_WITHIN_S = 2.0
# One more attempt, and no long wait for an answer.
SHORT_TIMEOUTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "7",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "PGCONNECT_TIMEOUT": "7",
}


@dataclass
class Run:
    """The open run of this process.

    A parameter or metric that the run already has is not changed: `mlflow run` logs the options as
    typed, and a resumed training computes again what an earlier process logged.
    """

    id: str
    finished: bool = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the parameters that the run does not have yet."""
        there = mlflow.get_run(self.id).data.params
        mlflow.log_params({name: value for name, value in params.items() if name not in there})

    def log_metrics(self, metrics: Mapping[str, float], **links: Any) -> None:
        """Log the metrics that the run does not have yet; `links` are `mlflow.log_metrics`'s."""
        there = mlflow.get_run(self.id).data.metrics
        new = {name: value for name, value in metrics.items() if name not in there}
        mlflow.log_metrics(new, **links)

    def log_dataset(self, dataset: Any, context: str) -> None:
        """Log the images as the run's input; other runs may log the same ones now."""
        retry_once(lambda: mlflow.log_input(dataset, context))

    def log_table(self, build: Callable[[], Any], artifact: str) -> None:
        """Build a table and log it as a CSV artifact; warn if it cannot be built."""
        if (text := _try_to_build(lambda: format_csv(build()), artifact)) is not None:
            mlflow.log_text(text, artifact)

    def log_figure(self, draw: Callable[[], Any], artifact: str) -> None:
        """Draw a figure and log it as a PNG artifact; warn if it cannot be drawn."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / Path(artifact).name

            def save() -> Path:
                draw().savefig(file)
                return file

            if _try_to_build(save, artifact):
                mlflow.log_artifact(str(file), str(Path(artifact).parent))

    def describe(self, text: str) -> None:
        """Set the Markdown text above the run in the MLflow UI."""
        mlflow.set_tag(MLFLOW_RUN_NOTE, text)

    def finish(self) -> None:
        """End the run as FINISHED."""
        _end_run("FINISHED")
        self.finished = True


def _try_to_build(build: Callable[[], Built], artifact: str) -> Built | None:
    """Return what `build` builds. A run is worth more than one of its pictures or tables: whatever
    goes wrong is a warning, too little memory included.
    """
    try:
        return build()
    except Exception as error:
        warn(f"left out: {artifact}: {first_line(error)}")
        return None


@contextmanager
def open_run(experiment: str, tags: Mapping[str, str], run_id: str | None = None) -> Iterator[Run]:
    """Yield a run that ends FINISHED, FAILED on an error, KILLED on Ctrl-C.

    Joins the run that `mlflow run` opened, or resumes `run_id`; else opens one in `experiment`. A
    name that the user gave to `mlflow run` stays.
    """
    with open_work():
        yield from _open_run(experiment, tags, run_id)


def _open_run(experiment: str, tags: Mapping[str, str], run_id: str | None) -> Iterator[Run]:
    quiet_mlflow()
    try:
        found = _start_run(experiment, run_id)
        run = Run(id=found.info.run_id)
        with short_timeouts(), store_lock():
            mlflow.set_tags(_keep_given_name(dict(tags), found.info.run_name))
            retry_once(lambda: set_up_experiment(found.info.experiment_id))
        yield run
    except BaseException as error:
        # whatever the store says now, that error is what the user must see
        with suppress(UserError), short_timeouts():
            _end_run("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        if isinstance(error, MlflowException | requests.RequestException | SQLAlchemyError):
            with explain_store_errors():
                raise
        with explain_s3_errors():
            raise
    if not run.finished:
        run.finish()


def _start_run(experiment: str, run_id: str | None) -> mlflow.ActiveRun:
    with explain_store_errors(), store_lock(), short_timeouts():
        # under `mlflow run` the experiment is chosen already, and choosing again is an error
        if "MLFLOW_RUN_ID" not in os.environ and run_id is None:
            mlflow.set_experiment(experiment)
        # MLflow adds its own tags only to a run that this process opens
        opens = run_id is None and "MLFLOW_RUN_ID" not in os.environ
        own = neutral_tags() if opens else None
        with defer_interrupts() as checkpoint:
            # stopped in the middle, the store would keep a run of which nobody here knows
            found = mlflow.start_run(run_id, log_system_metrics=True, tags=own)
            checkpoint()
    return found


def neutral_tags() -> dict[str, str]:
    """Return MLflow's tags for who runs what, without the login name and the program's path.

    The name of a user of the tracking server is known there, and stays.
    """
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or "unknown"
    return {MLFLOW_USER: user, MLFLOW_SOURCE_NAME: "har"}


def _keep_given_name(tags: dict[str, str], name: str | None) -> dict[str, str]:
    predicate, _, rest = (name or "").partition("-")
    noun, _, number = rest.partition("-")
    # MLflow calls a run without a name `bold-fox-123`
    random = predicate in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdigit()
    if name and not random:
        tags.pop(MLFLOW_RUN_NAME, None)
    return tags


def check_store() -> None:
    """Raise a UserError unless the tracking store answers within 20 seconds; change nothing."""
    quiet_mlflow()
    with explain_store_errors(), store_lock(), short_timeouts():
        mlflow.search_experiments(max_results=1)


def open_experiment(name: str) -> str:
    """Return the id of the experiment to record in, which is created and set up if need be.

    Under `mlflow run` that is the experiment of the run that it opened. Call this before long work:
    within 20 seconds it raises a UserError if the store does not answer or cannot be written.
    """
    quiet_mlflow()
    with explain_store_errors(), store_lock(), short_timeouts():
        if run_id := os.environ.get("MLFLOW_RUN_ID"):
            run = mlflow.get_run(run_id)
            experiment_id, location = run.info.experiment_id, run.info.artifact_uri
        else:
            experiment = mlflow.set_experiment(name)
            experiment_id, location = experiment.experiment_id, experiment.artifact_location
        check_files(str(location))
        now, client = str(int(time.time())), mlflow.MlflowClient()
        retry_once(lambda: client.set_experiment_tag(experiment_id, BEGUN_TAG, now))
        retry_once(lambda: set_up_experiment(experiment_id))
    return str(experiment_id)


def retry_once(write: Callable[[], None]) -> None:
    """Write, and once more if that failed: MLflow checks that a thing is missing and then creates
    it, so of two processes that do so at once, even on a server, one fails (mlflow 3.17).
    """
    began = time.monotonic()
    try:
        write()
    except MlflowException:
        # a store that did not answer at all will not answer now
        if time.monotonic() - began > RETRY_WITHIN_S:
            raise
        write()


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Make MLflow give up soon on a server that does not answer; by default it takes minutes.

    MLflow reads these variables of the whole process, so only the main thread may enter.
    """
    with set_variables(SHORT_TIMEOUTS):
        yield


@contextmanager
def explain_store_errors() -> Iterator[None]:
    """Turn MLflow's errors into a UserError that names the store."""
    try:
        yield
    except (MlflowException, OSError, SQLAlchemyError) as error:
        uri = mlflow.get_tracking_uri()
        hint = ""
        if uri.startswith("http") or is_database(uri):
            hint = OFFLINE_HINT
        raise UserError(
            f"the tracking store {uri} cannot be used: {first_line(error)}{hint}"
        ) from error


def _end_run(status: str) -> None:
    # a Ctrl-C meanwhile must not leave the run RUNNING
    with defer_interrupts(), explain_store_errors():
        mlflow.end_run(status)


def _make_harmless(record: logging.LogRecord) -> bool:
    record.msg, record.args = for_terminal(without_password(record.getMessage())), ()
    if record.name.startswith("mlflow"):
        # it logs a database's error with a stack trace, and raises it too
        record.exc_info = record.exc_text = None
    return True


def quiet_mlflow() -> None:
    """Silence what MLflow prints, except warnings that help our users."""
    # it prints an address with its password on stdout, where results go
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for handler in logging.getLogger("mlflow").handlers:
        # its warnings may show the server's address as given, and names from the store; adding a
        # filter again does nothing
        handler.addFilter(_make_harmless)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # our models hold no pickle, and another's pickle could run any code
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    for message in (
        "The specified dataset source can be interpreted in multiple ways",  # no matter which
        "Hint: Inferred schema contains integer column",  # a manifest's ids are never missing
        "An input example was not provided",  # the signature says it, and images are large
        "Add type hints to the `predict` method",  # the signature says it
    ):
        warnings.filterwarnings("ignore", rf"(?s).*{re.escape(message)}")
