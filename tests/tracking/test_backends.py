"""Stores in PostgreSQL and files on S3: what is said when they or their packages are not there."""

import builtins
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.artifact import s3_artifact_repo
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from har.tracking.artifacts import list_all
from har.tracking.backends import (
    POSTGRES_PACKAGE,
    S3_PACKAGE,
    check_files,
    explain_s3_errors,
    open_database,
)
from har.tracking.local_store import store_lock
from har.util.errors import UserError
from tests.fixtures import free_port, tracking_to

URI = "postgresql://ana:confidential@127.0.0.1:1/har"


def forbid_import(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no package of that name were installed."""
    importing = builtins.__import__

    def look(name: str, *rest: Any, **named: Any) -> Any:
        # from . import psycopg  is one of SQLAlchemy's own
        relative = (rest[3:] or (named.get("level", 0),))[0]
        if name.startswith(start) and not relative:
            raise ModuleNotFoundError(f"no module {name!r}", name=name.partition(".")[0])
        return importing(name, *rest, **named)

    for name in [each for each in sys.modules if each.startswith(start)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", look)


def test_the_messages_name_the_extras() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["postgres"] == [POSTGRES_PACKAGE] and extras["s3"] == [S3_PACKAGE]


@pytest.mark.parametrize(
    "uri", ["sqlite:///mlflow.db", "http://localhost", "./mlruns", "databricks"]
)
def test_other_stores_are_not_looked_at(uri: str) -> None:
    open_database(uri)
    check_files(uri)


@pytest.mark.parametrize(
    ("uri", "package"),
    [(URI, POSTGRES_PACKAGE), (URI.replace("postgresql", "postgresql+psycopg2"), "psycopg2")],
)
def test_a_missing_driver_is_one_line(
    uri: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_import("psycopg", monkeypatch)
    with tracking_to(uri), pytest.raises(UserError) as error, store_lock():
        pass
    assert str(error.value).endswith(f"pip install '{package}'")
    assert "confidential" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://ana:confidential@127.0.0.1:{port}/har",
        "postgresql://ana:confidential@127.0.0.1:port/har",
        "postgresql://ana:confid/ential@127.0.0.1:1/har",
        "postgresql://ana:confid@ential:x@127.0.0.1:1/har",
        "postgresql:confidential",
        "postgres://ana:confidential@127.0.0.1/har",
    ],
)
def test_a_database_that_cannot_be_used_is_one_line_without_a_password(uri: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(UserError) as error:
        open_database(uri.replace("{port}", str(free_port())))
    assert "\n" not in str(error.value) and "postgresql://" in str(error.value)
    assert "confid" not in str(error.value).replace("postgresql:confidential", "")


def test_files_on_s3_need_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    forbid_import("boto", monkeypatch)
    for use in (
        lambda: check_files("s3://bucket/runs"),
        lambda: list_all(get_artifact_repository("s3://bucket/runs")),
    ):
        with pytest.raises(UserError, match="files on S3 need the package boto3: pip install"):
            use()


def test_files_that_cannot_be_reached_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ana")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "confidential")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="s3://bucket/runs cannot be reached") as error:
        check_files("s3://bucket/runs")
    assert "confidential" not in str(error.value) and "\n" not in str(error.value)


def test_errors_of_boto3_are_those_of_files() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    with pytest.raises(OSError, match="redentials"), explain_s3_errors():
        raise botocore.NoCredentialsError()
    with pytest.raises(KeyError), explain_s3_errors():
        raise KeyError("mine")
