"""The folders of all backups: found, locked, described and deleted without a framework."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from har.util.errors import UserError
from har.util.escaping import for_terminal
from har.util.files import cache_folder
from har.util.locks import file_lock
from har.util.units import format_bytes

# The last file that a new backup gets.
JOB_FILE = "job.json"


def backup_folder(run_id: str) -> Path:
    """The folder of a run's backup, whether or not it exists."""
    return cache_folder() / "trainings" / run_id


@contextmanager
def training_lock(run_id: str) -> Iterator[None]:
    """Hold what only the process that trains the run may hold."""
    folder = backup_folder(run_id)
    lock = Path(f"{folder}.lock")
    busy = f"run {run_id} is being trained by another process"
    try:
        with file_lock(lock, busy=busy, reentrant=True):
            yield
    finally:
        if not folder.exists():
            lock.unlink(missing_ok=True)


def is_training(run_id: str) -> bool:
    """Return whether another process trains the run now."""
    try:
        with training_lock(run_id):
            return False
    except UserError:
        return True


def list_backups() -> list[str]:
    """List the ids of the runs that have a backup."""
    return sorted(each.parent.name for each in backup_folder("-").parent.glob(f"*/{JOB_FILE}"))


def check_backup(run_id: str) -> None:
    """Raise a UserError unless the run has a backup."""
    if run_id not in (there := list_backups()):
        raise UserError(
            f"cannot resume run {run_id}: no backup in {backup_folder('-').parent}. A training has"
            f" one until it finishes. There are backups of: {', '.join(there) or 'none'}"
        )


def delete_backup(run_id: str) -> None:
    """Delete a run's backup, if there is one."""
    shutil.rmtree(backup_folder(run_id), ignore_errors=True)


def describe_backups() -> list[str]:
    """Describe each backup in one line, below a headline; no lines where there are none."""
    lines = [_describe_backup(run_id) for run_id in list_backups()]
    head = (
        f"{backup_folder('-').parent}: {len(lines)} backups of unfinished trainings; `rm -r` the"
        " folders of those you will not resume"
    )
    return [for_terminal(head), *lines] if lines else []


def _describe_backup(run_id: str) -> str:
    folder, size = backup_folder(run_id), 0
    for each in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a training at work replaces its state
            size += each.stat().st_size
    resume = f"interrupted; to resume: har train --resume {run_id}"
    state = "training now" if is_training(run_id) else resume
    return for_terminal(f"{run_id}  {format_bytes(size):>9}  {state}")
