"""The main job: train a recipe, log its model, evaluate that model, and record everything."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow

from har.compare.twins import link_twins
from har.data.manifest import check_images
from har.evaluation.evaluate import Evaluation, evaluate, evaluate_features
from har.evaluation.latency import measure_latency
from har.inference.classifier import CLASSIFIER_FOLDER, Classifier, save_classifier
from har.inference.runtimes import Parts
from har.models.backbones import name_weights_by_content
from har.models.build import build_trained_head
from har.serving.load import load_served
from har.serving.package import log_classifier
from har.tracking.descriptions import describe_training
from har.tracking.log import log_evaluation, log_job, log_result, open_epoch_log
from har.tracking.records import Record, read_record
from har.tracking.store import explain_store_errors, open_run, short_timeouts
from har.tracking.tags import training_tags
from har.training.backup import open_backup
from har.training.backup_folders import backup_folder
from har.training.inputs import split_job
from har.training.job import TrainingJob
from har.training.train import Result, train
from har.util.errors import UserError
from har.util.process import format_program, peak_memory_mb
from har.util.progress import say, warn

# Measured on 6,000 photographs (docs/results.md).
SLOW_ON_CPU = (
    "without a GPU, --variant v5 takes a 25th of v3's time and is at least as accurate; v6 and v7"
    " are more accurate, also in less time"
)


def run_training(
    job: TrainingJob,
    experiment: str,
    started: float,
    *,
    parent: str | None = None,
    resume: str | None = None,
    run_name: str | None = None,
) -> Record:
    """Train, evaluate the model as it will be served, and record all of it in one run.

    `started` is when the command began, in seconds since the epoch: `wall_time_s` counts from there
    to the logged and evaluated model. In the UI the run stands under the run `parent`. `resume` is
    the id of a run to resume from its backup; the times of both processes are added.
    """
    split_job(job)  # a mistake in the options leaves no run behind
    tags, manifest = training_tags(job, parent, run_name), job.manifest
    with (
        open_run(experiment, tags, resume) as run,
        _suggest_resume(run.id, parent),
        open_backup(run.id, job, started) as backup,
    ):
        log_job(run, job)
        if not parent and job.hardware.is_cpu and job.used.loader != "features":
            say(SLOW_ON_CPU)
        with open_epoch_log(run.id, backup) as log_epoch:
            result = train(job, on_epoch=log_epoch, backup=backup)
        # the run names the images it was trained on: they must still be those
        check_images(manifest)
        log_result(run, job, result)
        model_id = _log_model(job, result)
        evaluation = None
        if not manifest.rows("test").empty:
            served, classifier = load_served(f"models:/{model_id}")
            evaluation = _evaluate(classifier, job, result)
            latency = measure_latency(served.predict, manifest)
            log_evaluation(run, evaluation, latency, manifest, model_id, result.temperature)
        run.describe(describe_training(run.id, job, result, evaluation))
        wall_time_s = time.time() - backup.started
        run.log_metrics({"peak_memory_mb": peak_memory_mb(), "wall_time_s": wall_time_s})
        # within the backup's block: the backup stays until the run is FINISHED
        run.finish()
    _link_to_twins(run.id)
    with explain_store_errors():
        return read_record(mlflow.get_run(run.id))


def _log_model(job: TrainingJob, result: Result) -> str:
    """Log the trained model for `mlflow models serve`; return its id."""
    runtime, parts, extracted = job.serving_runtime, None, result.extracted
    plain = result.served is result.model
    if plain and extracted and extracted.converted and extracted.runtime == runtime:
        # extraction has converted the backbone for this runtime already
        head = build_trained_head(result.model, result.recipe)
        parts = Parts(backbone=extracted.converted, head=head)
    say("logging the model")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / CLASSIFIER_FOLDER
        # the model is given to others, and does not need to know where a weights file was
        recipe = name_weights_by_content(result.recipe)
        save_classifier(folder, result.served, result.class_names, recipe, runtime, parts)
        return log_classifier(folder)


def _evaluate(classifier: Classifier, job: TrainingJob, result: Result) -> Evaluation:
    features = result.features.test if result.features else None
    if features is None:
        return evaluate(classifier, job.manifest)
    head = build_trained_head(result.model, result.recipe)
    return evaluate_features(classifier, job.manifest, head, features, result.temperature)


@contextmanager
def _suggest_resume(run_id: str, parent: str | None) -> Iterator[None]:
    """Say how to resume an interrupted training, unless it is one of an ablation."""
    command = f"{format_program('har')} train --resume {run_id}"
    if parent is None:
        # under `make` and `mlflow run` this process may be gone before it can print it at the end
        say(f"run {run_id}; if it is interrupted: {command}")
    try:
        yield
    except BaseException:
        if parent is None and backup_folder(run_id).is_dir():
            say(f"to resume this training: {command}")
        raise


def _link_to_twins(run_id: str) -> None:
    try:
        with short_timeouts():
            link_twins(run_id)
    # the training itself is finished and recorded
    except UserError as error:
        warn(f"{error}; `har twins {run_id}` tries again")
