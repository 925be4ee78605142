"""The main job: fit the recipe to this machine, train it, judge it, record it."""

import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import mlflow

from har import tracking
from har.backbones import with_weights_by_content
from har.classifier import CLASSIFIER_FOLDER, load_classifier, save_classifier
from har.devices import (
    STRATEGIES,
    find_hardware,
    fit_to_hardware,
    peak_memory_mb,
    warn_of_unused_gpu,
)
from har.evaluation import Evaluation, evaluate
from har.manifest import Manifest
from har.metrics import Scores
from har.progress import say, warn
from har.recipe import Recipe, digest
from har.recorded import Logged, check_unseen
from har.tracking import Trial
from har.training import DIAGNOSTICS, Result, train


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is told at the end; `scores` is None without a test split."""

    run_id: str
    variant: str
    changed: str
    hardware: str
    scores: Scores | None
    wall_time_s: float
    tracking_uri: str


def build_trial(
    variant: str, requested: Recipe, typed: Collection[str], manifest: Manifest
) -> Trial:
    """Find the hardware, fit the recipe to it, and warn of what had to give way.

    Raises:
        UserError: there is no such weights file.
    """
    hardware = find_hardware()
    used, warnings = fit_to_hardware(requested, typed, hardware)
    for message in warn_of_unused_gpu(hardware) + warnings:
        warn(message)
    return Trial(
        variant=variant,
        requested=requested,
        used=used,
        hardware=hardware,
        replicas=STRATEGIES[used.strategy]().num_replicas_in_sync,
        recipe_digest=digest(with_weights_by_content(used)),
        manifest=manifest,
    )


def run_trial(trial: Trial, experiment: str, started: float) -> Outcome:
    """Train, judge the model as it will be served, and log everything into one run.

    `started` is when the command began, in seconds since the epoch: `wall_time_s` counts
    from there to the logged and judged model.
    """
    with tracking.open_run(experiment, tracking.trial_tags(trial)) as run_id:
        tracking.log_trial(trial)
        if exploration := DIAGNOSTICS[trial.used.diagnostics](trial.manifest, trial.hardware):
            say(exploration)
            mlflow.log_text(exploration, "exploration.txt")
        result = train(trial.used, trial.manifest, [tracking.log_epoch])
        tracking.log_result(trial, result)
        evaluation = log_and_judge(trial, result)
        tracking.set_description(tracking.describe_run(trial, result, evaluation))
        wall_time_s = time.time() - started
        mlflow.log_metrics({"peak_memory_mb": peak_memory_mb(), "wall_time_s": wall_time_s})
    return Outcome(
        run_id=run_id,
        variant=trial.variant,
        changed=trial.changed,
        hardware=trial.hardware_tag,
        scores=evaluation.scores if evaluation else None,
        wall_time_s=wall_time_s,
        tracking_uri=tracking.without_password(mlflow.get_tracking_uri()),
    )


def log_and_judge(trial: Trial, result: Result) -> Evaluation | None:
    """Save the model, judge what was saved, log both. None without a test split."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / CLASSIFIER_FOLDER
        save_classifier(folder, result.model, result.class_names, result.recipe)
        classifier = load_classifier(folder)
        say("logging the model")
        model_id = tracking.log_classifier(folder, classifier)
    if trial.manifest.rows("test").empty:
        return None
    evaluation = evaluate(classifier, trial.manifest)
    tracking.log_evaluation(evaluation, trial.manifest, model_id)
    return evaluation


def evaluate_logged(logged: Logged, manifest: Manifest, experiment: str) -> Evaluation:
    """Judge a logged model on the manifest's test split, in a run of its own.

    Raises:
        UserError: the model was trained on some of these images; or as `evaluation.evaluate`.
    """
    check_unseen(logged, manifest)
    evaluation = evaluate(logged.classifier, manifest)
    with tracking.open_run(experiment, tracking.evaluation_tags(logged.uri, manifest)):
        tracking.log_evaluation(evaluation, manifest, model_id=None)
    return evaluation
