"""Resume a training that was cut short; record finished ones that the store has missed."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from har.data.manifest import read_manifest
from har.jobs.train import Outcome, build_job, run_training
from har.recipe import describe_changes
from har.tracking.query import delete_models, has_finished
from har.tracking.store import DEFAULT_EXPERIMENT, check_store
from har.training.backup import (
    backup_folder,
    delete_backup,
    is_training,
    list_backups,
    read_job,
    read_state,
    training_lock,
)
from har.util.errors import UserError
from har.util.progress import say, warn


def resume_training(
    run_id: str, overrides: Mapping[str, Any], image_root: Path | None, started: float
) -> Outcome:
    """Resume a training that was cut short, in its own run, from its backup in the cache.

    `overrides` are recipe fields, which must be what they were; `image_root` is where the images
    lie now.

    Raises:
        UserError: there is no backup, the run has ended well, it is at work, or what is asked for,
            the data or this machine make another training of it.
    """
    saved, data = read_job(run_id)
    if other := describe_changes(saved.requested, replace(saved.requested, **overrides)):
        raise UserError(f"run {run_id} is trained by another recipe; received {other}")
    check_store()
    with training_lock(backup_folder(run_id)):
        if _delete_finished_backup(run_id):
            raise UserError(f"cannot resume run {run_id}: it already finished")
        manifest = read_manifest(data, image_root)
        job = build_job(
            saved.variant,
            saved.requested,
            saved.overridden,
            manifest,
            saved.runtime,
            saved.feature_runtime,
        )
        if job.used != saved.used:
            raise UserError(
                f"cannot resume run {run_id} on this hardware: it would train with"
                f" {describe_changes(saved.used, job.used)}"
            )
        if job.recipe_digest != saved.recipe_digest:
            raise UserError(
                f"cannot resume run {run_id}: {saved.used.weights} holds other weights now"
            )
        # of a process that ended between logging its model and the end
        delete_models(run_id)
        return run_training(job, DEFAULT_EXPERIMENT, started, resume=run_id)


def _delete_finished_backup(run_id: str) -> bool:
    """Whether the run ended well; then the backup of it, if its process was killed before it could
    delete that, is deleted now.
    """
    if finished := has_finished(run_id):
        delete_backup(run_id)
    return finished


def sync_trainings(started: float) -> Iterator[Outcome]:
    """Record what trainings that are done could not, because the tracking store was away.

    Those that have epochs to go are named and left alone, and one that cannot be recorded does not
    keep the others from it.

    Raises:
        UserError: the store does not answer, or some could not be recorded.
    """
    check_store()
    failed = 0
    for run_id in list_backups():
        if is_training(run_id):
            say(f"run {run_id} is being trained by another process")
            continue
        try:
            saved, _ = read_job(run_id)
            if _delete_finished_backup(run_id):
                continue
            state, _ = read_state(backup_folder(run_id))
            if state is not None and state.first_epoch(saved.used) == saved.used.epochs:
                yield resume_training(run_id, {}, None, started)
                # the next one did not wait for this command to start, nor for this training
                started = time.time()
            else:
                say(f"run {run_id} has epochs to go: har train --resume {run_id}")
        except UserError as error:
            warn(f"run {run_id}: {error}")
            failed += 1
    if failed:
        raise UserError(f"{failed} trainings could not be recorded")
