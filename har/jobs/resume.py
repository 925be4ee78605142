"""Resume an interrupted training; record finished ones that the store has missed."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from har.data.layouts import Source
from har.data.prepare import load_manifest
from har.data.splits import Split
from har.inference.runtimes import AUTO
from har.jobs.train import run_training
from har.recipe import Recipe, describe_changes
from har.tracking.query import delete_models, load_run
from har.tracking.records import Record, check_same_data, load_recorded_training
from har.tracking.store import DEFAULT_EXPERIMENT, open_experiment
from har.training.backup import is_trained, load_job
from har.training.backup_folders import (
    check_backup,
    delete_backup,
    is_training,
    list_backups,
    training_lock,
)
from har.training.job import build_job, check_cluster
from har.util.errors import UserError
from har.util.progress import say, warn
from har.util.ray_cluster import Cluster


def reproduce_training(
    run_id: str,
    *,
    data: str | Source,
    image_root: Path | None,
    experiment: str,
    runtime: str,
    run_name: str | None,
    cluster: Cluster | None,
    started: float,
) -> Record:
    """Train a recorded run's recipe again, on the same images, as a new run."""
    record = load_recorded_training(run_id)
    open_experiment(experiment)
    manifest = load_manifest(data, default=record.split or Split(), image_root=image_root)
    check_same_data(record, manifest)
    feature_runtime = None
    # the same runtimes as before, unless the user names another
    if runtime == AUTO:
        runtime, feature_runtime = record.runtime or AUTO, record.feature_runtime
    every_field = [each.name for each in fields(Recipe)]
    recipe = Recipe(**record.recipe)
    check_cluster(cluster, recipe)
    job = build_job(
        record.variant, recipe, every_field, manifest, runtime, feature_runtime, cluster=cluster
    )
    return run_training(job, experiment, started, run_name=run_name)


def resume_training(
    run_id: str,
    overrides: Mapping[str, Any],
    image_root: Path | None,
    started: float,
    cluster: Cluster | None = None,
) -> Record:
    """Resume an interrupted training in the same run, from its backup in the cache.

    `overrides` are recipe fields, which must have the values they had; `image_root` is where the
    images lie now, if they were moved. Missing features are computed on the `cluster`.

    Raises:
        UserError: there is no backup, the run has finished, another process trains it, or it would
            differ because of the overrides, the data or this machine.
    """
    finished = UserError(
        f"run {run_id} is finished: there is nothing to resume. `har train --reproduce {run_id}`"
        " trains it again"
    )
    if run_id not in list_backups() and _is_finished(run_id):
        raise finished
    check_backup(run_id)
    with training_lock(run_id):
        if _delete_finished_backup(run_id):
            raise finished
        job = load_job(run_id, image_root)
        if other := describe_changes(job.requested, replace(job.requested, **overrides)):
            raise UserError(
                f"a resumed training keeps its recipe; received {other}. For that recipe start a"
                f" new training: har train --variant {job.variant} with the options you want; the"
                " features are cached"
            )
        check_cluster(cluster, job.used)
        # an earlier process may have ended after it logged its model
        delete_models(run_id)
        job = replace(job, cluster=cluster)
        return run_training(job, DEFAULT_EXPERIMENT, started, resume=run_id)


def _is_finished(run_id: str) -> bool:
    try:
        return bool(load_run(run_id).info.status == "FINISHED")
    except UserError:
        return False


def _delete_finished_backup(run_id: str) -> bool:
    # the process of a finished run may be killed before it deletes the backup
    finished = load_run(run_id).info.status == "FINISHED"
    if finished:
        delete_backup(run_id)
    return finished


def sync_trainings(started: float) -> Iterator[Record]:
    """Record the trainings whose epochs are done but which the tracking store has missed; name
    those with epochs left.

    Raises:
        UserError: at the end, if some trainings could not be recorded.
    """
    failed = 0
    for run_id in list_backups():
        try:
            if is_training(run_id):
                say(f"run {run_id} is being trained by another process")
                continue
            trained = is_trained(run_id)
            if _delete_finished_backup(run_id):
                continue
            if trained:
                yield resume_training(run_id, {}, None, started)
                # the next one did not wait for this command to start, nor for this training
                started = time.time()
            else:
                say(f"run {run_id} has epochs left: har train --resume {run_id}")
        except UserError as error:
            warn(f"run {run_id}: {error}")
            failed += 1
    if failed:
        raise UserError(
            f"{failed} trainings could not be recorded. If their store is lost for good, delete"
            " their backups, which `har cache` lists"
        )
