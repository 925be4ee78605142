"""Artifacts read back from a store, which others may have written: nothing in it is believed.

Sizes are compared with limits before a file is read or downloaded, and only regular files inside a
run's or a model's own folder are read. Whatever is wrong is a ValueError or an OSError.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository

from har.tracking.backends import explain_s3_errors
from har.util.files import read_regular_file
from har.util.json_text import parse_json

# Recipes and histories have kilobytes. The history of 100,000 epochs has 30 MB.
MAX_JSON_BYTES = 50_000_000
# Files that a model consists of, and their bytes together: EfficientNetB7 has half a gigabyte.
MAX_MODEL_FILES = 100
MAX_MODEL_BYTES = 4_000_000_000
# Files that a run consists of: ours have about thirty.
MAX_RUN_FILES = 10_000


@explain_s3_errors()
def read_artifact(run_id: str, path: str, limit: int) -> bytes:
    """Read an artifact of a run, of at most `limit` bytes."""
    repository = get_artifact_repository(mlflow.get_run(run_id).info.artifact_uri)
    if isinstance(repository, LocalArtifactRepository):
        return _read_inside(Path(repository.artifact_dir), path, limit)
    with TemporaryDirectory() as scratch:
        _check_sizes(repository, [path], limit)
        with _limit_file_size(limit):
            repository.download_artifacts(path, scratch)
        return _read_inside(Path(scratch), path, limit)


def read_json_artifact(run_id: str, path: str) -> Any:
    """Read an artifact of a run as JSON."""
    return parse_json(read_artifact(run_id, path, MAX_JSON_BYTES))


@contextmanager
def open_model(uri: str, parts: tuple[str, ...]) -> Iterator[Path]:
    """Yield a folder with those files and folders of a logged model that `parts` names.

    A model on this machine is read where it lies; another is downloaded.
    """
    repository: Any = _find_repository(uri)
    if isinstance(repository, LocalArtifactRepository):
        yield Path(repository.artifact_dir)
        return
    with TemporaryDirectory() as scratch:
        _download(repository, parts, Path(scratch))
        yield Path(scratch)


@explain_s3_errors()
def _download(repository: Any, parts: tuple[str, ...], folder: Path) -> None:
    files = [each for part in parts for each in _list_files(repository, part)]
    _check_sizes(repository, files, MAX_MODEL_BYTES)
    with _limit_file_size(MAX_MODEL_BYTES):
        for each in files:
            repository.download_artifacts(each, str(folder))


@explain_s3_errors()
def list_all(repository: Any) -> dict[str, int]:
    """Map every file of a repository to its announced size; all lie inside the repository."""
    sizes: dict[str, int] = {}
    folders, seen = [""], 0
    while folders:
        for each in repository.list_artifacts(folders.pop() or None):
            seen += 1
            path = PurePosixPath(each.path)
            if path.is_absolute() or ".." in path.parts or "\\" in each.path:
                raise ValueError(f"{each.path[:200]!r} would lie outside of its folder")
            if each.path in sizes or seen > MAX_RUN_FILES:
                raise ValueError(f"it comes twice, or there are more than {MAX_RUN_FILES:,} files")
            if each.is_dir:
                folders.append(each.path)
            else:
                sizes[each.path] = max(each.file_size or 0, 0)
    if (size := sum(sizes.values())) > MAX_MODEL_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MAX_MODEL_BYTES:,}")
    return sizes


@explain_s3_errors()
def download_all(repository: Any, folder: Path) -> None:
    """Download every file of a repository into `folder`, in which it comes to lie."""
    for name, size in list_all(repository).items():
        with _limit_file_size(max(size, 1)):
            repository.download_artifacts(name, str(folder))
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found:,} bytes, not the announced {size:,}")


def _find_repository(uri: str) -> Any:
    """The repository in which a model's files really lie, behind all names that MLflow has."""
    if uri.startswith("runs:/"):
        uri = _find_logged_model(uri) or uri
    repository: Any = get_artifact_repository(uri)
    # an alias names a version, a version names a logged model, and that names a folder
    while isinstance(repository, ModelsArtifactRepository | RunsArtifactRepository):
        repository = repository.repo
    return repository


def _find_logged_model(uri: str) -> str | None:
    run_id, name = RunsArtifactRepository.parse_runs_uri(uri)
    experiment_id = mlflow.get_run(run_id).info.experiment_id
    found: list[Any] = mlflow.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{run_id}'", output_format="list"
    )
    named = [each for each in found if each.name == name]
    newest = max(named, key=lambda each: each.creation_timestamp, default=None)
    return f"models:/{newest.model_id}" if newest else None


def _read_inside(folder: Path, path: str, limit: int) -> bytes:
    file = folder / path
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link out of its folder")
    return read_regular_file(file, limit)


def _list_files(repository: Any, part: str) -> list[str]:
    """The file `part`, or the files in the folder `part`; a classifier has no folders in it."""
    inside = repository.list_artifacts(part)
    if len(inside) > MAX_MODEL_FILES:
        raise ValueError(f"{part} has {len(inside):,} files, more than {MAX_MODEL_FILES}")
    return [each.path for each in inside if not each.is_dir] or [part]


def _check_sizes(repository: Any, paths: list[str], limit: int) -> None:
    """Raise an error if a file is missing, or the announced sizes are more than `limit` bytes."""
    sizes: dict[str, int] = {}
    for folder in dict.fromkeys(str(Path(path).parent) for path in paths):
        for each in repository.list_artifacts("" if folder == "." else folder):
            sizes[each.path] = each.file_size or 0
    if missing := [path for path in paths if path not in sizes]:
        raise FileNotFoundError(f"there is no {missing[0]}")
    if (size := sum(sizes[path] for path in paths)) > limit:
        raise ValueError(f"{paths[0]}: {size:,} bytes, more than {limit:,}")


@contextmanager
def _limit_file_size(limit: int) -> Iterator[None]:
    """Make writing more than `limit` bytes to a file an OSError in this process: a server may send
    more than it announced.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = limit if before[0] == resource.RLIM_INFINITY else min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What reading an artifact may raise.
UNREADABLE = (MlflowException, OSError, ValueError, KeyError, TypeError, AttributeError)
