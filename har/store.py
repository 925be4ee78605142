"""The MLflow store: runs that always end, parameters logged once, quiet loggers.

Works inside `mlflow run`, which opens the run and logs the typed parameters before our code
starts, and without it; on the default sqlite store and on an http server.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from har.errors import UserError
from har.interrupts import interrupts_at_checkpoints
from har.ui import set_up_experiment


@contextmanager
def open_run(experiment: str, tags: Mapping[str, str]) -> Iterator[str]:
    """Yield the id of a run that ends FINISHED, FAILED on an error, KILLED on Ctrl-C.

    Joins the run that `mlflow run` opened; else opens one in `experiment`.

    Raises:
        UserError: the tracking store cannot be used.
    """
    quiet_mlflow()
    try:
        # under `mlflow run` the experiment is chosen already, and choosing again is an error
        if "MLFLOW_RUN_ID" not in os.environ:
            mlflow.set_experiment(experiment)
        run = mlflow.start_run(log_system_metrics=True)
    except (MlflowException, OSError) as error:
        uri = without_password(mlflow.get_tracking_uri())
        raise UserError(f"the tracking store {uri} cannot be used: {error}") from error
    try:
        mlflow.set_tags(dict(tags))
        set_up_experiment(run.info.experiment_id)
        yield run.info.run_id
    except KeyboardInterrupt:
        end_run("KILLED")
        raise
    except BaseException:
        end_run("FAILED")
        raise
    end_run("FINISHED")


def end_run(status: str) -> None:
    """End the active run; a Ctrl-C meanwhile cannot leave it RUNNING for ever."""
    with interrupts_at_checkpoints():
        mlflow.end_run(status)


def without_password(uri: str) -> str:
    """The URI as it may be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


def quiet_mlflow() -> None:
    """MLflow's news off; its warnings stay, but for those about what is meant as it is."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
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


def log_table_file(table: Any, artifact: str) -> None:
    """A table as a CSV artifact."""
    mlflow.log_text(table.to_csv(index=False), artifact)


def set_description(text: str) -> None:
    """Shown above the run in the MLflow UI, as Markdown."""
    mlflow.set_tag(MLFLOW_RUN_NOTE, text)
