"""Backups: what a training needs to be resumed after its process ended.

A backup is a folder in the cache, named by the run's id. `job.json` says what is trained, `data/`
holds the manifest, and `state.npz` the state after an epoch. A new state replaces the old one only
when it is safe on disk. The folder is deleted when the training has finished.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from har.data.manifest import read_manifest, write_manifest
from har.inference.runtimes import AUTO, RUNTIMES
from har.recipe import VARIANTS, Recipe, describe_changes
from har.training.arrays import load_arrays
from har.training.backup_folders import (
    JOB_FILE,
    backup_folder,
    check_backup,
    delete_backup,
    training_lock,
)
from har.training.job import TrainingJob, build_job
from har.training.state import State, check_state
from har.util.errors import UserError, first_line
from har.util.files import read_regular_file, replace_file, replace_text
from har.util.json_text import check_number, parse_json
from har.util.progress import say, warn
from har.util.units import format_bytes

DATA_FOLDER, STATE_FILE = "data", "state.npz"
# The fields of a TrainingJob that job.json holds; the hardware is found anew.
SAVED_FIELDS = (
    "variant", "requested", "used", "overridden", "runtime", "feature_runtime", "recipe_digest",
)  # fmt: skip
# Backups take at most this share of a training's time. A first one earlier than this many seconds
# would cost more than training again.
# A job has some kilobytes.
MAX_JOB_BYTES = 1_000_000
MAX_SECONDS = 1e10
MAX_TIME_SHARE = 0.02
FIRST_AFTER_S = 5.0


@dataclass(kw_only=True)
class Backup:
    """The backup of a run in training.

    `started` is when the training's command began, in seconds since the epoch, minus the time that
    earlier processes trained. `state` is what to resume from, None at the first start.
    """

    folder: Path
    started: float
    state: State | None = None
    saved: float = field(default_factory=time.monotonic)
    asked: float = 0.0
    # a guess before the first save, which delays that one
    cost_s: float = MAX_TIME_SHARE * FIRST_AFTER_S
    announced: bool = False
    # True after a training that went wrong: it would only do so again
    useless: bool = False

    def is_due(self, last: bool) -> bool:
        """Return whether to save now: after the last epoch always, after others only if the time
        since the last save is worth it.
        """
        self.asked = time.monotonic()
        return last or self.cost_s <= MAX_TIME_SHARE * (self.asked - self.saved)

    def save(self, state: State) -> None:
        """Write the state; a full disk does not end the training."""
        try:
            size = write_state(self.folder, state, time.time() - self.started)
        except OSError as error:
            warn(
                f"no backup in {self.folder}: {first_line(error)}; if this training is interrupted,"
                " it must start again"
            )
            return
        self.saved = time.monotonic()
        self.cost_s = self.saved - self.asked
        if not self.announced:
            say(f"backup to resume from: {format_bytes(size)} in {self.folder}")
            self.announced = True


@contextmanager
def open_backup(run_id: str, job: TrainingJob, started: float) -> Iterator[Backup]:
    """Yield a run's backup while it is trained, with the state that an earlier process left.

    The backup is deleted after the block. An error keeps it, unless it would only be repeated: a
    UserError before the first state, or one that marks the backup as `useless`.

    Raises:
        UserError: another process trains this run, or the backup cannot be read or written.
    """
    folder = backup_folder(run_id)
    with training_lock(run_id):
        folder.mkdir(exist_ok=True)
        state, wall_s = _read_state_of(job.used, folder)
        write_manifest(job.manifest, folder / DATA_FOLDER)
        saved = {name: getattr(job, name) for name in SAVED_FIELDS}
        try:
            # last: with this file the backup is complete
            replace_text(folder / JOB_FILE, json.dumps(saved, default=asdict))
        except OSError as error:
            raise UserError(f"cannot write a backup to {folder}: {first_line(error)}") from error
        backup = Backup(folder=folder, started=started - wall_s, state=state)
        try:
            yield backup
        except UserError:
            if backup.useless or not (folder / STATE_FILE).exists():
                delete_backup(run_id)
            raise
        delete_backup(run_id)


def load_job(run_id: str, image_root: Path | None = None) -> TrainingJob:
    """Load the job of an unfinished run, to be resumed on this machine.

    `image_root` is where its images lie now, if they were moved.

    Raises:
        UserError: there is no backup, it cannot be read, the images are gone or changed, or this
            machine or other weights would make another training of it.
    """
    saved = _read_job_file(run_id)
    used, digest = saved.pop("used"), saved.pop("recipe_digest")
    manifest = read_manifest(backup_folder(run_id) / DATA_FOLDER, image_root)
    job = build_job(manifest=manifest, **saved)
    if job.used != used:
        raise UserError(
            f"cannot resume run {run_id} on this hardware: it would train with"
            f" {describe_changes(used, job.used)}"
        )
    if job.recipe_digest != digest:
        raise UserError(f"cannot resume run {run_id}: {used.weights} holds other weights now")
    return job


def is_trained(run_id: str) -> bool:
    """Return whether all epochs of an unfinished run are done, so that only recording is left."""
    recipe = _read_job_file(run_id)["used"]
    state, _ = _read_state_of(recipe, backup_folder(run_id))
    return state is not None and state.first_epoch(recipe) == recipe.epochs


def _read_job_file(run_id: str) -> dict[str, Any]:
    """Read SAVED_FIELDS; `overridden` was called `typed` in older versions."""
    check_backup(run_id)
    file = backup_folder(run_id) / JOB_FILE
    try:
        text: dict[str, Any] = parse_json(read_regular_file(file, MAX_JOB_BYTES))
        text |= {name: Recipe(**text[name]) for name in ("requested", "used")}
        text["overridden"] = tuple(text["typed" if "typed" in text else "overridden"])
        known = {"variant": VARIANTS, "runtime": (AUTO, *RUNTIMES)}
        for name, values in known.items():
            if text[name] not in values:
                raise ValueError(f"{name} is {text[name]!r}, none of {', '.join(values)}")
        if text["feature_runtime"] not in (None, *RUNTIMES):
            raise ValueError(f"feature_runtime is {text['feature_runtime']!r}")
        return {name: text[name] for name in SAVED_FIELDS}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def write_state(folder: Path, state: State, wall_s: float) -> int:
    """Replace the state on disk; return the size of the file in bytes."""
    about = {name: value for name, value in vars(state).items() if name != "arrays"}
    text = json.dumps(about | {"wall_s": wall_s}).encode()
    with replace_file(folder / STATE_FILE) as file:
        np.savez(file, about=np.frombuffer(text, np.uint8), **state.arrays)  # type: ignore[arg-type]
        return file.tell()


def _read_state_of(recipe: Recipe, folder: Path) -> tuple[State | None, float]:
    """Read the state as `read_state`, and check that it is one of a training of `recipe`."""
    state, wall_s = read_state(folder)
    too_many = state is not None and len(state.history) > recipe.epochs
    stops = recipe.patience and not recipe.solved
    if too_many or (state and stops and not state.stopping):
        raise UserError(
            f"{folder / STATE_FILE} is of another training: delete it to train this run from its"
            " first epoch"
        )
    return state, wall_s


def read_state(folder: Path) -> tuple[State | None, float]:
    """Read the state and the seconds of wall time up to it; None and 0 where there is none."""
    file = folder / STATE_FILE
    if not file.exists():
        return None, 0.0
    try:
        arrays = load_arrays(file)
        about = parse_json(arrays.pop("about").tobytes())
        wall_s = check_number(about.pop("wall_s"), "wall_s", 0, MAX_SECONDS)
        state = State(**about, arrays=arrays)
        check_state(state)
        return state, wall_s
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged: {first_line(error)}; delete it to train this run from its first"
            " epoch"
        ) from error
