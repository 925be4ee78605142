"""A training that its process cannot take along: what is needed to go on with it, on disk.

A backup is a folder named by the run, in the cache. `job.json` says what is trained, `data/` is the
prepared data's table, and `state.npz` is the state after an epoch, which replaces the one before it
only when it is on disk. It is gone when the training has ended well.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock, Timeout

from har.data.manifest import Manifest, write_manifest
from har.recipe import Recipe
from har.training.state import State
from har.util.errors import UserError, first_line
from har.util.files import cache_folder, replace_text, sync_folder
from har.util.progress import say, warn

JOB_FILE, DATA_FOLDER, STATE_FILE = "job.json", "data", "state.npz"
# The most of a training's time that its backups may take, and when the first one is made at the
# earliest: what is lost by doing it again is no more.
MAX_TIME_SHARE = 0.02
FIRST_AFTER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What was asked for, and by which recipe it is trained here."""

    variant: str
    requested: Recipe
    used: Recipe
    overridden: tuple[str, ...]
    runtime: str
    feature_runtime: str
    recipe_digest: str


@dataclass(kw_only=True)
class Backup:
    """Of one run, at work. `started` is when the training's command began, in seconds since the
    epoch, with the time of earlier processes taken off.
    """

    folder: Path
    started: float
    state: State | None = None
    saved: float = field(default_factory=time.monotonic)
    # before the first one is made: a guess, which puts that one off
    cost_s: float = MAX_TIME_SHARE * FIRST_AFTER_S
    announced: bool = False
    # takes the state after the last epoch, once that is done
    ended: Callable[[], State] | None = None

    def save(self, take: Callable[[], State], last: bool) -> None:
        """Write the state, unless that would take more than its share of the time; after the last
        epoch, unless all that is left goes well.
        """
        if last:
            self.ended = take
            return
        began = time.monotonic()
        if self.cost_s > MAX_TIME_SHARE * (began - self.saved):
            return
        self.write(take)
        self.saved = time.monotonic()
        self.cost_s = self.saved - began

    def write(self, take: Callable[[], State]) -> None:
        """Write the state; a disk that refuses ends no training."""
        try:
            size = write_state(self.folder, take(), time.time() - self.started)
        except OSError as error:
            warn(f"no backup: {first_line(error)}; a training that is cut short starts again")
            return
        if not self.announced:
            say(f"backup to resume from: {size / 1e6:,.1f} MB in {self.folder}")
            self.announced = True

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Around the training: what is left by an error or Ctrl-C after the last epoch is in the
        backup; of a mistake before anything was done there is none.
        """
        try:
            yield
        except BaseException as error:
            self.write_last()
            if isinstance(error, UserError) and not (self.folder / STATE_FILE).exists():
                delete_backup(self.folder.name)
            raise

    def write_last(self) -> None:
        """The state after the last epoch, if that is done and it is not written yet."""
        if self.ended:
            self.write(self.ended)
            self.ended = None


def backup_folder(run_id: str) -> Path:
    """Where a run's backup lies, if it has one."""
    return cache_folder() / "trainings" / run_id


@contextmanager
def open_backup(run_id: str, job: Job, manifest: Manifest, started: float) -> Iterator[Backup]:
    """A run's backup, with the state it has, while it is trained; deleted after the end of the
    block, unless that is left by an error.

    Raises:
        UserError: it is being trained by another process, or the state cannot be read.
    """
    folder = backup_folder(run_id)
    with training_lock(folder):
        folder.mkdir(exist_ok=True)
        state, wall_s = read_state(folder)
        write_manifest(manifest, folder / DATA_FOLDER)
        try:
            # last: with it the backup can be gone on from
            replace_text(folder / JOB_FILE, json.dumps(asdict(job)))
        except OSError as error:
            raise UserError(f"no backup can be made in {folder}: {first_line(error)}") from error
        backup = Backup(folder=folder, started=started - wall_s, state=state)
        try:
            yield backup
        except BaseException:
            backup.write_last()
            raise
        delete_backup(run_id)


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Held by the process that trains; freed when it ends, however."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # one for the whole process: who holds it may enter again
    lock = FileLock(f"{folder}.lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"run {folder.name} is being trained by another process") from error
    try:
        yield
    finally:
        lock.release()
        if not folder.exists():
            Path(lock.lock_file).unlink(missing_ok=True)


def list_backups() -> list[str]:
    """The runs that have one, by their ids."""
    return sorted(each.parent.name for each in backup_folder("-").parent.glob(f"*/{JOB_FILE}"))


def delete_backup(run_id: str) -> None:
    """Delete a run's backup."""
    shutil.rmtree(backup_folder(run_id), ignore_errors=True)


def describe_backups() -> list[str]:
    """A line for each, with its size; none where there is none."""
    lines = [_describe_backup(run_id) for run_id in list_backups()]
    head = (
        f"{backup_folder('-').parent}: backups of trainings: {len(lines)}; delete those you give up"
    )
    return [head, *lines] if lines else []


def _describe_backup(run_id: str) -> str:
    """How large it is, and how its training goes on."""
    folder, size = backup_folder(run_id), 0
    for each in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a training at work replaces its state
            size += each.stat().st_size
    state = (
        "at work" if is_training(run_id) else f"cut short; to resume: har train --resume {run_id}"
    )
    return f"{run_id}  {size / 1e6:>9,.1f} MB  {state}"


def is_training(run_id: str) -> bool:
    """Whether a process is training it."""
    try:
        with training_lock(backup_folder(run_id)):
            return False
    except UserError:
        return True


def read_job(run_id: str) -> tuple[Job, Path]:
    """What a run was to train, and the folder of its prepared data.

    Raises:
        UserError: there is no backup of it here, or it cannot be read.
    """
    folder = backup_folder(run_id)
    if not (folder / JOB_FILE).is_file():
        raise UserError(
            f"cannot resume run {run_id}: no backup in {folder}; a training has one until it"
            f" finishes. There are backups of: {', '.join(list_backups()) or 'none'}"
        )
    try:
        text: dict[str, Any] = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        text |= {name: Recipe(**text[name]) for name in ("requested", "used")}
        # "typed" is what an older version called it
        overridden = text.pop("typed" if "typed" in text else "overridden")
        return Job(**text, overridden=tuple(overridden)), folder / DATA_FOLDER
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / JOB_FILE} cannot be read: {first_line(error)}") from error


def write_state(folder: Path, state: State, wall_s: float) -> int:
    """Replace the state by this one, once it is safe on disk; its size in bytes."""
    about = {name: value for name, value in vars(state).items() if name != "arrays"}
    text = json.dumps(about | {"wall_s": wall_s}).encode()
    beside = folder / f".{STATE_FILE}"
    try:
        with beside.open("wb") as file:
            np.savez(file, about=np.frombuffer(text, np.uint8), **state.arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(beside, folder / STATE_FILE)
    except BaseException:
        # what a full disk has taken of it would keep the disk full
        beside.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    return size


def read_state(folder: Path) -> tuple[State | None, float]:
    """The state and the seconds of wall time up to it; None and 0 where there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / STATE_FILE
    if not file.exists():
        return None, 0.0
    try:
        # arrays alone: a pickle in the file is an error
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        about = json.loads(arrays.pop("about").tobytes())
        wall_s = float(about.pop("wall_s"))
        return State(**about, arrays=arrays), wall_s
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(
            f"{file} is damaged: {first_line(error)}; delete it to train this run from its first"
            " epoch on"
        ) from error
