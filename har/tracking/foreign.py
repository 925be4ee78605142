"""Stores that others made, opened to read runs from: an archive, a folder with an `mlflow.db` and
its `mlruns/`, or a tracking server.

Nothing in them is believed. A database is copied and checked before MLflow reads it; the paths that
it holds are not used, since they are another machine's: artifacts are found by the ids of their
runs and models. Artifacts are data: nothing here runs or unpickles them.
"""

import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.uri import get_uri_scheme

from har.tracking.artifacts import download_all, list_all
from har.util.archives import is_archive, unpack
from har.util.errors import UserError, first_line, without_password
from har.util.files import digest_file, read_regular_file
from har.util.progress import say

DATABASE, ARTIFACTS, DIGESTS_FILE = "mlflow.db", "mlruns", "digests.json"
# What SQLite leaves beside a database in which a program was killed while it wrote.
JOURNAL = f"{DATABASE}-journal"
# Where a tracking server may say that its files are: never on this machine.
SCHEMES = ("mlflow-artifacts", "s3", "gs", "wasbs", "abfss")
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
MAX_DATABASE_BYTES = 20_000_000_000
MAX_DIGESTS_BYTES = 100_000_000
MAX_ROWS, MAX_CELL = 50_000_000, 50_000_000
# For checking a database; one may be built to be read for ever. A look is after so many of SQLite's
# own steps.
CHECK_TIMEOUT_S, STEPS_BETWEEN_LOOKS = 600, 1_000_000
# MLflow's own table with a computed column; runs need no row of it.
UNREAD_TABLE = "spans"
# Folders below the one that is named, in which a database is looked for.
MAX_DEPTH = 6
MAX_ENTRIES = 1_000_000
ID = re.compile("[0-9a-f]{32}|m-[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class ForeignStore:
    """A store to read runs from.

    `name` is what the user called it, without a password. Of a run or a logged model,
    `list_files` maps the artifacts to their sizes, and `open_files` yields their folder, None if
    there are none.
    """

    name: str
    client: mlflow.MlflowClient
    list_files: Callable[[Any], dict[str, int]]
    open_files: Callable[[Any], AbstractContextManager[Path | None]]


@contextmanager
def open_store(source: str) -> Iterator[ForeignStore]:
    """Open an archive, a folder, a database or the URI of a tracking store.

    Raises:
        UserError: there is nothing to read, or what is there is damaged or no MLflow store.
    """
    if source.startswith(("http://", "https://")):
        yield _open_server(source)
        return
    path = Path(source.removeprefix("sqlite:///")).expanduser()
    with TemporaryDirectory() as scratch:
        if path.is_dir():
            database = _find_database(source, path)
        elif is_archive(path):
            root = Path(scratch) / "files"
            root.mkdir()
            unpack(path, root, _is_wanted)
            _check_digests(path, root)
            database = _find_database(source, root)
        elif path.is_file():
            database = path
        else:
            raise UserError(
                f"nothing to import from {source}: give a file of `har export-runs`, a folder or an"
                f" archive that holds {DATABASE}, or the address of a tracking server"
            )
        client = _open_database(database, Path(scratch))
        folders = _find_folders(database.parent)
        yield _open_folders(source, path.resolve().name, client, folders)


def _is_wanted(path: PurePosixPath) -> bool:
    """Of an archive, take the database, what MLflow keeps beside it, and the digests."""
    known = (DATABASE, f"{DATABASE}-wal", JOURNAL, DIGESTS_FILE)
    return path.name in known or ARTIFACTS in path.parts[:-1]


def write_digests(root: Path) -> None:
    """Write the digest of each file below `root` beside them."""
    found = {str(path.relative_to(root)): digest_file(path) for path in _list_files(root)}
    (root / DIGESTS_FILE).write_text(json.dumps(found, indent=1, sort_keys=True))


def _check_digests(archive: Path, root: Path) -> None:
    """Compare the files with the digests that an export holds; other archives hold none."""
    file = root / DIGESTS_FILE
    if not file.exists():
        return
    try:
        expected = json.loads(read_regular_file(file, MAX_DIGESTS_BYTES))
        found = {
            str(path.relative_to(root)): digest_file(path)
            for path in _list_files(root)
            if path != file
        }
        differing = sorted(set(found.items()) ^ set(expected.items()))
    except (ValueError, OSError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{archive} is damaged: {first_line(error)}") from error
    if differing:
        raise UserError(
            f"{archive} is damaged or was changed: {differing[0][0][:200]} is not the file that was"
            " exported"
        )


def _list_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (folder, names of folders, names of files), never through links."""
    entries = 0
    for folder, folders, files in os.walk(root):
        entries += len(folders) + len(files)
        if entries > MAX_ENTRIES:
            raise UserError(f"{root} holds more than {MAX_ENTRIES:,} files and folders")
        yield Path(folder), folders, files


def _find_database(source: str, root: Path) -> Path:
    """Find the only database in a folder."""
    found: list[Path] = []
    for folder, folders, files in _walk(root):
        if len(folder.relative_to(root).parts) >= MAX_DEPTH or DATABASE in files:
            # runs lie beside it; theirs may hold whatever they like
            folders.clear()
        found += [folder / DATABASE] if DATABASE in files else []
    if len(found) == 1:
        return found[0]
    if found:
        named = ", ".join(str(path.relative_to(root)) for path in found[:5])
        raise UserError(f"{source} holds {len(found)} stores; give the folder of one: {named}")
    if any(root.glob(f"{ARTIFACTS}/*/meta.yaml")):
        raise UserError(
            f"{source} is a store of files, which MLflow {mlflow.__version__} does not read: there,"
            f" `mlflow migrate-filestore --source {ARTIFACTS} --target sqlite:///{DATABASE}` makes"
            f" it one with {DATABASE}"
        )
    raise UserError(f"{source} holds no {DATABASE}: it is no MLflow store")


def _find_folders(root: Path) -> dict[str, Path]:
    """Map the ids of runs and models to the folders of their artifacts below `root`."""
    found: dict[str, Path] = {}
    usual = root / ARTIFACTS
    if usual.is_symlink():
        raise UserError(f"{usual} is a link: it is not followed")
    for folder, folders, _ in _walk(usual if usual.exists() else root):
        if links := [each for each in folders if (folder / each).is_symlink()]:
            raise UserError(f"{folder / links[0]} is a link: it is not followed")
        if ID.fullmatch(folder.name) and "artifacts" in folders:
            found.setdefault(folder.name, folder / "artifacts")
            folders.clear()
    return found


def _open_folders(
    source: str, name: str, client: mlflow.MlflowClient, folders: dict[str, Path]
) -> ForeignStore:
    def list_files(entity: Any) -> dict[str, int]:
        folder = folders.get(find_id(entity))
        if folder is None:
            return {}
        sizes = {}
        for each in folder.rglob("*"):
            if each.is_symlink() or not (each.is_file() or each.is_dir()):
                raise UserError(f"{source} cannot be imported: {each} is a link or a device")
            if each.is_file():
                sizes[str(each.relative_to(folder))] = each.stat().st_size
        return sizes

    @contextmanager
    def open_files(entity: Any) -> Iterator[Path | None]:
        yield folders.get(find_id(entity))

    return ForeignStore(name=name, client=client, list_files=list_files, open_files=open_files)


def open_own_store() -> ForeignStore:
    """Open the tracking store in use, whose paths are this machine's."""

    def find_repository(entity: Any) -> Any:
        return get_artifact_repository(_find_location(entity))

    return ForeignStore(
        name=without_password(mlflow.get_tracking_uri()),
        client=mlflow.MlflowClient(),
        list_files=lambda entity: list_all(find_repository(entity)),
        open_files=lambda entity: _download(find_repository(entity)),
    )


@contextmanager
def _download(repository: Any) -> Iterator[Path | None]:
    """Yield the folder of a repository on this machine, else one with all its files."""
    if isinstance(repository, LocalArtifactRepository):
        folder = Path(repository.artifact_dir)
        yield folder if folder.is_dir() else None
        return
    with TemporaryDirectory() as scratch:
        download_all(repository, Path(scratch))
        yield Path(scratch)


def _open_server(uri: str) -> ForeignStore:
    def find_repository(entity: Any) -> Any:
        where = _find_location(entity)
        scheme, host = get_uri_scheme(where), urlsplit(where).netloc
        if scheme not in SCHEMES or (scheme == "mlflow-artifacts" and host):
            raise UserError(
                f"{without_password(uri)} keeps its files where they cannot be read from here"
                f" ({scheme or 'a folder'}): import its folder there, or start the server with"
                " --serve-artifacts"
            )
        return get_artifact_repository(where, tracking_uri=uri)

    return ForeignStore(
        name=without_password(uri),
        client=mlflow.MlflowClient(tracking_uri=uri),
        list_files=lambda entity: list_all(find_repository(entity)),
        open_files=lambda entity: _download_apart(uri, lambda: find_repository(entity)),
    )


@contextmanager
def _download_apart(uri: str, find_repository: Callable[[], Any]) -> Iterator[Path | None]:
    with TemporaryDirectory() as scratch:
        with without_credentials(uri):
            download_all(find_repository(), Path(scratch))
        yield Path(scratch)


@contextmanager
def without_credentials(source: str) -> Iterator[None]:
    """Keep the password of the store in use from another server, to which MLflow would send it."""
    own = urlsplit(mlflow.get_tracking_uri()).netloc
    foreign = source.startswith("http") and urlsplit(source).netloc != own
    before = {name: os.environ.pop(name) for name in CREDENTIALS if foreign and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _find_location(entity: Any) -> str:
    return str(getattr(entity, "artifact_location", None) or entity.info.artifact_uri)


def find_id(entity: Any) -> str:
    """Return the id of a run or a logged model."""
    return str(entity.info.run_id if hasattr(entity, "info") else entity.model_id)


def _open_database(database: Path, scratch: Path) -> mlflow.MlflowClient:
    """Copy a database, bring the copy up to date if need be, and open it."""
    copy = scratch / DATABASE
    try:
        journal = database.with_name(database.name + "-journal")
        if journal.exists() and journal.stat().st_size:
            raise ValueError("a program was writing it: open it once where it lies, by `har ui`")
        if database.is_symlink() or database.stat().st_size > MAX_DATABASE_BYTES:
            raise ValueError(f"it is a link, or larger than {MAX_DATABASE_BYTES:,} bytes")
        for suffix in ("", "-wal"):
            # what a program that was killed has written last
            if (file := database.with_name(database.name + suffix)).is_file():
                shutil.copyfile(file, f"{copy}{suffix}", follow_symlinks=False)
        with closing(sqlite3.connect(copy)) as connection:
            revision = _check_database(connection)
        _upgrade(database, copy, revision)
        # MLflow creates a folder for artifacts in the working folder
        with chdir(scratch):
            client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{copy}")
            client.search_experiments(max_results=1)
    except UserError:
        raise
    # a hostile database may make SQLAlchemy and MLflow raise anything
    except Exception as error:
        raise UserError(
            f"{database} is no MLflow database, or a damaged one: {first_line(error)}"
        ) from error
    return client


def _check_database(connection: sqlite3.Connection) -> str:
    """Check that reading the database runs none of its code, and that its rows are of a possible
    size; return the revision of its tables.
    """
    # also Ctrl-C ends a statement only here
    deadline = time.monotonic() + CHECK_TIMEOUT_S
    connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS_BETWEEN_LOOKS)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA ignore_check_constraints = ON")
    tables: list[str] = []
    for _, name, kind, *_ in connection.execute("PRAGMA main.table_list").fetchall():
        columns = connection.execute(f"PRAGMA table_xinfo({_quote(name)})").fetchall()
        # the last value of a column is 2 or 3 if it is computed
        computed = name != UNREAD_TABLE and any(row[6] in (2, 3) for row in columns)
        if kind not in ("table", "shadow") or computed:
            raise ValueError(f"{kind} {name!r} is computed when it is read")
        if not name.startswith("sqlite_"):
            tables.append(name)
    # pages that lead to one another in circles would be read for ever
    if (problem := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise ValueError(problem)
    # the copy is only read
    triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")
    for (name,) in triggers.fetchall():
        connection.execute(f"DROP TRIGGER {_quote(name)}")
    connection.commit()
    for table in tables:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({_quote(table)})")]
        sizes = "".join(f", max(length({_quote(column)}))" for column in columns)
        rows, *longest = connection.execute(
            f"SELECT count(*){sizes} FROM {_quote(table)}"
        ).fetchone()
        if rows > MAX_ROWS or any((size or 0) > MAX_CELL for size in longest):
            raise ValueError(f"its table {table} is too large")
    (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(revision)


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _upgrade(database: Path, copy: Path, revision: str) -> None:
    """Bring the tables to the form that this MLflow reads."""
    # loads for a second
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, _upgrade_db
    from sqlalchemy import create_engine

    script = ScriptDirectory.from_config(_get_alembic_config(""))
    if revision not in {each.revision for each in script.walk_revisions()}:
        raise UserError(
            f"{database} was written by a newer MLflow than {mlflow.__version__} (its tables are of"
            f" revision {revision[:40]!r}): import it where that version is installed"
        )
    if revision != script.get_current_head():
        say(f"{database.name} is of an older MLflow: a copy is brought up to date")
        _upgrade_db(create_engine(f"sqlite:///{copy}"))
