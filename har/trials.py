"""The main job: fit the recipe to this machine, train it, judge it, record it; go on with it."""

import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlflow

from har import descriptions, store, tracking
from har import manifest as manifests
from har.backbones import with_weights_by_content
from har.backup import (
    Backup,
    Job,
    at_work,
    backed_up,
    folder_of,
    forget,
    list_backups,
    read_job,
    read_state,
    training_lock,
)
from har.classifier import CLASSIFIER_FOLDER, save_classifier
from har.devices import (
    STRATEGIES,
    find_hardware,
    fit_to_hardware,
    peak_memory_mb,
    warn_of_unused_gpu,
)
from har.errors import UserError, without_password
from har.evaluation import Evaluation, evaluate, judge_features
from har.manifest import Manifest
from har.metrics import Scores
from har.model import build_head_of
from har.packaging import load_served, log_classifier, measure_latency
from har.progress import say, warn
from har.recipe import Recipe, describe_changes, digest
from har.runtimes import AUTO, Parts, choose_runtime
from har.tracking import Trial
from har.training import DIAGNOSTICS, Result, train
from har.twins import link_twins
from har.ui import describe_ui

EXPERIMENT = "har"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is told at the end; `scores` is None without a test split. `warm`: some of the work was
    found done, so that the wall time is not that of the whole job.
    """

    run_id: str
    variant: str
    changed: str
    hardware: str
    scores: Scores | None
    wall_time_s: float
    warm: bool
    see: str


def build_trial(
    variant: str,
    requested: Recipe,
    typed: Collection[str],
    manifest: Manifest,
    runtime: str = AUTO,
    feature_runtime: str | None = None,
) -> Trial:
    """Find the hardware, fit the recipe to it, and warn of what had to give way.

    `feature_runtime`, if given, is obeyed whatever `runtime` says.

    Raises:
        UserError: there is no such weights file, or the runtime is not installed.
    """
    hardware = find_hardware()
    used, warnings = fit_to_hardware(requested, typed, hardware)
    for message in warn_of_unused_gpu(hardware) + warnings:
        warn(message)
    return Trial(
        variant=variant,
        requested=requested,
        used=used,
        typed=tuple(sorted(typed)),
        hardware=hardware,
        replicas=STRATEGIES[used.strategy]().num_replicas_in_sync,
        recipe_digest=digest(with_weights_by_content(used)),
        manifest=manifest,
        runtime=runtime,
        feature_runtime=choose_runtime(feature_runtime or runtime, hardware.num_gpus),
    )


def run_trial(
    trial: Trial,
    experiment: str,
    started: float,
    parent: str | None = None,
    resume: str | None = None,
) -> Outcome:
    """Train, judge the model as it will be served, and log everything into one run.

    `started` is when the command began, in seconds since the epoch: `wall_time_s` counts
    from there to the logged and judged model. In the UI the run stands under `parent`. With
    `resume`, a run's id, that one is gone on with from its backup, and its times added up.
    """
    tags = tracking.trial_tags(trial, parent)
    with ExitStack() as to_the_end, store.open_run(experiment, tags, resume) as run_id:
        with store.briefly():
            tracking.log_trial(trial)
        if exploration := DIAGNOSTICS[trial.used.diagnostics](trial.manifest, trial.hardware):
            say(exploration)
            mlflow.log_text(exploration, "exploration.txt")
        # deleted when the run is FINISHED, and not before
        job = job_of(trial)
        backup = to_the_end.enter_context(backed_up(run_id, job, trial.manifest, started))
        to_the_end.enter_context(hint_at_resume(run_id, parent))
        with backup.filled():
            result, evaluation = train_and_judge(trial, run_id, backup)
            description = descriptions.describe_training(run_id, trial, result, evaluation)
            store.set_description(description)
            see = where_to_see(run_id)
            wall_time_s = time.time() - backup.started
            used = {"peak_memory_mb": peak_memory_mb(), "wall_time_s": wall_time_s}
            store.log_missing_metrics(used)
    link_to_twins(run_id)
    return Outcome(
        run_id=run_id,
        variant=trial.variant,
        changed=trial.changed,
        hardware=trial.hardware_tag,
        scores=evaluation.scores if evaluation else None,
        wall_time_s=wall_time_s,
        warm=result.extracted is not None and result.extracted.state == "warm",
        see=see,
    )


def link_to_twins(run_id: str) -> None:
    """The training is done and recorded, whatever becomes of this."""
    try:
        with store.briefly():
            link_twins(run_id)
    except UserError as error:
        warn(f"{error}; `har twins {run_id}` tries again")


def job_of(trial: Trial) -> Job:
    """What goes into a backup."""
    return Job(**{each.name: getattr(trial, each.name) for each in fields(Job)})


def train_and_judge(trial: Trial, run_id: str, backup: Backup) -> tuple[Result, Evaluation | None]:
    """From the backup's state on, if it has one; into the active run."""
    history = backup.state.history if backup.state else []
    with tracking.epochs_of(run_id, history) as log_epoch:
        result = train(
            trial.used,
            trial.manifest,
            [log_epoch],
            trial.feature_runtime,
            backup.state,
            backup.save,
        )
    # what is recorded says by which images it was trained: they must still be those
    manifests.check_images(trial.manifest)
    tracking.log_result(trial, result)
    return result, log_and_judge(trial, result)


@contextmanager
def hint_at_resume(run_id: str, parent: str | None) -> Iterator[None]:
    """Say how to go on with a training that is cut short; not of one among several."""
    try:
        yield
    except BaseException:
        if parent is None and folder_of(run_id).is_dir():
            say(f"to go on with this training: har train --resume {run_id}")
        raise


def resume_trial(
    run_id: str, typed: Mapping[str, Any], images: Path | None, started: float
) -> Outcome:
    """Go on with a training that was cut short, in its own run, from its backup in the cache.

    `typed` are recipe fields, which must be what they were; `images` is where the images lie now.

    Raises:
        UserError: there is no backup, the run has ended well, it is at work, or what is asked for,
            the data or this machine make another training of it.
    """
    job, data = read_job(run_id)
    if other := describe_changes(job.requested, replace(job.requested, **typed)):
        raise UserError(f"run {run_id} is trained by another recipe; received {other}")
    store.check_store()
    with training_lock(folder_of(run_id)):
        if forgot_finished(run_id):
            raise UserError(f"run {run_id} cannot be gone on with: it has ended well")
        manifest = manifests.read(data, images)
        trial = build_trial(
            job.variant, job.requested, job.typed, manifest, job.runtime, job.feature_runtime
        )
        if trial.used != job.used:
            raise UserError(
                f"run {run_id} cannot be gone on with on this hardware: it would train with"
                f" {describe_changes(job.used, trial.used)}"
            )
        if trial.recipe_digest != job.recipe_digest:
            raise UserError(
                f"run {run_id} cannot be gone on with: {job.used.weights} holds other weights now"
            )
        # of a process that ended between logging its model and the end
        store.forget_models(run_id)
        return run_trial(trial, EXPERIMENT, started, resume=run_id)


def forgot_finished(run_id: str) -> bool:
    """Whether the run ended well; then the backup of it, if its process was killed before it could
    delete that, is deleted now.
    """
    if finished := store.has_finished(run_id):
        forget(run_id)
    return finished


def sync_trainings(started: float) -> Iterator[Outcome]:
    """Record what trainings that are done could not, because the tracking store was away.

    Those that have epochs to go are named and left alone, and one that cannot be recorded does not
    keep the others from it.

    Raises:
        UserError: the store does not answer, or some could not be recorded.
    """
    store.check_store()
    failed = 0
    for run_id in list_backups():
        if at_work(run_id):
            say(f"run {run_id} is being trained by another process")
            continue
        try:
            job, _ = read_job(run_id)
            if forgot_finished(run_id):
                continue
            state, _ = read_state(folder_of(run_id))
            if state is not None and state.first_epoch(job.used) == job.used.epochs:
                yield resume_trial(run_id, {}, None, started)
                # the next one did not wait for this command to start, nor for this training
                started = time.time()
            else:
                say(f"run {run_id} has epochs to go: har train --resume {run_id}")
        except UserError as error:
            warn(f"run {run_id}: {error}")
            failed += 1
    if failed:
        raise UserError(f"{failed} trainings could not be recorded")


def where_to_see(run_id: str) -> str:
    """How to open the UI on this run's experiment."""
    uri = without_password(mlflow.get_tracking_uri())
    return describe_ui(uri, mlflow.get_run(run_id).info.experiment_id)


def log_and_judge(trial: Trial, result: Result) -> Evaluation | None:
    """Save and log the model, judge what was logged, log that. None without a test split."""
    extracted, runtime, parts = result.extracted, trial.serving_runtime, None
    head = build_head_of(result.model, result.recipe) if extracted else None
    if extracted and extracted.converted and extracted.runtime == runtime:
        parts = Parts(backbone=extracted.converted, head=head)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / CLASSIFIER_FOLDER
        save_classifier(folder, result.model, result.class_names, result.recipe, runtime, parts)
        say("logging the model")
        model_id = log_classifier(folder)
    if trial.manifest.rows("test").empty:
        return None
    served, classifier = load_served(f"models:/{model_id}")
    if extracted is None:
        evaluation = evaluate(classifier, trial.manifest)
    else:
        evaluation = judge_features(classifier, trial.manifest, head, extracted.test_features)
    latency = measure_latency(served, trial.manifest)
    tracking.log_evaluation(evaluation, latency, trial.manifest, model_id)
    return evaluation
