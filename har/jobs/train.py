"""The main job: fit the recipe to this machine, train it, evaluate it, record it."""

import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import mlflow

from har.compare.twins import link_twins
from har.data.manifest import Manifest, check_images
from har.evaluation.evaluate import Evaluation, evaluate, evaluate_features
from har.evaluation.latency import measure_latency
from har.inference.classifier import CLASSIFIER_FOLDER, save_classifier
from har.inference.runtimes import AUTO, Parts, choose_runtime
from har.models.backbones import name_weights_by_content
from har.models.build import build_trained_head
from har.models.devices import STRATEGIES, describe_unused_gpu, find_hardware, fit_to_hardware
from har.recipe import Recipe, digest_recipe
from har.serving.load import load_served
from har.serving.package import log_classifier
from har.tracking.descriptions import describe_training
from har.tracking.log import log_evaluation, log_job, log_result, open_epoch_log
from har.tracking.store import log_missing_metrics, open_run, set_description, short_timeouts
from har.tracking.tags import training_tags
from har.tracking.ui import describe_run_page
from har.training.backup import Backup, Job, backup_folder, open_backup
from har.training.diagnostics import DIAGNOSTICS
from har.training.job import TrainingJob
from har.training.train import Result, train
from har.util.errors import UserError
from har.util.process import peak_memory_mb
from har.util.progress import say, warn


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the command prints at the end; `scores` is None without a test split. `cache_hit`: some
    features were found in the cache, so the wall time is not that of the whole job.
    """

    run_id: str
    variant: str
    differs_from_variant: str
    hardware: str
    scores: dict[str, float] | None
    wall_time_s: float
    cache_hit: bool
    see: str


def build_job(
    variant: str,
    requested: Recipe,
    overridden: Collection[str],
    manifest: Manifest,
    runtime: str = AUTO,
    feature_runtime: str | None = None,
) -> TrainingJob:
    """Find the hardware, fit the recipe to it, and warn about settings that a fallback replaces.

    `feature_runtime`, if given, is obeyed whatever `runtime` says.

    Raises:
        UserError: there is no such weights file, or the runtime is not installed.
    """
    hardware = find_hardware()
    used, warnings = fit_to_hardware(requested, overridden, hardware)
    for message in describe_unused_gpu(hardware) + warnings:
        warn(message)
    return TrainingJob(
        variant=variant,
        requested=requested,
        used=used,
        overridden=tuple(sorted(overridden)),
        hardware=hardware,
        replicas=STRATEGIES[used.strategy]().num_replicas_in_sync,
        recipe_digest=digest_recipe(name_weights_by_content(used)),
        manifest=manifest,
        runtime=runtime,
        feature_runtime=choose_runtime(feature_runtime or runtime, hardware.num_gpus),
    )


def run_training(
    job: TrainingJob,
    experiment: str,
    started: float,
    parent: str | None = None,
    resume: str | None = None,
) -> Outcome:
    """Train, evaluate the model as it will be served, and log everything into one run.

    `started` is when the command began, in seconds since the epoch: `wall_time_s` counts
    from there to the logged and evaluated model. In the UI the run stands under `parent`. With
    `resume`, a run's id, that run is resumed from its backup, and its times added up.
    """
    tags = training_tags(job, parent)
    with ExitStack() as to_the_end, open_run(experiment, tags, resume) as run_id:
        with short_timeouts():
            log_job(job)
        if exploration := DIAGNOSTICS[job.used.diagnostics](job.manifest, job.hardware):
            say(exploration)
            mlflow.log_text(exploration, "exploration.txt")
        # deleted when the run is FINISHED, and not before
        saved = _build_backup_job(job)
        backup = to_the_end.enter_context(open_backup(run_id, saved, job.manifest, started))
        to_the_end.enter_context(_suggest_resume(run_id, parent))
        with backup.filled():
            result, evaluation = _train_and_evaluate(job, run_id, backup)
            description = describe_training(run_id, job, result, evaluation)
            set_description(description)
            see = describe_run_page(run_id)
            wall_time_s = time.time() - backup.started
            used = {"peak_memory_mb": peak_memory_mb(), "wall_time_s": wall_time_s}
            log_missing_metrics(used)
    _link_to_twins(run_id)
    return Outcome(
        run_id=run_id,
        variant=job.variant,
        differs_from_variant=job.differs_from_variant,
        hardware=job.hardware_tag,
        scores=evaluation.scores if evaluation else None,
        wall_time_s=wall_time_s,
        cache_hit=result.extracted is not None and result.extracted.cache == "hit",
        see=see,
    )


def _link_to_twins(run_id: str) -> None:
    """The training is done and recorded, whatever becomes of this."""
    try:
        with short_timeouts():
            link_twins(run_id)
    except UserError as error:
        warn(f"{error}; `har twins {run_id}` tries again")


def _build_backup_job(job: TrainingJob) -> Job:
    """What goes into a backup."""
    return Job(**{each.name: getattr(job, each.name) for each in fields(Job)})


def _train_and_evaluate(
    job: TrainingJob, run_id: str, backup: Backup
) -> tuple[Result, Evaluation | None]:
    """From the backup's state on, if it has one; into the active run."""
    history = backup.state.history if backup.state else []
    with open_epoch_log(run_id, history) as log_epoch:
        result = train(
            job.used,
            job.manifest,
            [log_epoch],
            job.feature_runtime,
            backup.state,
            backup.save,
        )
    # what is recorded says by which images it was trained: they must still be those
    check_images(job.manifest)
    log_result(job, result)
    return result, _log_and_evaluate(job, result)


@contextmanager
def _suggest_resume(run_id: str, parent: str | None) -> Iterator[None]:
    """Say how to go on with a training that is cut short; not of one among several."""
    try:
        yield
    except BaseException:
        if parent is None and backup_folder(run_id).is_dir():
            say(f"to resume this training: har train --resume {run_id}")
        raise


def _log_and_evaluate(job: TrainingJob, result: Result) -> Evaluation | None:
    """Save and log the model, evaluate what was logged, log that. None without a test split."""
    extracted, runtime, parts = result.extracted, job.serving_runtime, None
    head = build_trained_head(result.model, result.recipe) if extracted else None
    if extracted and extracted.converted and extracted.runtime == runtime:
        parts = Parts(backbone=extracted.converted, head=head)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / CLASSIFIER_FOLDER
        save_classifier(folder, result.model, result.class_names, result.recipe, runtime, parts)
        say("logging the model")
        model_id = log_classifier(folder)
    if job.manifest.rows("test").empty:
        return None
    served, classifier = load_served(f"models:/{model_id}")
    if extracted is None:
        evaluation = evaluate(classifier, job.manifest)
    else:
        evaluation = evaluate_features(classifier, job.manifest, head, extracted.test_features)
    latency = measure_latency(served, job.manifest)
    log_evaluation(evaluation, latency, job.manifest, model_id)
    return evaluation
