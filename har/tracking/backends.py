"""PostgreSQL and S3, where runs and their files may be kept: are their packages installed, and do
they answer?

By itself MLflow tries for minutes to reach a database that is not there, and finds out about S3
only when a training logs its first file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from har.util.errors import UserError, first_line, without_password
from har.util.outputs import LOCAL_STORE

# The extras `postgres` and `s3` of pyproject.toml.
POSTGRES_PACKAGE, S3_PACKAGE = "psycopg[binary]>=3.2,<4", "boto3>=1.40,<2"
ANSWER_WITHIN_S, CREATED_WITHIN_S = 7, 120
# Any number that others are unlikely to lock in the same database.
LOCK = 7_236_114_405
OFFLINE_HINT = f"; --offline or MLFLOW_TRACKING_URI={LOCAL_STORE} records on this machine"
# The classes of boto3's errors have no base but Exception; some are made while it runs.
S3_MODULES = ("boto3", "botocore", "s3transfer")


def is_database(uri: str) -> bool:
    """Return whether the URI names a PostgreSQL database."""
    return uri.startswith(("postgresql:", "postgresql+"))


@cache
def open_database(uri: str) -> None:
    """If `uri` is a PostgreSQL database, create MLflow's tables in it, unless they are there.

    Of several machines that find them missing, one creates them: two at once would both fail.

    Raises:
        UserError: its driver is not installed, or it does not answer.
    """
    if uri.startswith("postgres:"):
        raise UserError(f"{uri}: begin the address with postgresql://")
    if not is_database(uri):
        return
    name = _without_user(uri)
    try:
        driver = make_url(uri).get_driver_name()
    except (SQLAlchemyError, ValueError):
        # the error would show a part of the password
        raise UserError(
            f"{name} is no address of a database, such as postgresql://HOST/NAME: in the user and"
            " the password write special characters as %40 (for @), %2F (for /) and so on"
        ) from None
    # only these two know this option
    limit = {"connect_timeout": ANSWER_WITHIN_S} if driver.startswith("psycopg") else {}
    try:
        with create_engine(uri, poolclass=NullPool, connect_args=limit).connect() as connection:
            connection.execute(text(f"SET lock_timeout = '{CREATED_WITHIN_S}s'"))
            # until the connection ends
            connection.execute(text(f"SELECT pg_advisory_lock({LOCK})"))
            MlflowClient(uri).search_experiments(max_results=1)
    except ImportError as error:
        package = POSTGRES_PACKAGE if driver == "psycopg" else driver
        raise UserError(
            f"runs in PostgreSQL need the package {driver}: pip install '{package}'"
        ) from error
    except (SQLAlchemyError, MlflowException, OSError) as error:
        raise UserError(
            f"the tracking store {name} cannot be used: {first_line(error)}{OFFLINE_HINT}"
        ) from error


def _without_user(uri: str) -> str:
    """Return the scheme and the host of an address, also of one that cannot be taken apart."""
    scheme, _, rest = without_password(uri).partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def check_files(location: str) -> None:
    """Raise a UserError unless the files at `location` can be reached, if that is on S3."""
    if not location.startswith("s3:"):
        return
    try:
        with explain_s3_errors():
            get_artifact_repository(location).list_artifacts()
    except (MlflowException, OSError) as error:
        raise UserError(
            f"the files at {location} cannot be reached: {first_line(error)}; look at"
            " AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and MLFLOW_S3_ENDPOINT_URL, and that the"
            " bucket exists"
        ) from error


@contextmanager
def explain_s3_errors() -> Iterator[None]:
    """Turn errors of boto3 into an OSError, since S3 is one more place of files.

    Raises:
        UserError: boto3 is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in S3_MODULES:
            raise
        raise UserError(
            f"files on S3 need the package boto3: pip install '{S3_PACKAGE}'"
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in S3_MODULES:
            raise
        raise OSError(first_line(error)) from error
