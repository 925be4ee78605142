"""A store on this machine: created whole, used by one process at a time, and checked."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import mlflow
from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import get_uri_scheme

from har.tracking.backends import open_database
from har.tracking.ui import find_sqlite_file
from har.util.errors import UserError
from har.util.files import cache_folder
from har.util.locks import file_lock
from har.util.outputs import LOCAL_STORE
from har.util.process import format_program
from har.util.signals import open_work


@contextmanager
def store_lock() -> Iterator[None]:
    """Let one process of this machine at a time create things in a local store; create the store
    itself if need be.

    If two processes create a sqlite store or an experiment at once, neither can use it (mlflow
    3.17). A server serialises its clients itself; PostgreSQL needs this only while its tables are
    created, for which `open_database` has a lock that other machines see.

    Raises:
        UserError: the store is a folder of files, a file that is no database, or a database that
            does not answer.
    """
    if mlflow.get_tracking_uri().startswith("http"):
        yield
        return
    _check_local_store()
    open_database(mlflow.get_tracking_uri())
    with file_lock(cache_folder() / "store.lock", reentrant=True):
        _create_database()
        yield


def _check_local_store() -> None:
    """Raise a UserError if the store is one of files, which MLflow refuses at length, or if the
    sqlite store is something else: MLflow would try it for minutes.
    """
    uri = mlflow.get_tracking_uri()
    is_folder = uri != "databricks" and get_uri_scheme(uri) in ("", "file")
    if is_folder and not MLFLOW_ALLOW_FILE_STORE.get():
        raise UserError(_explain_file_store(Path(local_file_uri_to_path(uri)).absolute()))
    file = find_sqlite_file(uri)
    if file is None or not file.exists():
        return
    # MLflow fills an empty file
    if file.is_dir() or _read_start(file) not in (b"", b"SQLite format 3\0"):
        raise UserError(
            f"{file} is not an MLflow database: move it away, or set MLFLOW_TRACKING_URI to another"
            " one"
        )


def _explain_file_store(folder: Path) -> str:
    """Describe how to record without the old store, and how to copy its runs."""
    message = (
        f"the tracking store {folder} is a folder of files, which MLflow {mlflow.__version__} does"
        " not use any more: add --offline to use mlflow.db in the working folder"
    )
    if not folder.is_dir():
        return message
    command = f"{format_program('mlflow')} migrate-filestore --source {shlex.quote(str(folder))}"
    if Path("mlflow.db").exists():
        # the command would replace it
        uri = "sqlite:///migrated.db"
        return (
            f"{message}; or copy the old runs into a new store, {command} --target {uri}, and set"
            f" MLFLOW_TRACKING_URI={uri}"
        )
    return f"{message}; this first copies the old runs into it: {command} --target {LOCAL_STORE}"


def _create_database() -> None:
    """Create a sqlite store under another name first: one that was interrupted, or killed, halfway
    could not be used again (mlflow 3.17).
    """
    file = find_sqlite_file(mlflow.get_tracking_uri())
    if file is None or file.exists() or not file.parent.is_dir():
        return
    unfinished = file.with_name(f".{file.name}.{uuid4().hex}")
    with open_work():
        try:
            client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{unfinished}")
            client.search_experiments(max_results=1)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)


def _read_start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(16)
